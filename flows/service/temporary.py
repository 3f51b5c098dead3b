"""The program of the temporary server: `python -m flows.service.temporary SOCKET`, started by a run without a server.

SOCKET is the number of an open, listening one. The program ends when its standard input does: with the run.
"""

import os
import signal
import socket
import sys
import threading

_END_SECONDS = 10.0
# No pages, and no kinds of blocks for them: to find these, Prefect imports every package that brings some.
_ENVIRONMENT = {
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
}


def main(descriptor: int) -> None:
    """Serve until the run ends, or a signal says so."""
    threading.Thread(target=_end_with_run, daemon=True).start()
    os.environ.update(_ENVIRONMENT)
    import uvicorn
    from prefect.server.api.server import create_app

    from flows.service.new_database import prepare_new_database

    prepare_new_database()
    config = uvicorn.Config(create_app(final=True, ephemeral=True), log_level="error", lifespan="on")
    server = uvicorn.Server(config)
    server.run(sockets=[socket.socket(fileno=descriptor)])
    if not server.started:
        sys.exit(1)


def _end_with_run() -> None:
    while os.read(sys.stdin.fileno(), 1):  # not sys.stdin's own way: it holds a lock that the interpreter's end wants
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(_END_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
