"""Settings that libraries read at import, for every test."""

import os

from tasks.lean_imports import shorten_imports

shorten_imports()
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait do not spin on a busy machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
