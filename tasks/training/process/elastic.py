"""PyTorch's elastic launcher (torchrun's): how a training's processes are started on one machine, or as part of a team.

A team meets at the endpoint of the machine with the pipeline's run (c10d rendezvous). Where a machine or a process is
lost, the others' agents stop their processes and meet again; where one comes, too.
"""

import os
import socket
import sys
from inspect import signature as read_signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tasks.training.process.failures import name_lost_rank
from tasks.training.process.messages import TrainingJob
from tasks.training.records import TrainingCrash

CONF_VARIABLE = "SFT_RENDEZVOUS_CONF"
"""Settings of the rendezvous in torchrun's form (--rdzv-conf): key=value,key=value."""
STOP_VARIABLE = "SFT_STOP_SECONDS"
"""What a training that has to stop gets for its checkpoint."""
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""For agents: the first rank opens a store of its own in each round. The shared one keeps the address of the first
round's, which may be that of a machine that was lost (PyTorch 2.13, `DynamicRendezvousHandler.next_rendezvous`)."""
_SHUTDOWN_SECONDS = 5
_STOP_SECONDS = 25.0
"""Prefect kills after 30."""
_MAX_RESTARTS = 1_000_000
"""Of an agent. Who gives up is the launcher, which sees whether steps are done in between."""
_MEETING = {
    "join_timeout": "86400",  # a machine may wait in a scheduler's queue meanwhile
    "last_call_timeout": "15",
    "keep_alive_interval": "5",
    "keep_alive_max_attempt": "3",
}
_MODULE = "tasks.training.process.worker"


def start_ranks(job: TrainingJob, path: Path) -> None:
    """Run this machine's processes until all have ended.

    Args:
        job: theirs.
        path: of the job as a file.

    Raises:
        TrainingCrash: one of them was killed by a signal; the others were stopped.
        ChildFailedError: one of them failed, and told the launcher why; the others were stopped.
        RendezvousError: the machines do not meet any more.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = job.config
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.num_own_processes)))
    # PyTorch 2.11 does not know it yet, and waits for half a minute.
    known = "shutdown_timeout" in read_signature(LaunchConfig).parameters
    patience: dict[str, Any] = {"shutdown_timeout": int(_shutdown_seconds(job))} if known else {}
    if job.endpoint is not None:
        os.environ.update(OWN_STORE)
    with TemporaryDirectory(dir=path.parent, prefix=".agent-") as logs:  # PyTorch's own would stay among all users'
        launch = LaunchConfig(
            nproc_per_node=config.num_own_processes,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            **patience,
            **_describe_meeting(job),
        )
        try:
            elastic_launch(launch, sys.executable)("-m", _MODULE, str(path))
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            if failure.exitcode >= 0:
                raise
            lost = name_lost_rank(failure.local_rank, config.num_own_processes, failure.exitcode)
            raise TrainingCrash(lost) from error


def _describe_meeting(job: TrainingJob) -> dict[str, Any]:
    """Return where this machine's agent meets others."""
    if job.endpoint is None:  # one machine finds a free port by itself
        return {
            "min_nodes": 1,
            "max_nodes": 1,
            "run_id": job.identity[:32] or "training",
            "max_restarts": 0,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "local_addr": "127.0.0.1",
        }
    return {
        "min_nodes": job.config.min_nodes,
        "max_nodes": job.config.num_nodes,
        "run_id": job.round_id,
        "max_restarts": _MAX_RESTARTS,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": job.endpoint,
        "rdzv_configs": _read_conf(),
        "local_addr": find_own_address(job.endpoint),
    }


def write_torchrun(job: TrainingJob, path: Path) -> list[str]:
    """Return the command that starts this machine's processes without us."""
    assert job.endpoint is not None
    settings = ",".join(f"{key}={value}" for key, value in _read_conf().items())
    return [
        "env",
        *(f"{name}={value}" for name, value in OWN_STORE.items()),
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={job.config.min_nodes}:{job.config.num_nodes}",
        f"--nproc-per-node={job.config.num_own_processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={job.endpoint}",
        f"--rdzv-id={job.round_id}",
        f"--rdzv-conf={settings}",
        f"--local-addr={find_own_address(job.endpoint)}",
        f"--max-restarts={_MAX_RESTARTS}",
        *("-m", _MODULE, str(path)),
    ]


def read_stop_seconds() -> float:
    """Return what a training that has to stop gets for its checkpoint."""
    return float(os.environ.get(STOP_VARIABLE, _STOP_SECONDS))


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Return host and port of host:port."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def find_own_address(endpoint: str) -> str:
    """Return the address of this machine on its way to an endpoint; nothing is sent."""
    host, port = split_endpoint(endpoint)
    kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _read_conf() -> dict[str, str]:
    """Return the settings of the rendezvous; the store that it needs is the launcher's."""
    given = [entry.partition("=") for entry in os.environ.get(CONF_VARIABLE, "").split(",") if entry]
    return {**_MEETING, **{key.strip(): value.strip() for key, _, value in given}, "is_host": "false"}


def _shutdown_seconds(job: TrainingJob) -> float:
    """Return after how long processes that were told to stop are killed: in a team they write a checkpoint first."""
    return _SHUTDOWN_SECONDS if job.endpoint is None else max(_SHUTDOWN_SECONDS, read_stop_seconds())
