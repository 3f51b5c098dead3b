"""Registration's task: a merged model becomes a version, and the gate decides whether it becomes champion."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.settings import PREFECT_UI_URL

from schemas.artifacts import (
    Champion,
    ChampionReport,
    ComparisonReport,
    DatasetRef,
    Decision,
    EvalReport,
    GateCheck,
    MergedRef,
    ModelRef,
    Ref,
    RegistryEntry,
    TokensRef,
)
from schemas.config import RegistryConfig
from tasks import storage, tracking
from tasks.registry.audit import describe_user
from tasks.registry.description import describe_decision, describe_version
from tasks.registry.promotion import OvertakenError, place_version
from tasks.registry.replay import fetch_logged, replay_rows
from tasks.registry.versions import (
    ANSWERS_TAG,
    CHAMPION,
    GATE_TAG,
    MODEL_TAG,
    PARITY_TAG,
    REASONS_TAG,
    RUN_TAG,
    VERSION_TAG,
    aliases_of,
    create_version,
    find_version,
    get_version,
    read_alias,
    update_version,
)

_EVALUATION_TAG, _DATASET_TAG, _TOKENIZER_TAG = "sft.evaluation", "sft.dataset", "sft.tokenizer_digest"
_TEMPLATE_TAG = "sft.template_digest"
_REPLAY_TAG = "sft.replay"


@task(name="find-champion", task_run_name="find the champion of {name}", cache_policy=NO_CACHE)
def find_champion(name: str, tokens: TokensRef) -> Champion | None:
    """Return the version behind the alias champion, and what stands against asking it these rows."""
    version = read_alias(name, CHAMPION)
    if version is None:
        get_run_logger().info("%s has no champion yet", name)
        return None
    found = get_version(name, version)
    tags = found.tags
    known = MODEL_TAG in tags
    champion = Champion(
        name=name,
        version=version,
        model=ModelRef(uri=str(found.source), digest=tags[MODEL_TAG], name=f"{name} version {version}", kind="champion")
        if known
        else None,
        evaluation=_recorded_evaluation(tags),
        dataset=Ref.model_validate_json(tags[_DATASET_TAG]) if _DATASET_TAG in tags else None,
        obstacle=_find_obstacle(tags, tokens),
    )
    get_run_logger().info(
        "Champion of %s: version %s%s", name, version, f", {champion.obstacle}" if champion.obstacle else ""
    )
    return champion


def _find_obstacle(tags: dict[str, str], tokens: TokensRef) -> str | None:
    """Say why a champion cannot be asked the rows of this run; None when it can.

    The rows are ids, so another tokenizer makes them other words, and its nll would be over other tokens.
    """
    if MODEL_TAG not in tags or _TOKENIZER_TAG not in tags:
        return "it was not registered by this pipeline as it is now, so that its tokenizer is not known"
    if tags[_TOKENIZER_TAG] != _digest_tokenizer(tokens):
        return "it has another tokenizer, so that nll and prompts would be over other tokens"
    if tags.get(_TEMPLATE_TAG) != tokens.template_digest:
        return "it was trained with another chat template than the one these rows are rendered with"
    return None


def _recorded_evaluation(tags: Mapping[str, str]) -> EvalReport | None:
    """Return what the champion's own run measured of this very model, when its rows are still there."""
    if _EVALUATION_TAG not in tags:
        return None
    evaluation = EvalReport.model_validate_json(tags[_EVALUATION_TAG])
    if evaluation.model_digest != tags.get(MODEL_TAG):
        return None
    try:
        tracking.resolve(evaluation)
    except tracking.ArtifactError:
        return None
    return evaluation


def _digest_tokenizer(tokens: TokensRef) -> str:
    folder = tracking.resolve_some(tokens) / "tokenizer"
    file: Path = folder / "tokenizer.json"
    return storage.digest_file(file) if file.is_file() else storage.digest_folder(folder)


@task(name="register", task_run_name="register {config.name}", cache_policy=NO_CACHE)
def register(
    merged: MergedRef,
    comparison: ComparisonReport,
    config: RegistryConfig,
    *,
    title: str,
    evaluation: EvalReport,
    base_model: ModelRef,
    dataset: DatasetRef,
    tokens: TokensRef,
    git_commit: str,
    parent_run_id: str,
) -> RegistryEntry:
    """Register the model as challenger, and as champion when the gate says so and nobody was faster."""
    with tracking.stage_run(parent_run_id, "register", config) as run_id:
        tags = {
            **_collect_tags(merged, comparison, base_model, dataset, tokens, evaluation),
            RUN_TAG: parent_run_id,
            "sft.git_commit": git_commit,
            "sft.prefect_flow_run": str(flow_run.id or ""),
        }
        links = _describe_links(parent_run_id)
        decision = comparison.decision
        text = describe_version(title, comparison, decision, links)
        # A resumed run may have registered already: the version is found again by its run.
        entry = find_version(config.name, RUN_TAG, parent_run_id)
        if entry is None:
            tags[_REPLAY_TAG] = _replay(merged, dataset, tokens)
            whole = {**tags, **_tags_of(decision)}
            origin, metrics = str(merged.mlflow_run_id), comparison.after
            entry = create_version(
                config.name, merged.uri, run_id=origin, metrics=metrics, tags=whole, description=text
            )
        else:
            entry = update_version(entry, tags=_tags_of(decision), description=text)
        try:
            previous = _take_place(entry, comparison.champion, decision)
        except OvertakenError as error:
            overtaken = GateCheck(kind="champion", passed=False, finding=str(error))
            decision, previous = Decision(verdict="refused", checks=(*decision.checks, overtaken)), None
            text = describe_version(title, comparison, decision, links)
            update_version(entry, tags=_tags_of(decision), description=text)
        version = str(entry.version)
        named = {VERSION_TAG: f"{config.name}/{version}"}
        *_, aliases = tracking.at_once(
            partial(tracking.set_tags, run_id, {**tags, **_tags_of(decision), **named}),
            partial(tracking.set_tags, parent_run_id, {**named, "sft.verdict": decision.verdict}),
            partial(
                tracking.log_text,
                parent_run_id,
                describe_decision(decision, comparison, f"{config.name} version {version}"),
                "gate/gate.md",
            ),
            partial(aliases_of, config.name, version),
        )
    verdict, reasons = decision.verdict, decision.reasons
    get_run_logger().info("%s version %s: %s. %s", config.name, version, verdict, "; ".join(reasons))
    _show_verdict(config.name, version, verdict, reasons, links)
    return RegistryEntry(
        name=config.name, version=version, aliases=aliases, verdict=verdict, reasons=reasons, previous=previous
    )


def _replay(merged: MergedRef, dataset: DatasetRef, tokens: TokensRef) -> str:
    """Ask training rows of the logged model, and say how it went.

    Raises:
        ReplayError: it sees other prompts than the training did.
    """
    with storage.new_folder() as folder:
        model = fetch_logged(merged.uri, tracking.resolve(merged), folder)
        rows, examples = (partial(tracking.read_parts, ref, "train.parquet") for ref in (dataset, tokens))
        masks = tracking.resolve_some(tokens, "masks.json") / "masks.json"
        replay = replay_rows(model, rows, examples, tracking.count_parts(tokens, "train.parquet"), masks)
    get_run_logger().info("Replay: %s training rows give the logged model the prompts of training", replay.num_equal)
    return f"passed: {replay.num_equal} rows, {replay.num_cut} cut for length left out"


def _tags_of(decision: Decision) -> dict[str, str]:
    return {GATE_TAG: decision.verdict, REASONS_TAG: "; ".join(decision.reasons)}


def _collect_tags(
    merged: MergedRef,
    comparison: ComparisonReport,
    base_model: ModelRef,
    dataset: DatasetRef,
    tokens: TokensRef,
    evaluation: EvalReport,
) -> dict[str, str]:
    """Return what a version carries of where it comes from, and what a later run needs to compare with it."""
    return {
        "sft.dataset_digest": dataset.digest,
        "sft.source_digest": dataset.source_digest,
        _DATASET_TAG: Ref(uri=dataset.uri, digest=dataset.digest).model_dump_json(),
        _EVALUATION_TAG: evaluation.model_dump_json(),
        "sft.base_model": base_model.name,
        "sft.base_model_revision": base_model.revision or "",
        "sft.base_model_digest": base_model.digest,
        MODEL_TAG: merged.digest,
        _TEMPLATE_TAG: tokens.template_digest,
        _TOKENIZER_TAG: _digest_tokenizer(tokens),
        # A merge that cannot prove itself fails the run, so that what arrives here has passed.
        PARITY_TAG: f"passed: largest logit difference {merged.check.max_abs_logit_diff:.2e}, "
        f"greedy agreement {merged.check.greedy_agreement:.1%}",
        "sft.compared_with_champion": comparison.champion.version if comparison.champion else "",
        ANSWERS_TAG: merged.answers.model_dump_json() if merged.answers else "",
    }


def _take_place(entry: ModelVersion, champion: ChampionReport | None, decision: Decision) -> str | None:
    """Give the version its aliases; return the champion that it took the place of.

    Raises:
        OvertakenError: the champion is not the one any more that it was compared with.
    """
    previous = champion.version if champion else None
    moved = place_version(
        entry,
        is_promoted=decision.verdict == "promoted",
        expected=previous,
        who=f"pipeline run by {describe_user()}",
        why="; ".join(decision.reasons),
    )
    return previous if moved else None


def _describe_links(parent_run_id: str) -> str:
    """Return a line of Markdown that leads to the run in MLflow and in Prefect."""
    address = tracking.ui_link(parent_run_id)
    run = f"[MLflow run]({address})" if address else f"MLflow run `{parent_run_id}`"
    if PREFECT_UI_URL.value():  # a temporary server has no pages
        return f"{run}, [Prefect run]({flow_run.ui_url})"
    return f"{run}, Prefect run `{flow_run.id}`"


def _show_verdict(name: str, version: str, verdict: str, reasons: tuple[str, ...], links: str) -> None:
    """Show on the flow run's page in Prefect what the gate said."""
    listed = "\n".join(f"- {reason}" for reason in reasons)
    page = tracking.version_link(name, version)
    title = f"[{name} version {version}]({page})" if page else f"{name} version {version}"
    create_markdown_artifact(
        f"## {title}: {verdict}\n\n{listed}\n\n{links}", key="registry", description="What the gate said"
    )
