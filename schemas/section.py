"""What the sections of the configuration have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict


def _number_fields(schema: dict[str, Any]) -> None:
    """Give every property its place, so that the Prefect form keeps the order of definition."""
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


class Section(BaseModel):
    """Base of all sections: closed, frozen, attribute docstrings become the form's help texts."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra=_number_fields,
        allow_inf_nan=False,
    )
