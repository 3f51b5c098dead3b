"""`sft export`: a registered version in another form, proven against the version, as a version of its own."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.targets import VersionFacts, describe_version, fetch_version
from schemas.artifacts import Delta, Ref
from schemas.config import RunConfig
from tasks import storage, tracking
from tasks.evaluation.comparison import compare
from tasks.evaluation.conversations import find_conversations
from tasks.evaluation.scoring import evaluate_sets
from tasks.exporting.errors import ExportError
from tasks.exporting.forms import FORMS, Form
from tasks.exporting.proof import ExportProof, prove_export, read_examples
from tasks.exporting.stops import read_stops
from tasks.partitions import copy_table
from tasks.registry.exports import find_export, register_export
from tasks.registry.versions import MODEL_TAG, RUN_TAG
from tasks.tokenization.examples import tokenize_dataset
from tasks.tokenization.templates import prepare_tokenizer

PROOF_FILE = "proof.json"


@dataclass(frozen=True)
class Exported:
    """An export that was proven, and where it is."""

    parent: str
    form: str
    version: str
    """NAME-FORM/VERSION"""
    folder: Path
    """In the cache of this machine."""
    num_bytes: int
    parent_bytes: int
    proof: ExportProof
    num_examples: int
    """Held-out rows that both answered."""
    before: dict[str, float]
    """Metrics of the parent, on this machine."""
    delta: dict[str, Delta]
    """Export minus parent."""
    notes: tuple[str, ...]
    is_new: bool = True
    """False where it had been registered before."""

    def as_values(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        delta = {name: value.model_dump() for name, value in self.delta.items()}
        return {**asdict(self), "folder": str(self.folder), "delta": delta}


def export_version(
    target: str,
    form: str,
    *,
    least_agreement: float | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Exported:
    """Write a version in a form, prove it, and register it; the same export is not made twice.

    Args:
        target: NAME (its champion), NAME/VERSION or NAME@alias; empty for the only champion.
        form: of FORMS.
        least_agreement: part of the greedy tokens that have to be the parent's; None: the form's own.
        on_phase: is told what is being done.

    Raises:
        ExportError: it cannot be written so, or is too far from its parent: nothing is registered then.
    """
    if form not in FORMS:
        raise ExportError(f"--format {form}: there are {', '.join(FORMS)}")
    facts = describe_version(target)
    if (known := find_export(facts.name, facts.version, form)) is not None:
        ref = Ref(uri=str(known.source), digest=known.tags[MODEL_TAG])
        return _read(tracking.resolve(ref), f"{known.name}/{known.version}")
    parent, run = fetch_version(facts.name, facts.version), facts.tags[RUN_TAG]
    with tracking.stage_run(run, f"export-{form}") as run_id, storage.new_folder() as place:
        on_phase(f"Writing {form}")
        made = place / "export"
        made.mkdir()
        notes = FORMS[form].write(parent, made, f"{facts.name}-{facts.version}")
        on_phase("Comparing it with the version")
        found = _prove(parent, made, place, facts, FORMS[form], notes, on_phase)
        _check(found, FORMS[form].least_agreement if least_agreement is None else least_agreement)
        (made / PROOF_FILE).write_text(json.dumps(found.as_values(), indent=2) + "\n", encoding="utf-8")
        uri, digest = tracking.publish(made, run_id, "export")
        tracking.log_metrics(run_id, {"export/kl": found.proof.mean_kl, "export/agreement": found.proof.agreement})
        version = register_export(
            facts.tags,
            name=facts.name,
            version=facts.version,
            form=form,
            uri=uri,
            digest=digest,
            run_id=run_id,
            proof=tell_proof(found.proof),
            description=_describe(found),
        )
    folder = tracking.resolve(Ref(uri=uri, digest=digest))
    return Exported(**{**vars(found), "version": version, "folder": folder})


def tell_proof(proof: ExportProof) -> str:
    """Return what was found in a sentence."""
    return (
        f"{proof.agreement:.1%} of {proof.num_positions:,} greedy tokens agree, "
        f"{proof.acceptance:.1%} where near ties count as equal, KL {proof.mean_kl:.2g} nats a token "
        f"(at most {proof.largest_kl:.2g}), {proof.stop_agreement:.1%} of {proof.num_stops:,} ends of answers are the "
        "same"
    )


def _prove(
    parent: Path,
    made: Path,
    place: Path,
    facts: VersionFacts,
    form: Form,
    notes: tuple[str, ...],
    on_phase: Callable[[str], None],
) -> Exported:
    """Compare an export with its parent on the held-out rows of the parent's dataset."""
    config = RunConfig.model_validate(tracking.recorded_config(facts.tags[RUN_TAG]))
    tokens, conversations = _make_tokens(parent, place, facts, config)
    loadable = form.unfold(parent, made, place / "unfolded")
    proof = prove_export(parent, loadable, read_examples(tokens / "eval.parquet"), read_stops(parent))
    on_phase("Asking both the held-out rows")
    sizes = [sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in (made, parent)]
    before, after = (evaluate_sets(folder, tokens, config.evaluation).rows for folder in (parent, loadable))
    compared = compare(before, after, config.evaluation, seed=config.seed, conversations=conversations)
    return Exported(
        parent=f"{facts.name}/{facts.version}",
        form=form.name,
        version="",
        folder=made,
        num_bytes=sizes[0],
        parent_bytes=sizes[1],
        proof=proof,
        num_examples=compared.num_examples,
        before=compared.before,
        delta=compared.delta,
        notes=notes,
    )


def _make_tokens(parent: Path, place: Path, facts: VersionFacts, config: RunConfig) -> tuple[Path, dict[str, str]]:
    """Make examples of the held-out rows that the version was judged by, with its own tokenizer.

    Raises:
        ExportError: none was held out.
    """
    dataset = tracking.resolve_some(Ref.model_validate_json(facts.tags["sft.dataset"]), "eval.parquet")
    conversations = find_conversations(dataset / "eval.parquet")
    rows = place / "rows"
    rows.mkdir()
    for part in ("train", "eval"):  # the trained ones are not wanted, and a part without rows is an error
        copy_table(dataset / "eval.parquet", rows / f"{part}.parquet")
    prepared = prepare_tokenizer(parent, config.model.chat_template, config.tokenization.template_arguments)
    try:
        tokenize_dataset(rows, prepared, place / "tokens", config.tokenization)
    except ValueError as error:
        raise ExportError(
            f"{facts.name} version {facts.version}: its held-out rows give no example to prove an export on ({error})"
        ) from error
    return place / "tokens", conversations


def _check(found: Exported, least_agreement: float) -> None:
    """Raise ExportError where an export is too far from its parent."""
    proof = found.proof
    if proof.acceptance < least_agreement or proof.stop_agreement < least_agreement:
        raise ExportError(
            f"{found.form} of {found.parent} is not registered: {tell_proof(proof)}, and {least_agreement:.0%} of "
            "tokens, near ties counted as equal, and of ends are wanted: take a form with more bits, or lower "
            "--min-agreement"
        )


def _read(folder: Path, version: str) -> Exported:
    """Return an export that is registered."""
    values = json.loads((folder / PROOF_FILE).read_text(encoding="utf-8"))
    delta = {name: Delta.model_validate(value) for name, value in values["delta"].items()}
    more = {"version": version, "folder": folder, "delta": delta, "notes": tuple(values["notes"]), "is_new": False}
    return Exported(**{**values, **more, "proof": ExportProof(**values["proof"])})


def _describe(found: Exported) -> str:
    """Return the version's description, in Markdown."""
    rows = [f"| {name} | {found.before[name]:.4g} | {d.change} | {d.interval} |" for name, d in found.delta.items()]
    head = ["| metric | parent | change | interval |", "| --- | --- | --- | --- |"]
    told = f"**{found.form} of {found.parent}**: {tell_proof(found.proof)}."
    notes = [f"- Please note: {note}" for note in found.notes]
    return "\n".join([told, "", *notes, "", f"On {found.num_examples:,} held-out rows:", "", *head, *rows]) + "\n"
