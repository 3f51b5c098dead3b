"""Imports what worker processes need, once, in the process that they are forked from; nothing else imports this module.

There is a worker for each core, so each may use one thread. transformers imports torch wherever it is found, which
takes longer than everything else here; workers run no model.
"""

import os

from tasks.lean_imports import leave_torch_out, shorten_imports

_ONE_CORE = ("POLARS_MAX_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

os.environ.update(dict.fromkeys(_ONE_CORE, "1"), TOKENIZERS_PARALLELISM="false")
shorten_imports()
leave_torch_out()

import tasks.ingestion.shard_runner  # noqa: E402
import tasks.tokenization.shards  # noqa: E402, F401
from tasks import garbage  # noqa: E402

garbage.freeze_heap()
