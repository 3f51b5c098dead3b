"""What is old in a home, in MLflow and in Prefect: found, told with its bytes, and deleted."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from flows import flow_run_records
from flows.cleaning import DAY_SECONDS, Waste, delete, find_results, find_waste, measure
from tasks import storage, tracking
from tasks.registry.pruning import prune_runs
from tasks.registry.retention import OldRun, Retention, RetentionPlan, find_old_runs
from tasks.sqlite_files import compact, find_path
from tasks.tracking import removal

_BACKEND = "MLFLOW_BACKEND_STORE_URI"  # by which MLflow's server is told its database
RUN, FLOW_RUN, VERSION = "MLflow run", "Prefect flow run", "registered version"
MARKED = "MLflow run marked before"


@dataclass(frozen=True)
class Survey:
    """What may go, as it was found."""

    waste: list[Waste]
    plan: RetentionPlan
    artifact_bytes: dict[str, int]
    """Of each old run's artifacts."""
    unreachable: list[OldRun]
    """Old runs whose artifacts cannot be deleted from here."""
    unfinished: list[str]
    """MLflow runs that are marked as deleted by a cleaning, and still there."""
    flow_runs: list[UUID]
    database: str | None
    """Address of MLflow's own database; None where it cannot be reached."""
    keeps_versions: bool
    """Whether all registered versions stay."""

    def sizes(self) -> dict[str, list[int]]:
        """Return the bytes of each thing that goes, by kind; rows of databases are not among them."""
        found: dict[str, list[int]] = {}
        for item in self.waste:
            found.setdefault(item.what, []).append(item.num_bytes)
        if self.plan.old:
            found[RUN] = [self.artifact_bytes[run.run_id] for run in self.plan.old]
        if versions := sum(len(run.versions) for run in self.plan.old):
            found[VERSION] = [0] * versions
        if self.unfinished and self.database is not None:
            found[MARKED] = [0] * len(self.unfinished)
        if self.flow_runs:
            found[FLOW_RUN] = [0] * len(self.flow_runs)
        return found

    def describe(self) -> list[str]:
        """Return a line for each thing that goes."""
        lines = [f"{item.what} {item.path}: {item.num_bytes:,} bytes" for item in self.waste]
        for run in self.plan.old:
            what = f"{len(run.runs)} MLflow runs, {len(run.models)} models, {self.artifact_bytes[run.run_id]:,} bytes"
            named = f", version {', '.join('/'.join(each) for each in run.versions)}" if run.versions else ""
            lines.append(f"{RUN} {run.run_id} ({run.name}): {what}{named}")
        if self.database is not None:
            lines += [f"{MARKED} {each}" for each in self.unfinished]
        return lines + [f"{FLOW_RUN} {each}" for each in self.flow_runs]

    def notes(self) -> list[str]:
        """Return what stays and why, what takes room, and what is to be done elsewhere."""
        stays = self.plan.stays
        lines = []
        if stays:
            lines.append(
                f"Runs that stay: {', '.join(f'{number:,} {reason}' for reason, number in sorted(stays.items()))}"
            )
        if self.keeps_versions and "of a registered version" in stays:
            lines.append(
                "All registered versions stay with their runs; --versions 20 keeps the newest 20 of each model"
            )
        if (self.plan.old or self.unfinished) and self.database is None:
            lines.append(
                "MLflow's database cannot be reached from here: runs are marked as deleted, and go with `mlflow gc` or "
                "`sft clean` on the server's machine"
            )
        if self.unreachable:
            lines.append(
                f"{len(self.unreachable):,} runs have artifacts outside this home or behind an MLflow server, and "
                "stay: give their SFT_HOME, or start `sft serve` and point the shell at it (. service/client.env)"
            )
        home = storage.home()
        names = ("cache", "runs", "results", "artifacts", "mlflow.db", "prefect", "prefect.db", "service/logs")
        kept = {name: measure(home / name) for name in names if (home / name).exists()}
        return [*lines, f"In {home}: " + ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in kept.items())]


def survey(*, days: float, runs: int | None, versions: int | None, interrupted: bool) -> Survey:
    """Return what may be deleted now.

    Args:
        days: since it ended, was written or last used.
        runs: of each experiment, the newest that stay; None: all that are young enough.
        versions: of each model, the newest that stay beside the protected ones; None: all.
        interrupted: whether runs that can be resumed may go when they are old.
    """
    before = time.time() - days * DAY_SECONDS
    waste = find_waste(days=days, interrupted=interrupted)
    has_records = tracking.has_records()
    plan = find_old_runs(Retention(before, runs, versions, interrupted)) if has_records else RetentionPlan()
    unreachable = [run for run in plan.old if not all(map(removal.can_reach, run.locations))]
    plan.old = reached = [run for run in plan.old if run not in unreachable]
    unfinished = removal.find_unfinished() if has_records else []
    known = [*(run.run_id for run in reached), *unfinished]
    return Survey(
        waste=waste,
        plan=plan,
        artifact_bytes={run.run_id: sum(map(removal.measure_artifacts, run.locations)) for run in reached},
        unreachable=unreachable,
        flow_runs=flow_run_records.find_old_flow_runs(before, plan.flow_runs),
        unfinished=unfinished,
        database=_find_database(known[0]) if known else None,
        keeps_versions=versions is None,
    )


def clean_up(found: Survey) -> int:
    """Delete what was found, unless it is used again since, and return the bytes that databases gave back.

    Of two at once in a home the second begins when the first is done.
    """
    with storage.make_lock(storage.make_home() / "clean.lock"):
        return _clean_up(found)


def _clean_up(found: Survey) -> int:
    if found.plan.old or found.unfinished:
        prune_runs(found.plan.old, found.database)
        delete(find_results({run_id for run in found.plan.old for run_id in run.runs}))
        home = storage.home() / "runs"
        gone = [run.run_id for run in found.plan.old if run.run_id in run.runs and not storage.is_held(run.run_id)]
        delete([Waste("checkpoints", home / run_id, 0) for run_id in gone if (home / run_id).is_dir()])
    if found.flow_runs:
        flow_run_records.delete_flow_runs(found.flow_runs)
    delete(found.waste)
    return sum(compact(path) for path in _databases())


def _databases() -> list[Path]:
    """Return the SQLite files that a home's runs and servers write to."""
    home = storage.home()
    named = [find_path(tracking.tracking_uri()), flow_run_records.local_database()]
    candidates = [*named, home / "mlflow.db", home / "prefect.db"]
    return sorted({path.absolute() for path in candidates if path is not None and path.is_file()})


def _find_database(run_id: str) -> str | None:
    """Return the address of the database that has this run, or None where it cannot be reached from here."""
    address = tracking.tracking_uri()
    if address.startswith(("http://", "https://")):
        from flows.service.databases import find_mlflow
        from flows.service.settings import read_settings

        address = os.environ.get(_BACKEND) or find_mlflow(read_settings())
    return address if removal.has_run(address, run_id) else None
