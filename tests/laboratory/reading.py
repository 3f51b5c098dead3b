"""What a home's tracking database says that runs have left."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow.exceptions import MlflowException

from schemas.artifacts import AdapterRef
from tasks import tracking


def read_outcome(name: str) -> dict[str, Any]:
    """Return the adapters' digests, the accounting of finished runs, the runs' statuses, and the number of versions.

    A run that ended before it made its experiment has left nothing: no runs and no versions.
    """
    client = tracking.client()
    experiment = client.get_experiment_by_name(name)
    experiments = [] if experiment is None else [experiment.experiment_id]
    runs = client.search_runs(experiments, f"tags.`{tracking.CONFIG_TAG}` LIKE '%'") if experiments else []
    adapters, accounting = set(), []
    for run in runs:
        if run.info.status == "FINISHED":
            adapter = tracking.recall(run.info.run_id, "train", AdapterRef)
            adapters.add(adapter.digest if adapter else "none")
            accounting.append(_read_accounting(str(run.info.run_id)))
    return {
        "adapters": sorted(adapters),
        "accounting": accounting,
        "statuses": [run.info.status for run in runs],
        "versions": len(client.search_model_versions(f"name = '{name}'")),
    }


def _read_accounting(run_id: str) -> dict[str, Any] | None:
    """Return where a finished run's rows went, or None where its report is lost."""
    try:
        with TemporaryDirectory() as folder:
            report = tracking.client().download_artifacts(run_id, "run_report.json", folder)
            dataset: dict[str, Any] = json.loads(Path(report).read_text(encoding="utf-8"))["dataset"]
    except (OSError, MlflowException, ValueError):
        return None
    return dataset
