"""Exports of a version: versions of a registered model of their own, NAME-FORM, that name their parent.

The parent's aliases are not touched, and an export has none until somebody gives it one: who asks for NAME@champion
gets the model that the gate judged, and not a smaller one.
"""

from collections.abc import Mapping

import mlflow
from mlflow.entities.model_registry import ModelVersion

from tasks import tracking
from tasks.registry.versions import GATE_TAG, MODEL_TAG, PARITY_TAG, REASONS_TAG, RUN_TAG, VERSION_TAG, find_version

PARENT_TAG, FORM_TAG = "sft.parent", "sft.form"
_TAKEN_OVER = (
    *(RUN_TAG, GATE_TAG, "sft.dataset", "sft.dataset_digest", "sft.source_digest"),
    *("sft.base_model", "sft.base_model_revision", "sft.base_model_digest", "sft.template_digest"),
)
"""What an export says of where it comes from is what its parent says."""


def name_export(name: str, form: str) -> str:
    """Return the registered model that holds exports of this form."""
    return f"{name}-{form}"


def find_export(name: str, version: str, form: str) -> ModelVersion | None:
    """Return the newest export of a version in a form, or None."""
    found = find_version(name_export(name, form), PARENT_TAG, f"{name}/{version}")
    return found if found is not None and MODEL_TAG in found.tags else None


def register_export(
    parent: Mapping[str, str],
    *,
    name: str,
    version: str,
    form: str,
    uri: str,
    digest: str,
    run_id: str,
    proof: str,
    description: str,
) -> str:
    """Register an export that was proven; return NAME-FORM/VERSION.

    Args:
        parent: tags of the version that it was made of.
        name: of the parent.
        version: of the parent.
        form: of the export.
        uri: of its folder.
        digest: of its folder.
        run_id: that made it.
        proof: in a sentence.
        description: Markdown.
    """
    registered, client = name_export(name, form), tracking.client()
    try:
        client.create_registered_model(registered, description=f"{name} as {form}, beside [{name}](#/models/{name})")
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        **{tag: parent[tag] for tag in _TAKEN_OVER if tag in parent},
        PARENT_TAG: f"{name}/{version}",
        FORM_TAG: form,
        MODEL_TAG: digest,
        PARITY_TAG: f"passed: {proof}",
        REASONS_TAG: f"{form} of {name}/{version}: {proof}",
    }
    made = client.create_model_version(registered, source=uri, run_id=run_id, tags=tags, description=description)
    address = f"{registered}/{made.version}"
    tracking.set_tags(run_id, {VERSION_TAG: address})
    return address
