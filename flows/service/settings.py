"""Where the servers listen and where they keep things: read from the environment, never from a run's config."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from flows.service.guard import split_list
from tasks import storage

_HTTP = 80  # the port that browsers leave out


class ServiceError(ValueError):
    """The servers cannot be started as asked; the message says what to change."""


@dataclass(frozen=True)
class ServiceSettings:
    """One machine's servers and workers."""

    folder: Path
    """Credentials, logs and what is running; under SFT_HOME."""
    host: str
    """Address that the servers listen on (SFT_HOST)."""
    public_host: str
    """Name under which browsers and other machines reach them (SFT_PUBLIC_HOST)."""
    prefect_port: int
    mlflow_port: int
    database_url: str | None
    """PostgreSQL server (SFT_DATABASE_URL); none means SQLite files."""
    artifacts: str
    """Folder or s3://bucket/path behind the MLflow server (SFT_ARTIFACTS)."""
    auth: bool
    """Whether both servers ask for credentials."""
    allowed_origins: tuple[str, ...]
    """Pages beside the servers' own that may use them, as those of a reverse proxy (SFT_ALLOWED_ORIGINS)."""

    @property
    def local_host(self) -> str:
        """Address at which this machine reaches the servers."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host

    @property
    def prefect_url(self) -> str:
        """Address of the Prefect server's pages, as seen from this machine."""
        return f"http://{_bracket(self.local_host)}:{self.prefect_port}"

    @property
    def mlflow_url(self) -> str:
        """Address of the MLflow server, as seen from this machine."""
        return f"http://{_bracket(self.local_host)}:{self.mlflow_port}"

    def page(self, port: int) -> str:
        """Return the address at which browsers find the server of this port."""
        return f"http://{_bracket(self.public_host)}:{port}"

    @property
    def hosts(self) -> list[str]:
        """Names and addresses that the servers answer to, without ports; IPv6 in brackets."""
        own = [self.local_host, self.public_host, *(("localhost",) if is_loopback(self.local_host) else ())]
        proxied = [urlsplit(origin).hostname or "" for origin in self.allowed_origins]
        return sorted({_bracket(name).lower() for name in (*own, *proxied)})

    def origins(self, port: int) -> list[str]:
        """Pages that may use the server of this port: its own under each of its names, and the allowed ones."""
        own = (f"http://{name}" if port == _HTTP else f"http://{name}:{port}" for name in self.hosts)
        return sorted({*own, *self.allowed_origins})


def read_settings(environment: Mapping[str, str] = os.environ) -> ServiceSettings:
    """Read the SFT_… variables.

    Raises:
        ServiceError: a port is not a number, the database is not PostgreSQL, log-in is off beyond this machine, or an
            allowed origin is none.
    """
    host = environment.get("SFT_HOST") or "127.0.0.1"
    home = storage.home()
    return ServiceSettings(
        folder=home / "service",
        host=host,
        public_host=environment.get("SFT_PUBLIC_HOST") or (socket.getfqdn() if host in ("0.0.0.0", "::") else host),
        prefect_port=_read_port(environment, "SFT_PREFECT_PORT", 4200),
        mlflow_port=_read_port(environment, "SFT_MLFLOW_PORT", 5000),
        database_url=_read_database(environment),
        artifacts=environment.get("SFT_ARTIFACTS") or str(home / "artifacts"),
        auth=_read_auth(environment, host),
        allowed_origins=tuple(_read_origin(text) for text in split_list(environment.get("SFT_ALLOWED_ORIGINS"))),
    )


def _read_port(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ServiceError(f"{name} = {text!r}: give a port from 1 to 65535")
    return int(text)


def _read_database(environment: Mapping[str, str]) -> str | None:
    url = environment.get("SFT_DATABASE_URL")
    if url and not url.startswith(("postgresql://", "postgres://")):
        scheme = url.partition("://")[0]  # never the whole: it holds a password
        raise ServiceError(
            f"SFT_DATABASE_URL begins with {scheme!r}: give postgresql://user:password@host:5432, or leave it out "
            "for SQLite files"
        )
    return url or None


def _read_auth(environment: Mapping[str, str], host: str) -> bool:
    """On, but for SFT_AUTH=off on this machine."""
    text = environment.get("SFT_AUTH") or "on"
    if text not in ("on", "off"):
        raise ServiceError(f"SFT_AUTH = {text!r}: give on or off")
    if text == "off" and not is_loopback(host):
        raise ServiceError(
            f"SFT_AUTH = off with SFT_HOST = {host}: whoever reaches the servers could run programs on this machine. "
            "Leave SFT_AUTH out, or serve on 127.0.0.1 behind a reverse proxy that asks for a log-in"
        )
    return text == "on"


def _read_origin(text: str) -> str:
    """Check one allowed origin: scheme, name and port as browsers send them, nothing after."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or text != f"{parts.scheme}://{parts.netloc}":
        raise ServiceError(
            f"SFT_ALLOWED_ORIGINS has {text!r}: give addresses of pages without a path, such as "
            "https://prefect.example.org, with commas between"
        )
    return text.lower()


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host
