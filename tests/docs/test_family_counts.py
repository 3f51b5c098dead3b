"""What README and docs say of how many families there are is what the table of families has."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_families_are_as_many_as_the_table_has() -> None:
    lines = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    engines = [line.split("|")[2].strip() for line in lines if line.startswith("| `")]
    assert set(engines) == {"fused", "general"}
    assert f"[{len(engines)} families are tested](docs/models.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    speed = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert f"**The fused engine** trains {engines.count('fused')} families" in speed
