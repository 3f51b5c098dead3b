"""Which pipeline runs may leave MLflow: old ones, that no version, no unfinished and no kept run needs.

A run goes as a whole, with its stages, the models that they logged, and its versions. What stays, whatever its age:

- runs that run or can be resumed;
- runs of versions that have an alias, were champion once, are tagged `sft.keep`, or are among the newest;
- stages whose results a run or version that stays has taken from the cache.
"""

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field

from mlflow.entities import LifecycleStage, LoggedModel, Run, ViewType
from mlflow.entities.model_registry import ModelVersion

from tasks import tracking
from tasks.registry.audit import list_moves
from tasks.registry.versions import RUN_TAG

KEEP_TAG = "sft.keep"
"""Set on a version, whatever its value, it and its run stay."""
RESUMABLE = ("RUNNING", "SCHEDULED", "KILLED")
_FLOW_RUN_TAG = "sft.prefect_flow_run"
_PAGE = 1000
# Ids of runs and of logged models, wherever an address or a reference has them.
_IDS = re.compile(r"(?<![0-9A-Za-z])(?:m-)?[0-9a-f]{32}(?![0-9A-Za-z])")


@dataclass(frozen=True)
class Retention:
    """How long runs and versions stay."""

    before: float
    """Runs that ended before it may go; seconds since 1970."""
    runs: int | None = None
    """The newest runs of each experiment that stay; more may go, whatever their age."""
    versions: int | None = None
    """The newest versions of each registered model that stay beside the protected ones; None: all versions stay."""
    interrupted: bool = False
    """Whether runs that could be resumed may go when they are old."""


@dataclass(frozen=True)
class OldRun:
    """A pipeline run that may go, and what goes with it."""

    run_id: str
    name: str
    runs: tuple[str, ...]
    """MLflow runs, stages first; without those stages whose results are still needed."""
    models: tuple[str, ...]
    """Models that these have logged."""
    versions: tuple[tuple[str, str], ...]
    """Name and number."""
    locations: tuple[str, ...]
    """Where the artifacts of these runs and models are."""


@dataclass
class RetentionPlan:
    """What may go, and why the rest stays."""

    old: list[OldRun] = field(default_factory=list)
    stays: dict[str, int] = field(default_factory=dict)
    """Number of pipeline runs by reason."""
    flow_runs: set[str] = field(default_factory=set)
    """Prefect's ids of the latest attempts of runs that can be resumed."""


@dataclass
class _Records:
    """What MLflow has: pipeline runs with their stages, the models and the versions of these."""

    parents: dict[str, Run]
    stages: dict[str, list[Run]]
    """By the id of the parent."""
    models: dict[str, list[LoggedModel]]
    """By the id of the run that logged them."""
    versions: list[ModelVersion]
    former: set[tuple[str, str]]
    """Versions that have an alias or were champion, by name and number."""

    def family(self, run_id: str) -> list[Run]:
        """Return the stages of a pipeline run, and itself at the end."""
        return [*self.stages.get(run_id, []), self.parents[run_id]]


def find_old_runs(retention: Retention) -> RetentionPlan:
    """Return the runs that may go, by MLflow's records as they are now."""
    records = _read_records()
    plan = RetentionPlan()
    needed = _find_versioned(records, retention)
    beyond = _find_beyond(records, retention.runs)
    candidates = []
    for run_id, run in records.parents.items():
        resumable = run.info.status in RESUMABLE
        if resumable:
            plan.flow_runs.add(run.data.tags.get(_FLOW_RUN_TAG, ""))
        ended = run.info.end_time or max(each.info.start_time for each in records.family(run_id))
        old = ended / 1000 < retention.before
        if resumable and not (retention.interrupted and old):
            reason = "running or can be resumed"
        elif run_id in needed:
            reason = "of a registered version"
        elif not old and run_id not in beyond:
            reason = "young"
        else:
            candidates.append(run_id)
            continue
        plan.stays[reason] = plan.stays.get(reason, 0) + 1
    kept = _find_references(records, set(records.parents) - set(candidates), set(candidates))
    plan.old = [_describe(records, run_id, kept) for run_id in candidates]
    plan.old = [each for each in plan.old if each.runs]
    return plan


def _read_records() -> _Records:
    client = tracking.client()
    experiments = [
        each.experiment_id for each in tracking.read_pages(client.search_experiments, view_type=ViewType.ACTIVE_ONLY)
    ]
    records = _Records({}, {}, {}, [], set())
    if not experiments:
        return records
    for run in _search_runs(experiments, tracking.CONFIG_TAG):
        records.parents[run.info.run_id] = run
    for run in _search_runs(experiments, tracking.PARENT_TAG):
        records.stages.setdefault(run.data.tags[tracking.PARENT_TAG], []).append(run)
    for model in tracking.read_pages(client.search_logged_models, experiment_ids=experiments):
        records.models.setdefault(str(model.source_run_id), []).append(model)
    records.versions = list(tracking.read_pages(client.search_model_versions))
    for model in tracking.read_pages(client.search_registered_models):
        records.former |= {(model.name, str(number)) for number in model.aliases.values()}
        for move in list_moves(model):
            records.former |= {(model.name, number) for number in (move.version_from, move.version_to) if number}
    return records


def _search_runs(experiments: Sequence[str], tag: str) -> Iterator[Run]:
    query = f"tags.`{tag}` LIKE '%'"
    return tracking.read_pages(
        tracking.client().search_runs, experiment_ids=experiments, filter_string=query, max_results=_PAGE
    )


def _find_versioned(records: _Records, retention: Retention) -> set[str]:
    """Return the pipeline runs of which a version stays."""
    owners = {model.model_id: run_id for run_id, models in records.models.items() for model in models}
    parents = {run.info.run_id: parent for parent, runs in records.stages.items() for run in runs}
    newest: dict[str, int] = {}
    needed = set()
    for version in sorted(records.versions, key=lambda each: -int(each.version)):
        newest[version.name] = newest.get(version.name, 0) + 1
        stays = (
            retention.versions is None
            or newest[version.name] <= retention.versions
            or (version.name, str(version.version)) in records.former
            or KEEP_TAG in version.tags
            or RUN_TAG not in version.tags  # somebody else's
        )
        if stays:
            named = _IDS.findall(" ".join((str(version.run_id), str(version.source), version.tags.get(RUN_TAG, ""))))
            runs = {owners.get(each, each) for each in named}
            needed |= {parents.get(run_id, run_id) for run_id in runs}
    return needed


def _find_beyond(records: _Records, limit: int | None) -> set[str]:
    """Return the runs beyond the newest of each experiment."""
    if limit is None:
        return set()
    seen: dict[str, int] = {}
    beyond = set()
    for run in sorted(records.parents.values(), key=lambda run: -run.info.start_time):
        seen[run.info.experiment_id] = seen.get(run.info.experiment_id, 0) + 1
        if seen[run.info.experiment_id] > limit:
            beyond.add(run.info.run_id)
    return beyond


def _find_references(records: _Records, kept: set[str], candidates: set[str]) -> set[str]:
    """Return the runs of candidates that kept ones refer to, from any of their tags, and what these refer to in turn.

    A stage that is referred to keeps the pipeline run that it belongs to as its page, but not that one's other stages.
    """
    stages = {run.info.run_id: run for parent in candidates for run in records.stages.get(parent, [])}
    found: set[str] = set()
    texts = [text for run_id in kept for run in records.family(run_id) for text in run.data.tags.values()]
    gone = {(version.name, str(version.version)) for version in records.versions if _belongs(version, candidates)}
    texts += [
        text
        for version in records.versions
        if (version.name, str(version.version)) not in gone
        for text in version.tags.values()
    ]
    while texts:
        for run_id in set(_IDS.findall(texts.pop())) - found:
            if run_id in candidates:
                found.add(run_id)
            elif run_id in stages:
                found |= {run_id, stages[run_id].data.tags[tracking.PARENT_TAG]}
                texts += [text for key, text in stages[run_id].data.tags.items() if key != tracking.PARENT_TAG]
    return found


def _belongs(version: ModelVersion, runs: Container[str | None]) -> bool:
    return version.tags.get(RUN_TAG) in runs


def _describe(records: _Records, run_id: str, kept: set[str]) -> OldRun:
    runs = [run for run in records.family(run_id) if run.info.run_id not in kept]
    models = [model for run in runs for model in records.models.get(run.info.run_id, [])]
    return OldRun(
        run_id=run_id,
        name=records.parents[run_id].info.run_name or run_id,
        runs=tuple(run.info.run_id for run in runs if run.info.lifecycle_stage == LifecycleStage.ACTIVE),
        models=tuple(model.model_id for model in models),
        versions=tuple((each.name, str(each.version)) for each in records.versions if _belongs(each, (run_id,))),
        locations=(*(run.info.artifact_uri for run in runs), *(model.artifact_location for model in models)),
    )
