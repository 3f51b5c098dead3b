"""Old runs leave MLflow and Prefect with files and rows; what a version or an unfinished run needs stays."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows import record_cleaning
from flows.cli import app
from flows.record_cleaning import Survey, clean_up, survey
from tasks import caching, storage, tracking
from tasks.registry import promotion, versions
from tasks.tracking import removal
from tests.laboratory.month import STAGES, Stage, Template, measure_home, pass_days, record_run

MODEL = "bounded"
# In a process of its own, for Prefect reads where its database is once; one for both tests, for it has to import much.
_LIFE = """
import json, os, sqlite3, tempfile, time
from contextlib import closing
from pathlib import Path
os.environ["PREFECT_SERVER_EVENTS_RETENTION_PERIOD"] = "P2D"
from flows.console import prepare_environment
prepare_environment(cache=True)
from flows.flow_run_records import delete_flow_runs, find_old_flow_runs
from tests.laboratory.month import STAGES, Stage, Template, live, pass_days, record_flow_runs
home = Path(os.environ["SFT_HOME"])
template = Template("x", Path("."), {})
record_flow_runs(template, 3)
pass_days(home, 11)
record_flow_runs(template, 1)
before = time.time() - 10 * 86400
old = find_old_flow_runs(before, set())
kept = find_old_flow_runs(before, {str(old[0])})
delete_flow_runs(kept)
with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as database:
    tables = ("flow_run", "task_run", "log", "artifact", "events")
    counts = {name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}
print(json.dumps([len(old), len(kept), counts]), flush=True)
with tempfile.TemporaryDirectory() as folder:
    model = Path(folder) / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"x" * 300_000)
    (model / "config.json").write_text("{}")
    template = Template("bounded", model, {name: Stage({"a": "1"}) for name in STAGES})
    for _, after in live(template, days=7, runs=1, keep_days=2.5, keep_versions=1):
        print(json.dumps(after), flush=True)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "home"


@pytest.fixture
def template(tmp_path: Path) -> Template:
    model = tmp_path / "template" / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"x" * 300_000)
    (model / "config.json").write_text("{}")
    return Template(MODEL, model, {name: Stage({"a": "1"}) for name in STAGES})


def _find(*, days: float = 10, **others: object) -> Survey:
    given: dict[str, object] = {"runs": None, "versions": None, "interrupted": False, **others}
    return survey(days=days, **given)  # type: ignore[arg-type]


def _old(found: Survey) -> set[str]:
    return {run.run_id for run in found.plan.old}


def _rows(home: Path, run_id: str) -> int:
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        tables = {"runs": "run_uuid", "params": "run_uuid", "metrics": "run_uuid", "tags": "run_uuid"}
        tables |= {"logged_models": "source_run_id", "inputs": "source_id"}
        return sum(
            database.execute(f"SELECT count(*) FROM {table} WHERE {column} = ?", (run_id,)).fetchone()[0]
            for table, column in tables.items()
        )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _child(run_id: str, stage: str) -> str:
    client = tracking.client()
    experiments = [each.experiment_id for each in client.search_experiments()]
    query = f"tags.`{tracking.PARENT_TAG}` = '{run_id}' AND tags.`{tracking.STAGE_TAG}` = '{stage}'"
    return str(client.search_runs(experiments, query)[0].info.run_id)


def test_a_run_goes_with_rows_files_versions_and_kept_results(home: Path, template: Template) -> None:
    first, second = record_run(template, 1), record_run(template, 2)
    train = _child(first, "train")
    (home / "results").mkdir()
    (home / "results" / "key").write_text(f'{{"uri": "runs:/{train}/train"}}')
    assert _old(_find()) == set()
    pass_days(home, 11)
    assert _old(_find()) == set(), "all versions stay"
    found = _find(versions=1)
    assert _old(found) == {first}
    assert found.sizes()["MLflow run"][0] > 300_000
    assert any(f"{MODEL}/1" in line for line in found.describe())
    clean_up(found)
    for run_id in (first, train):
        assert _rows(home, run_id) == 0
        assert tracking.is_deleted(run_id)
        assert not (home / "artifacts" / run_id).exists()
    assert not (home / "results" / "key").exists()
    assert not (home / "runs" / first).exists()
    assert _rows(home, second) > 0
    left = tracking.client().search_model_versions(f"name = '{MODEL}'")
    assert [str(version.version) for version in left] == ["2"]
    assert len(list((home / "artifacts" / "models").iterdir())) == 1


def test_champions_of_any_time_aliases_marked_versions_and_their_runs_stay(home: Path, template: Template) -> None:
    runs = [record_run(template, number) for number in range(6)]
    client = tracking.client()
    for number in ("1", "2"):
        client.set_model_version_tag(MODEL, number, versions.PARITY_TAG, "passed")
        champion = versions.read_alias(MODEL, "champion")
        promotion.promote_version(MODEL, number, expected=champion, who="me", why="because", force=True)
    client.delete_registered_model_alias(MODEL, "previous")  # version 1 is known from the trail only
    client.set_registered_model_alias(MODEL, "mine", "3")
    client.set_model_version_tag(MODEL, "4", "sft.keep", "demo of March")
    pass_days(home, 11)
    assert _old(_find(versions=0)) == {runs[4], runs[5]}
    assert _old(_find(versions=1)) == {runs[4]}
    assert _old(_find(versions=0, days=12)) == set()


def test_running_and_resumable_runs_stay_and_their_flow_runs(home: Path, template: Template) -> None:
    killed, held = record_run(template, 1), record_run(template, 2)
    tracking.end_run(killed, "KILLED")
    tracking.set_tags(killed, {"sft.prefect_flow_run": "00000000-0000-0000-0000-000000000001"})
    pass_days(home, 11)
    with storage.hold_run(held):
        found = _find(versions=0)
        assert _old(found) == {held}
        assert found.plan.flow_runs == {"00000000-0000-0000-0000-000000000001"}
        clean_up(found)
        assert not tracking.is_deleted(held), "a process has it"
    assert _old(_find(versions=0, interrupted=True)) == {killed, held}


def test_a_stage_whose_result_another_run_took_stays_as_long_as_that_one(home: Path, template: Template) -> None:
    first, second = record_run(template, 1), record_run(template, 2)
    ingest, train = _child(first, "ingest"), _child(first, "train")
    tracking.set_tags(second, {f"{tracking.TAKES_TAG}{ingest[:8]}": ingest})
    tracking.client().set_registered_model_alias(MODEL, "champion", "2")
    pass_days(home, 11)
    clean_up(_find(versions=0))
    assert [tracking.is_deleted(each) for each in (first, ingest, train)] == [False, False, True]
    tracking.client().delete_registered_model_alias(MODEL, "champion")
    clean_up(_find(versions=0))
    assert all(tracking.is_deleted(each) for each in (first, ingest, second))


def test_runs_marked_from_where_the_database_is_out_of_reach_are_removed_by_a_later_cleaning(
    home: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = record_run(template, 1)
    merge = _child(first, "merge")
    pass_days(home, 11)
    with monkeypatch.context() as patched:
        patched.setattr(record_cleaning, "_find_database", lambda run_id: None)
        found = _find(versions=0)
        clean_up(found)
        assert any("marked as deleted, and go with" in line for line in found.notes())
        assert _find(versions=0).sizes() == {}
    assert _rows(home, first) > 0
    assert len(list((home / "artifacts" / "models").iterdir())) == 1
    found = _find(versions=0)
    assert found.sizes() == {"MLflow run marked before": [0] * (len(STAGES) + 1)}
    clean_up(found)
    assert _rows(home, first) == _rows(home, merge) == 0
    assert list((home / "artifacts" / "models").iterdir()) == []
    assert _find(versions=0).sizes() == {}


def test_what_is_left_of_deleted_versions_is_one_row_and_no_number_is_given_twice(
    home: Path, template: Template
) -> None:
    def versions_left() -> list[tuple[int, str, int]]:
        tags = "SELECT count(*) FROM model_version_tags AS t WHERE t.version = v.version"
        query = f"SELECT version, current_stage, ({tags}) FROM model_versions AS v ORDER BY version"
        with closing(sqlite3.connect(home / "mlflow.db")) as database:
            return database.execute(query).fetchall()

    for number in range(3):
        record_run(template, number)
    pass_days(home, 11)
    clean_up(_find(versions=0))
    assert versions_left() == [(3, "Deleted_Internal", 1)]
    record_run(template, 4)
    assert [(number, stage) for number, stage, _ in versions_left()] == [(3, "Deleted_Internal"), (4, "None")]
    pass_days(home, 11)
    clean_up(_find(versions=0))
    assert versions_left() == [(4, "Deleted_Internal", 1)]


def test_two_cleanings_at_once_remove_the_same_runs(home: Path, template: Template) -> None:
    run = record_run(template, 1)
    pass_days(home, 11)
    one, other = _find(versions=0), _find(versions=0)
    with ThreadPoolExecutor() as pool:
        list(pool.map(clean_up, (one, other)))
    clean_up(one)
    assert _rows(home, run) == 0
    assert list((home / "artifacts" / "models").iterdir()) == []


def test_more_runs_than_asked_for_go_however_young(home: Path, template: Template) -> None:
    runs = [record_run(template, number) for number in range(3)]
    assert _old(_find(versions=0, runs=2)) == {runs[0]}
    assert _old(_find(runs=2)) == set(), "all versions stay"


def test_a_removal_that_was_cut_short_is_finished_by_the_next(
    home: Path, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = record_run(template, 1)
    ingest = _child(first, "ingest")
    pass_days(home, 11)

    def die(location: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(removal, "delete_artifacts", die)
        with pytest.raises(KeyboardInterrupt):
            removal.Remover(tracking.tracking_uri()).remove_run(ingest)
    assert _rows(home, ingest) > 0
    clean_up(_find(versions=0))
    assert _rows(home, ingest) == _rows(home, first) == 0


def test_a_copied_home_deletes_nothing_of_the_one_that_it_was_copied_from(
    home: Path, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_run(template, 1)
    pass_days(home, 11)
    shutil.copytree(home, tmp_path / "copy")
    before = measure_home(home)
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "copy"))
    found = _find(versions=0)
    assert _old(found) == set()
    assert any("outside this home" in line for line in found.notes())
    clean_up(found)
    assert measure_home(home) == before


def test_a_kept_result_of_a_run_that_left_is_none(home: Path, template: Template) -> None:
    run_id = record_run(template, 1)
    ingest = _child(run_id, "ingest")
    from schemas.artifacts import Ref

    found = tracking.client().get_run(ingest).data.tags["sft.result"]
    ref = Ref.model_validate_json(found).model_copy(update={"mlflow_run_id": ingest})
    assert caching._find_loss(ref) is None
    pass_days(home, 11)
    clean_up(_find(versions=0))
    assert "was deleted" in str(caching._find_loss(ref))


def test_a_dry_run_names_each_thing_and_deletes_nothing(home: Path, template: Template) -> None:
    first = record_run(template, 1)
    record_run(template, 2)
    pass_days(home, 11)
    before = _files(home), _rows(home, first)
    said = CliRunner().invoke(app, ["clean", "--days", "10", "--versions", "1", "--dry-run"])
    assert said.exit_code == 0, said.output
    assert "MLflow run: 1 would be deleted, 0." in said.output
    assert f"MLflow run {first} (run 1): 9 MLflow runs, 1 models, " in said.output
    assert (_files(home), _rows(home, first)) == before
    said = CliRunner().invoke(app, ["clean", "--days", "10"])
    assert "2 of a registered version" in said.output
    assert "--versions 20 keeps the newest 20" in said.output


@pytest.mark.parametrize("days", ["inf", "1e300", "nan", "-1", "0"])
def test_days_that_no_calendar_has_are_refused(home: Path, days: str) -> None:
    assert CliRunner().invoke(app, ["clean", "--days", days]).exit_code == 2


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What Prefect holds after old flow runs were deleted; then the bytes of the home on each of seven days."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    home = tmp_path_factory.mktemp("lived") / "home"
    env = {**kept, "SFT_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", _LIFE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", "["))]


@pytest.mark.slow
def test_days_of_runs_take_no_more_room_than_the_days_that_are_kept(lived: list[Any]) -> None:
    """Files, rows of MLflow and rows of Prefect."""
    sizes = lived[1:]
    assert len(sizes) == 7
    for part in ("artifacts", "cache", "runs", "mlflow.db", "prefect"):
        assert sizes[-1][part] <= 1.1 * max(size[part] for size in sizes[:4]), part
    assert sizes[-1]["artifacts"] > 2 * 300_000


@pytest.mark.slow
def test_old_flow_runs_leave_prefect_with_tasks_and_logs(lived: list[Any]) -> None:
    found, deleted, counts = lived[0]
    assert (found, deleted) == (3, 2)
    assert counts == {"flow_run": 2, "task_run": 22, "log": 76, "artifact": 2, "events": 55}
