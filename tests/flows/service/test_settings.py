"""Servers are on this machine only unless asked otherwise, and then they ask for a log-in."""

from pathlib import Path

import pytest

from flows.service.settings import ServiceError, read_settings


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_HOME", str(tmp_path))


def test_the_default_is_this_machine_with_a_log_in(tmp_path: Path) -> None:
    settings = read_settings({})
    assert (settings.host, settings.prefect_port, settings.mlflow_port) == ("127.0.0.1", 4200, 5000)
    assert settings.auth is True
    assert settings.database_url is None
    assert settings.folder == tmp_path / "service"
    assert settings.artifacts == str(tmp_path / "artifacts")


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "::", "gpu-box.example.org"])
def test_beyond_this_machine_a_log_in_is_asked_for_and_cannot_be_turned_off(host: str) -> None:
    assert read_settings({"SFT_HOST": host}).auth is True
    with pytest.raises(ServiceError, match="SFT_AUTH = off with SFT_HOST"):
        read_settings({"SFT_HOST": host, "SFT_AUTH": "off"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1", "localhost"])
def test_on_this_machine_the_log_in_can_be_turned_off(host: str) -> None:
    assert read_settings({"SFT_HOST": host}).auth is True
    assert read_settings({"SFT_HOST": host, "SFT_AUTH": "off"}).auth is False


def test_a_server_on_all_addresses_is_reached_here_by_loopback_and_elsewhere_by_its_name() -> None:
    settings = read_settings({"SFT_HOST": "0.0.0.0", "SFT_PUBLIC_HOST": "sft.example.org"})
    assert settings.prefect_url == "http://127.0.0.1:4200"
    assert settings.public_host == "sft.example.org"


def test_an_ipv6_address_is_written_in_brackets() -> None:
    settings = read_settings({"SFT_HOST": "::1"})
    assert settings.mlflow_url == settings.page(5000) == "http://[::1]:5000"


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_a_wrong_port_is_refused_by_its_variable(port: str) -> None:
    with pytest.raises(ServiceError, match="SFT_MLFLOW_PORT"):
        read_settings({"SFT_MLFLOW_PORT": port})


def test_a_database_that_is_not_postgresql_is_refused_without_repeating_its_password() -> None:
    with pytest.raises(ServiceError, match="SFT_DATABASE_URL begins with 'mysql'") as caught:
        read_settings({"SFT_DATABASE_URL": "mysql://me:hunter2@db/sft"})
    assert "hunter2" not in str(caught.value)


def test_the_servers_answer_to_their_own_names_and_pages() -> None:
    settings = read_settings({})
    assert settings.hosts == ["127.0.0.1", "localhost"]
    assert settings.origins(4200) == ["http://127.0.0.1:4200", "http://localhost:4200"]
    assert read_settings({"SFT_HOST": "::1"}).hosts == ["[::1]", "localhost"]
    beyond = read_settings({"SFT_HOST": "0.0.0.0", "SFT_PUBLIC_HOST": "Box.example.org"})
    assert beyond.hosts == ["127.0.0.1", "box.example.org", "localhost"]
    assert read_settings({"SFT_HOST": "10.1.2.3"}).hosts == ["10.1.2.3"]


def test_a_reverse_proxys_pages_are_let_in_by_name() -> None:
    settings = read_settings({"SFT_ALLOWED_ORIGINS": "https://prefect.example.org, https://mlflow.example.org:8443"})
    assert settings.hosts == ["127.0.0.1", "localhost", "mlflow.example.org", "prefect.example.org"]
    assert "https://prefect.example.org" in settings.origins(4200)
    assert "https://mlflow.example.org:8443" in settings.origins(4200)


@pytest.mark.parametrize(
    "origin", ["prefect.example.org", "*", "https://a.org/", "https://a.org/api", "ftp://a.org", "null"]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ServiceError, match="SFT_ALLOWED_ORIGINS"):
        read_settings({"SFT_ALLOWED_ORIGINS": origin})
