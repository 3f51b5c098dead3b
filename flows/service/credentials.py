"""Credentials made at first start, and the environment of clients and workers: files that only their owner reads."""

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from flows.service.settings import ServiceSettings

_USER = "admin"
_OWNER_ONLY = 0o600


@dataclass(frozen=True)
class Credentials:
    """One log-in for both servers."""

    user: str
    password: str
    cookie_key: str
    """Signs the MLflow pages' cookies; the same for all of its processes."""
    is_new: bool = field(default=False, compare=False)
    """Whether it was made just now, and has not been told to anybody yet."""


def credentials_file(folder: Path) -> Path:
    """Return where the log-in is kept."""
    return folder / "credentials.env"


def client_file(folder: Path) -> Path:
    """Return the file that a shell sources to work with the servers."""
    return folder / "client.env"


def load_credentials(folder: Path) -> Credentials:
    """Read the log-in, made at random when there is none yet."""
    path = credentials_file(folder)
    is_new = not path.is_file()
    if is_new:
        made = {
            "SFT_USER": _USER,
            "SFT_PASSWORD": secrets.token_urlsafe(18),
            "SFT_COOKIE_KEY": secrets.token_urlsafe(32),
        }
        write_private(path, made)
    values = read_variables(path)
    return Credentials(values["SFT_USER"], values["SFT_PASSWORD"], values["SFT_COOKIE_KEY"], is_new)


def client_variables(settings: ServiceSettings, credentials: Credentials | None) -> dict[str, str]:
    """Return the environment of everything that talks to the servers."""
    variables = {
        "PREFECT_API_URL": f"{settings.prefect_url}/api",
        "PREFECT_UI_URL": settings.page(settings.prefect_port),
        "MLFLOW_TRACKING_URI": settings.mlflow_url,
    }
    if credentials is not None:
        variables |= {
            "PREFECT_API_AUTH_STRING": f"{credentials.user}:{credentials.password}",
            "MLFLOW_TRACKING_USERNAME": credentials.user,
            "MLFLOW_TRACKING_PASSWORD": credentials.password,
        }
    return variables


def write_private(path: Path, variables: dict[str, str]) -> None:
    """Write NAME=value lines with mode 600 from the first byte on, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(f"{name}={value}\n" for name, value in variables.items())
    new.replace(path)


def read_variables(path: Path) -> dict[str, str]:
    """Read NAME=value lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)
