"""The log-in is made once, at random, for its owner's eyes only."""

from pathlib import Path

from flows.service.credentials import client_variables, load_credentials, read_variables, write_private
from flows.service.lifecycle import Service
from flows.service.settings import read_settings


def test_the_log_in_is_made_once_with_mode_600(tmp_path: Path) -> None:
    first = load_credentials(tmp_path)
    assert (tmp_path / "credentials.env").stat().st_mode & 0o777 == 0o600
    assert len(first.password) >= 24
    assert first.is_new
    assert load_credentials(tmp_path) == first
    assert not load_credentials(tmp_path).is_new
    assert load_credentials(tmp_path / "other").password != first.password


def test_a_file_that_others_could_read_is_replaced_by_one_they_cannot(tmp_path: Path) -> None:
    path = tmp_path / "client.env"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, {"A": "1", "B": "x=y"})
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_variables(path) == {"A": "1", "B": "x=y"}


def test_clients_get_the_log_in_only_where_one_is_asked_for(tmp_path: Path) -> None:
    settings = read_settings({"SFT_HOST": "0.0.0.0", "SFT_PUBLIC_HOST": "box"})
    login = load_credentials(tmp_path)
    assert client_variables(settings, login) == {
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
        "PREFECT_UI_URL": "http://box:4200",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
        "PREFECT_API_AUTH_STRING": f"admin:{login.password}",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": login.password,
    }
    assert "PREFECT_API_AUTH_STRING" not in client_variables(settings, None)


def test_a_new_password_is_told_once_and_to_a_person_only(tmp_path: Path) -> None:
    made = {"prefect_page": "http://127.0.0.1:4200", "mlflow_page": "http://127.0.0.1:5000", "seconds": 1.0}
    service = Service(**made, user="admin", folder=tmp_path, new_password="secret-1")  # type: ignore[arg-type]
    assert "secret-1" in "\n".join(service.describe(show_password=True))
    assert "secret-1" not in "\n".join(service.describe())
    later = Service(**made, user="admin", folder=tmp_path)  # type: ignore[arg-type]
    assert f"SFT_PASSWORD in {tmp_path / 'credentials.env'}" in "\n".join(later.describe(show_password=True))
