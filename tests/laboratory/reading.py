"""What a home's tracking database says that runs have left."""

import json
from pathlib import Path
from typing import Any

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
            report = client.download_artifacts(run.info.run_id, "run_report.json")
            accounting.append(json.loads(Path(report).read_text(encoding="utf-8"))["dataset"])
    return {
        "adapters": sorted(adapters),
        "accounting": accounting,
        "statuses": [run.info.status for run in runs],
        "versions": len(client.search_model_versions(f"name = '{name}'")),
    }
