"""What is installed is what was locked; what is known against it is found; a release says what it is made of."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from deploy.supply.audit import find_known, main, read_locks
from deploy.supply.install import BUILDERS, LOCK, ROOT, TORCH_LOCK, is_own_build, select
from deploy.supply.lock import split_lock

# Of the tested set, but not what a fresh environment gets: another extra, and tools of the tests' own machine.
_NOT_LOCKED = {"trl", "execnet", "pytest-xdist", "torch"}


def _advise(**affected: Any) -> dict[str, Any]:
    package = {"ecosystem": "PyPI", "name": "Some_Package"}
    return {"id": "A-1", "summary": "it is open", "affected": [{"package": package, **affected}]}


def _span(*events: dict[str, str]) -> dict[str, Any]:
    return {"ranges": [{"type": "ECOSYSTEM", "events": list(events)}]}


def test_the_locks_have_the_tested_versions_each_with_a_hash() -> None:
    locked = read_locks((TORCH_LOCK, LOCK))
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    differ = {name: version for name, version in tested.items() if locked.get(name) != version}
    assert {name: version for name, version in differ.items() if name not in _NOT_LOCKED} == {}, "make lock"
    for lock in (TORCH_LOCK, LOCK):
        entries = re.split(r"^(?=\w)", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
        assert [entry for entry in entries if "--hash=sha256:" not in entry] == []


def test_torch_and_what_it_needs_for_cuda_is_parted_from_the_rest() -> None:
    lock = "torch==2 \\\n    --hash=a\nnvidia-ml-py==1 \\\n    --hash=b\nnvidia-nccl-cu13==3 \\\n    --hash=c\nx==1\n"
    assert split_lock(lock) == (
        "torch==2 \\\n    --hash=a\nnvidia-nccl-cu13==3 \\\n    --hash=c\n",
        "nvidia-ml-py==1 \\\n    --hash=b\nx==1\n",
    )
    assert select("a==1 \\\n    --hash=a\nwheel==1 \\\n    --hash=b\n", BUILDERS) == "wheel==1 \\\n    --hash=b\n"


@pytest.mark.parametrize(
    ("version", "url", "own"),
    [
        ("2.13.0+cpu", "file:///wheels/torch-2.13.0%2Bcpu.whl", True),
        ("2.13.0+cpu", "https://mirror.example/torch.whl", True),
        ("2.13.0+cpu", "https://public.example/packages/torch.whl", False),
        ("2.13.0", "https://mirror.example/torch.whl", False),
    ],
)
def test_only_a_build_that_the_index_cannot_serve_goes_without_a_hash(version: str, url: str, own: bool) -> None:
    settings = "global.extra-index-url='https://mirror.example/simple'\n"
    assert is_own_build({"metadata": {"version": version}, "download_info": {"url": url}}, settings) is own


def test_a_file_that_is_not_the_locked_one_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "six-1.17.0-py2.py3-none-any.whl"
    with zipfile.ZipFile(other, "w") as wheel:
        wheel.writestr("six.py", "raise SystemExit('not six')")
        wheel.writestr("six-1.17.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: six\nVersion: 1.17.0\n")
        wheel.writestr("six-1.17.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py2-none-any\n")
    (tmp_path / "six.lock").write_text(select(LOCK.read_text(encoding="utf-8"), ("six",)))
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", str(tmp_path), "--target"]
    command += [str(tmp_path / "there"), "--require-hashes", "--no-deps", "-r", str(tmp_path / "six.lock")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("affected", "versions"),
    [
        ({"versions": ["1.5"]}, ["1.5"]),
        (_span({"introduced": "0"}, {"fixed": "1.5"}), ["0.1", "1.4"]),
        (_span({"introduced": "1.4"}, {"last_affected": "1.5"}), ["1.4", "1.5"]),
        (_span({"introduced": "0"}, {"fixed": "0.5"}, {"introduced": "1.5"}), ["0.1", "1.5", "1.10"]),
        (_span({"introduced": "0"}), ["0.1", "1.4", "1.5", "1.10"]),
        ({"ranges": [{"type": "GIT", "events": [{"introduced": "0"}]}]}, []),
    ],
)
def test_an_advisory_holds_for_the_versions_that_it_names(affected: dict[str, Any], versions: list[str]) -> None:
    known = [v for v in ("0.1", "1.4", "1.5", "1.10") if find_known({"some-package": v}, [_advise(**affected)])]
    assert known == versions


def test_withdrawn_advisories_and_other_ecosystems_hold_for_none() -> None:
    packages = {"some-package": "1"}
    assert find_known(packages, [_advise(versions=["1"]) | {"withdrawn": "2026-01-01T00:00:00Z"}]) == []
    other = _advise(versions=["1"])
    other["affected"][0]["package"]["ecosystem"] = "npm"
    assert find_known(packages, [other]) == []


def _make_record(**changes: Any) -> dict[str, Any]:
    """Return a record as PyPA has nearly all of its own: no summary, commits and versions, a list of these."""
    commits = {"type": "GIT", "repo": "https://example.org/some", "events": [{"introduced": "0"}, {"fixed": "b04177"}]}
    span = {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.11.3"}]}
    return {
        "id": "PYSEC-1",
        "modified": "2021-02-09T00:00:00Z",
        "published": "2021-02-01T20:15:00Z",
        "aliases": ["CVE-1", "GHSA-1"],
        "details": "It is\n  open. " + "And more. " * 40,
        "affected": [
            {
                "package": {"name": "some-package", "ecosystem": "PyPI", "purl": "pkg:pypi/some-package"},
                "ranges": [commits, span],
                "versions": ["2.11.1", "2.11.2", "not-a-version"],
            }
        ],
        "references": [{"type": "WEB", "url": "https://example.org"}],
        **changes,
    }


def test_records_as_databases_have_them_give_one_line_each_in_words() -> None:
    # The same vulnerability from another database, and what the schema lets be null or absent.
    twin = _make_record(id="GHSA-1", aliases=["CVE-1", "PYSEC-1"])
    bare: dict[str, Any] = {"id": "PYSEC-2", "affected": [{"package": None, "ranges": None}, {"ranges": None}]}
    (found,) = find_known({"some-package": "2.11.2"}, [_make_record(), twin, bare, {"id": "X", "affected": None}])
    assert (found.advisory, found.aliases, found.fixed) == ("GHSA-1", ("CVE-1", "PYSEC-1"), ("2.11.3",))
    assert found.summary.startswith("It is open. And more.")
    assert len(found.summary) == 160
    assert find_known({"some-package": "2.11.3"}, [_make_record(), twin]) == []


def test_versions_and_ecosystems_may_be_spelled_otherwise() -> None:
    record = _make_record()
    record["affected"][0] |= {"versions": ["3.0.0"], "ranges": []}
    record["affected"][0]["package"]["ecosystem"] = "PyPI:https://mirror.example/simple"
    assert [each.version for each in find_known({"some-package": "3.0"}, [record])] == ["3.0"]


def test_a_folder_of_yaml_is_a_database_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "vulns" / "jinja2"
    place.mkdir(parents=True)
    record = _make_record()
    record["affected"][0] |= {"ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}]}], "versions": []}
    record["affected"][0]["package"]["name"] = "Jinja2"
    (place / "PYSEC-1.yaml").write_text(yaml.safe_dump(record))
    assert main(["--osv", str(tmp_path)]) == 1
    assert "PYSEC-1 (CVE-1, GHSA-1): It is open." in capsys.readouterr().out
    (place / "PYSEC-2.yaml").write_text("a: [")
    assert main(["--osv", str(tmp_path)]) == 2


def test_the_locked_set_is_compared_with_a_database_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = read_locks((LOCK,))["jinja2"]
    open_one = _advise(**_span({"introduced": "0"}, {"fixed": "99"}))
    open_one["affected"][0]["package"]["name"] = "Jinja2"
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as database:
        database.writestr("A-1.json", json.dumps(open_one))
    assert main(["--osv", str(tmp_path / "all.zip")]) == 1
    said = capsys.readouterr().out
    assert f"jinja2 {version}: A-1: it is open; mended in 99" in said
    (tmp_path / "empty").mkdir()
    assert main(["--osv", str(tmp_path / "empty")]) == 2
    (tmp_path / "broken.zip").write_bytes(b"PK")
    assert main(["--osv", str(tmp_path / "broken.zip")]) == 2
    assert capsys.readouterr().out.count("Nothing was compared") == 2


def test_a_release_says_what_it_is_made_of(tmp_path: Path) -> None:
    bill = tmp_path / "sbom.cdx.json"
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", str(ROOT / "pyproject.toml")]
    command += ["--output-reproducible", "--no-validate", "-o", str(bill), sys.executable]
    subprocess.run(command, check=True, capture_output=True)
    values = json.loads(bill.read_text(encoding="utf-8"))
    # The check of a link takes tens of milliseconds, and a package has several: those of every tenth are checked.
    for number, component in enumerate(values["components"]):
        if number % 10:
            component.pop("externalReferences", None)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(values)) is None
    assert values["metadata"]["component"]["name"] == "sft-pipeline"
    there: dict[str, str] = {
        canonicalize_name(component["name"]): component["version"] for component in values["components"]
    }
    locked = read_locks((LOCK,))
    for name in ("prefect", "mlflow", "transformers", "peft", "pandera", "safetensors"):
        assert there[name] == locked[name]
    assert there["torch"].partition("+")[0] == read_locks((TORCH_LOCK,))["torch"]
    values["components"][0]["type"] = "nonsense"
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(values)) is not None
