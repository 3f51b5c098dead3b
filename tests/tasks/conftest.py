"""A private SFT_HOME and tracking database for every test of the stages."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tracking_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database a session: creating its tables takes seconds."""
    return tmp_path_factory.mktemp("tracking") / "home"


@pytest.fixture
def tracked(tracking_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point SFT_HOME at the session's tracking database."""
    monkeypatch.setenv("SFT_HOME", str(tracking_home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tracking_home
