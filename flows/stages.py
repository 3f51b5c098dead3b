"""The doors of the pipeline's stages. Who imports this module loads torch, transformers and all that stages work with.

The flows import it in their bodies and not at the top: a worker imports a flow's module only to cancel a run, and must
not load for seconds first what it never uses.
"""

from tasks.evaluation.gate import check_settings
from tasks.evaluation.task import compare_models, foresee
from tasks.ingestion.task import ingest, locate_dataset, locate_model
from tasks.merging.task import merge
from tasks.registry.task import register
from tasks.tokenization.task import log_quality, tokenize

__all__ = [
    "check_settings",
    "compare_models",
    "foresee",
    "ingest",
    "locate_dataset",
    "locate_model",
    "log_quality",
    "merge",
    "register",
    "tokenize",
]
