"""`sft serve-model`: a registered version or a model folder behind OpenAI's chat API, on this machine."""

import ipaddress
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from flows.service.guard import Guard
from flows.targets import Target, describe_version, is_version, opening_target
from tasks.models import choose_device, choose_dtype, load_model, load_tokenizer
from tasks.serving.app import create_app
from tasks.serving.served_model import ServedModel, open_served

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class ServingError(ValueError):
    """A model cannot be served like this."""


@dataclass(frozen=True)
class ServingOptions:
    """How a model is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    allowed_hosts: tuple[str, ...] = ()
    """Names beside the address itself that requests may come by."""
    names: tuple[str, ...] = ()
    """In place of those of the version or folder."""
    precision: str = "auto"
    num_rows: int | None = None
    length: int | None = None
    temperature: float = 0.0


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_options(options: ServingOptions) -> None:
    """Refuse what would be open to others.

    Raises:
        ServingError: an address beyond loopback without a key, or without a name to reach it by.
    """
    if is_loopback(options.host):
        return
    if not options.api_key:
        raise ServingError(
            f"--host {options.host} is reached from other machines: give a key with --api-key or SFT_SERVE_API_KEY"
        )
    if _is_any(options.host) and not options.allowed_hosts:
        raise ServingError(
            f"--host {options.host} has no name of its own: say by which names requests come with --allow-host"
        )


def _is_any(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def list_hosts(options: ServingOptions) -> tuple[str, ...]:
    """Return the names that the server is reached by."""
    own = () if _is_any(options.host) else (f"[{options.host}]" if ":" in options.host else options.host,)
    loopback = _LOOPBACK_NAMES if is_loopback(options.host) or _is_any(options.host) else ()
    return (*dict.fromkeys((*own, *loopback, *options.allowed_hosts)),)


def name_target(target: str, label: str) -> tuple[tuple[str, ...], str]:
    """Return the names that requests may call a target by, and its fingerprint: names, and never paths."""
    if not target or is_version(target):
        version = describe_version(target)
        names = (version.name, f"{version.name}/{version.version}", *(f"{version.name}@{a}" for a in version.aliases))
        return names, f"{version.name}/{version.version}-{version.digest[:12]}"
    return (label,), label


@contextmanager
def opening_served(
    target: str, options: ServingOptions, *, base_model: str = "", kept: Sequence[str] = ()
) -> Iterator[ServedModel]:
    """Load a target and start its engine.

    Args:
        target: as `opening_target` takes it.
        options: of the service.
        base_model: where the target names none.
        kept: further names.

    Raises:
        ValueError: there is no such model, or it cannot be served.
    """
    with opening_target(target, base_model=base_model) as opened:
        served = load_served(opened, target, options, kept)
        try:
            yield served
        finally:
            served.close()


def load_served(
    opened: Target, target: str, options: ServingOptions, kept: Sequence[str] = (), folder: Path | None = None
) -> ServedModel:
    """Load the model of an opened target, or of another folder, and start its engine."""
    names, fingerprint = name_target(target, opened.label)
    place = folder or opened.folder
    device = choose_device()
    model = load_model(place, dtype=choose_dtype(options.precision, device), device=device)
    return open_served(
        model,
        load_tokenizer(place),
        place,
        names=(*dict.fromkeys((*(options.names or names), *kept)),),
        num_rows=options.num_rows,
        length=options.length,
        temperature=options.temperature,
        fingerprint=fingerprint,
    )


def serve(served: ServedModel, options: ServingOptions, *, on_start: Callable[[], None] = lambda: None) -> None:
    """Answer requests until the process is told to end.

    Raises:
        ServingError: the address cannot be used.
    """
    app = Guard(
        create_app(served, api_key=options.api_key),
        hosts=list_hosts(options),
        origins=(),
        name_help="Use one of its own, or start it with --allow-host and yours.",
        page_help="Have the page's own server ask it.",
    )
    config = uvicorn.Config(
        app, host=options.host.strip("[]"), port=options.port, log_level="warning", server_header=False
    )
    server = _Server(config, on_start)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    try:
        with suppress(KeyboardInterrupt):
            server.run()
    except SystemExit:
        raise ServingError(f"{options.host}:{options.port} cannot be used: is another server there?") from None


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            self._on_start()
