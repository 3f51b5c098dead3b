"""The settings' page is that of the configuration model."""

from docs.settings_page import PAGE, make_page
from schemas.config import RunConfig


def test_page_is_that_of_the_model() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page(), "make it anew: .venv/bin/python -m docs.settings_page"


def test_every_setting_has_its_row_with_default_and_bounds() -> None:
    page = make_page()
    for section in ("model", "data", "tokenization", "training", "merge", "evaluation", "registry"):
        for name in type(getattr(RunConfig.model_validate(_SMALLEST), section)).model_fields:
            assert f"| `{section}.{name}` |" in page
    assert (
        "| `training.rank` | whole number, at least 1, at most 1,024 | `64` | Rank r of the adapter matrices. |" in page
    )
    assert "| `data.eval_source` | text | empty |" in page
    assert "| `registry.gate` | [a section](#registrygate) |" in page
    assert "| `evaluation.probes.max_loss` | number, at least 0 | must be given |" in page


_SMALLEST = {"model": {"base_model": "m"}, "data": {"source": "d"}}
