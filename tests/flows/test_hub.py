"""What an upload would do is said without the hub, and names that it takes none of are refused."""

from pathlib import Path

import pytest

from flows.hub import describe_upload, upload
from tasks.exporting.errors import ExportError


def test_a_dry_run_names_every_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "x.gguf").write_bytes(b"x" * 2**20)
    (tmp_path / "sub" / "Modelfile").write_text("FROM ./x.gguf\n")
    lines = describe_upload(tmp_path, "me/demo").splitlines()
    assert lines[0] == "Would upload 2 files, 1.00 MiB, to the private repository me/demo:"
    assert [line.split()[-1] for line in lines[1:]] == ["sub/Modelfile", "x.gguf"]


@pytest.mark.parametrize("name", ["demo", "a/b/c", "me/../x", "/x", "me/ x"])
def test_a_name_that_is_none_is_refused_before_the_hub_is_asked(tmp_path: Path, name: str) -> None:
    for do in (lambda: describe_upload(tmp_path, name), lambda: upload(tmp_path, name, "demo/1")):
        with pytest.raises(ExportError, match="OWNER/NAME is wanted"):
            do()
