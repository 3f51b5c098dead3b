"""SFT_HOME moves everything that a run leaves, Prefect's database too, unless the user has a place for that."""

from pathlib import Path

import pytest

from flows.environment import DATABASE_VARIABLE, run_defaults


def test_prefects_database_lies_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    monkeypatch.setenv("SFT_HOME", str(tmp_path))
    assert run_defaults()[DATABASE_VARIABLE] == f"sqlite+aiosqlite:///{tmp_path}/prefect/prefect.db"


def test_a_prefect_home_of_the_users_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert DATABASE_VARIABLE not in run_defaults()
