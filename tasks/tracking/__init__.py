"""Runs, artifacts and lineage in MLflow: one parent run a pipeline run, one child run a stage.

Every call names its run: MLflow's notion of an active run is a thread's, and tasks change threads.
"""

from tasks.tracking.artifacts import (
    MODEL_SUBFOLDER,
    ArtifactError,
    list_files,
    log_dataset,
    log_file,
    log_folder,
    log_table,
    log_text,
    publish,
    resolve,
)
from tasks.tracking.calls import at_once
from tasks.tracking.connection import client, experiment_link, find_status, get_run, tracking_uri, ui_link, version_link
from tasks.tracking.curves import log_metrics, metric_log, training_curves
from tasks.tracking.runs import (
    CONFIG_FILE,
    CONFIG_TAG,
    PARENT_TAG,
    STAGE_TAG,
    create_parent_run,
    end_run,
    find_interrupted_runs,
    find_runs,
    finish_parent,
    open_experiment,
    recall,
    recorded_config,
    remember,
    reopen_run,
    set_tags,
    stage_run,
)
from tasks.tracking.stopwatch import tracking_time

__all__ = [
    "CONFIG_FILE",
    "CONFIG_TAG",
    "MODEL_SUBFOLDER",
    "PARENT_TAG",
    "STAGE_TAG",
    "ArtifactError",
    "at_once",
    "client",
    "create_parent_run",
    "end_run",
    "experiment_link",
    "find_interrupted_runs",
    "find_runs",
    "find_status",
    "finish_parent",
    "get_run",
    "list_files",
    "log_dataset",
    "log_file",
    "log_folder",
    "log_metrics",
    "log_table",
    "log_text",
    "metric_log",
    "open_experiment",
    "publish",
    "recall",
    "recorded_config",
    "remember",
    "reopen_run",
    "resolve",
    "set_tags",
    "stage_run",
    "tracking_time",
    "tracking_uri",
    "training_curves",
    "ui_link",
    "version_link",
]
