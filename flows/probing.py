"""The probes of a run: further held-out sets that show what the new model forgot."""

from pathlib import Path

from schemas.artifacts import DatasetRef, ModelRef, ProbesRef
from schemas.config import RunConfig
from tasks.caching import run_stage
from tasks.storage import digest_file


def prepare_probes(config: RunConfig, base_model: ModelRef, dataset: DatasetRef, run: str) -> ProbesRef | None:
    """Make the examples of the probes; None where there is none."""
    from tasks.probing import task as probing  # not at the top: a worker imports the flows only to cancel a run

    probes = config.evaluation.probes
    if not probes:
        return None
    template = config.model.chat_template
    ref: ProbesRef = run_stage(
        probing.prepare_probes,
        probes,
        probing.digest_probes(probes),
        base_model,
        dataset,
        config.tokenization,
        chat_template=template,
        template_file_digest=digest_template(template),
        seed=config.seed,
        parent_run_id=run,
    ).result()
    return ref


def digest_template(template: str | None) -> str | None:
    """Return the digest of a template's file, where it is one: it may change under its name."""
    return digest_file(Path(template)) if template and Path(template).is_file() else None
