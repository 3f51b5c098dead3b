"""What the sections of the configuration have in common."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


def _number_fields(schema: dict[str, Any], model: type["Section"]) -> None:
    """Give every property its place in the Prefect form: what most people change, then the order of definition."""
    fields = schema.get("properties", {})
    for position, name in enumerate(dict.fromkeys((*model.shown_first, *fields))):
        fields[name]["position"] = position


class Section(BaseModel):
    """Base of all sections: closed, frozen, attribute docstrings become the form's help texts."""

    shown_first: ClassVar[tuple[str, ...]] = ()
    """Fields that the form begins with: Prefect's form shows all, and folds nothing."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra=_number_fields,
        allow_inf_nan=False,
    )
