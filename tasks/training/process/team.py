"""A training of several machines: what the one with the run lays out for the others, and how they take it up.

In the place that they share are, under `jobs/`, the trainings that are under way, each with the endpoint at which its
machines meet; under `folders/` models and tokens by their digests; under `trainings/` the checkpoints of each. A job
that is over is deleted: whoever looks for it then has nothing more to do.
"""

import json
import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from schemas.config import TrainingConfig
from tasks import storage, stored_files
from tasks.dependencies import digest_files, list_libraries
from tasks.training.order import is_windowed
from tasks.training.place import TEAM_VARIABLE, Place, find_place
from tasks.training.process.elastic import split_endpoint
from tasks.training.process.messages import TrainingJob
from tasks.training.records import TrainingError

logger = logging.getLogger(__name__)

RENDEZVOUS_VARIABLE = "SFT_RENDEZVOUS"
"""host:port of the machine with the pipeline's run, at which the others find it."""
_JOBS, _FOLDERS, _TRAININGS, _ENDING = "jobs", "folders", "trainings", ".json"
_RESOLVE_SECONDS = 60.0
_CONNECT_SECONDS = 5.0
_TABLE = "train.parquet"
_NUM_SHOWN = 5


@dataclass(frozen=True)
class Offer:
    """A training that is under way, as its leader has written it down."""

    name: str
    base_model: str
    """Name of its folder in the place, like the next one."""
    tokens: str
    config: dict[str, Any]
    """Of the training; as it was written: another version of the product may have other settings."""
    seed: int
    identity: str
    endpoint: str
    round_id: str
    fingerprint: dict[str, str]
    """Of code and libraries."""
    written: float
    """Seconds since 1970, by the leader's clock."""
    tokens_address: str | None = None
    """Of the tokens' folder in a store, where the one in the place lacks parts of it."""


def prepare_job(job: TrainingJob) -> TrainingJob:
    """Return the job with the place and the endpoint that the environment names.

    Raises:
        TrainingError: several machines are to train, and it is not said where they meet and what they share.
    """
    place = find_place()
    endpoint = os.environ.get(RENDEZVOUS_VARIABLE)
    if place is not None:
        job = replace(job, place=place.below(f"{_TRAININGS}/{_name(job)}").address)
    if job.config.num_nodes == 1:
        return job
    if place is None:
        raise TrainingError(
            f"training.num_nodes is {job.config.num_nodes}, but {TEAM_VARIABLE} is not set: set it to a folder that "
            "all machines see, or to an address such as s3://bucket/team, and run `sft join` with it on the others"
        )
    if endpoint is None:
        raise TrainingError(
            f"training.num_nodes is {job.config.num_nodes}, but {RENDEZVOUS_VARIABLE} is not set: set it to host:port "
            "of this machine, as the others reach it"
        )
    return replace(job, endpoint=endpoint, round_id=f"{_name(job)}-0")


def meet_again(job: TrainingJob) -> TrainingJob:
    """Return the job with what its machines meet under next: a rendezvous that was closed stays so."""
    name, _, number = job.round_id.rpartition("-")
    return replace(job, round_id=f"{name}-{int(number) + 1}")


@contextmanager
def leading(job: TrainingJob) -> Iterator[Callable[[TrainingJob], None]]:
    """Offer a training to other machines, and hold the store at which they meet.

    A training that ends well, or by an error that would come again, is no longer offered then; of one that was
    interrupted the machines that have joined wait for the next attempt. What is given offers it anew.

    Raises:
        TrainingError: the endpoint is not this machine's, or is taken; the place cannot be written.
    """
    assert job.endpoint is not None
    place = find_place()
    assert place is not None
    store = _open_meeting_point(job.endpoint)
    folders = {folder: _put_folder(place, folder) for folder in (job.base_model, job.tokens)}

    def offer(current: TrainingJob) -> None:
        write_offer(current, folders[job.base_model], folders[job.tokens])

    offer(job)
    logger.info("Other machines join by: %s=%s sft join", TEAM_VARIABLE, place.address)
    try:
        yield offer
    except TrainingError:
        place.remove(_JOBS + "/" + _name(job) + _ENDING)
        raise
    else:
        place.remove(_JOBS + "/" + _name(job) + _ENDING)
    finally:
        del store


def write_offer(job: TrainingJob, base_model: str, tokens: str) -> None:
    """Write down a training for others, in place of what was written of it before.

    Args:
        job: of this machine.
        base_model: name of the model's folder in the place.
        tokens: of the tokens' folder.
    """
    place = find_place()
    assert place is not None
    values = {
        "base_model": base_model,
        "tokens": tokens,
        "config": job.config.model_dump(mode="json"),
        "seed": job.seed,
        "identity": job.identity,
        "endpoint": job.endpoint,
        "round_id": job.round_id,
        "fingerprint": take_fingerprint(),
        "written": time.time(),
        "tokens_address": job.tokens_address,
    }
    place.write_text(f"{_JOBS}/{_name(job)}{_ENDING}", json.dumps(values))


def find_offer(place: Place) -> Offer | None:
    """Return the training that was offered last, if there is any.

    Raises:
        TrainingError: what is written there is no offer of ours.
    """
    offers = []
    for file in place.list_names(_JOBS):
        text = place.read_text(f"{_JOBS}/{file}") if file.endswith(_ENDING) else None
        if text is None:  # deleted meanwhile
            continue
        try:
            offers.append(Offer(name=file.removesuffix(_ENDING), **json.loads(text)))
        except (ValueError, TypeError) as error:
            raise TrainingError(
                f"{place.address}/{_JOBS}/{file} is no offer that this version of the product can read ({error}): "
                "install the version of the run's machine here, or delete the file where no run wants it"
            ) from None
    return max(offers, key=lambda offer: offer.written, default=None)


def answers(offer: Offer) -> bool:
    """Say whether the offer's meeting point can be reached."""
    try:
        with socket.create_connection(split_endpoint(offer.endpoint), timeout=_CONNECT_SECONDS):
            return True
    except OSError:
        return False


def take_offer(place: Place, offer: Offer, folder: Path) -> TrainingJob:
    """Fetch what a training needs into a folder of this machine; what is there already stays.

    Raises:
        TrainingError: this machine has another version of the product or of a library, or the place cannot be read.
    """
    _compare(offer.fingerprint, take_fingerprint())
    model, tokens = (f"{_FOLDERS}/{name}" for name in (offer.base_model, offer.tokens))
    place.fetch_folder(model, folder / model)
    address = _fetch_tokens(place, tokens, folder / tokens, offer.tokens_address)
    return TrainingJob(
        base_model=folder / model,
        tokens=folder / tokens,
        run_folder=folder / _TRAININGS / offer.name,
        config=TrainingConfig.model_validate(offer.config),
        seed=offer.seed,
        identity=offer.identity,
        place=place.below(f"{_TRAININGS}/{offer.name}").address,
        endpoint=offer.endpoint,
        round_id=offer.round_id,
        leads=False,
        tokens_address=address,
    )


def _fetch_tokens(place: Place, name: str, folder: Path, address: str | None) -> str | None:
    """Fetch a tokens folder; of a large one the parts stay where they are, and their ranks fetch those they need.

    Args:
        place: that has it.
        name: of the folder there.
        folder: of this machine.
        address: of the store that has the parts, where the place has not.

    Returns:
        The address of the parts, where they were left.
    """
    listed = place.list_files(name) or {}
    parts = {file: found for file, found in listed.items() if file.startswith(f"{_TABLE}/")}
    place.fetch_folder(name, folder, leave=parts)
    if not is_windowed(folder):
        place.fetch_folder(name, folder)
        return address
    if not parts:
        return address
    stored_files.write_list(folder, {file: stored_files.StoredFile(*found) for file, found in parts.items()})
    return place.below(name).address


def clear_training(job: TrainingJob) -> None:
    """Delete the checkpoints that a finished training has left in the place, if there is one."""
    place = find_place()
    if place is not None:
        place.remove(f"{_TRAININGS}/{_name(job)}")


def take_fingerprint() -> dict[str, str]:
    """Return what must be the same on all machines: code, Python and libraries."""
    return {"code": digest_files(_ENTRY), **list_libraries(_ENTRY)}


_ENTRY = "tasks.training.process.worker"


def _name(job: TrainingJob) -> str:
    return job.identity[:32] or "training"


def _put_folder(place: Place, folder: Path) -> str:
    """Put a folder into the place unless it is there, and return its name there."""
    name = storage.digest_folder(folder)
    if place.list_files(f"{_FOLDERS}/{name}") is None:
        logger.info("Copying %s to %s", folder, place.address)
        place.put_folder(folder, f"{_FOLDERS}/{name}")
    return name


def _open_meeting_point(endpoint: str) -> Any:
    """Open the store at which agents meet; it is there as long as what is returned."""
    try:
        host, port = split_endpoint(endpoint)
    except ValueError:
        raise TrainingError(
            f"{RENDEZVOUS_VARIABLE} = {endpoint}: host:port is wanted, such as 10.0.0.5:29400"
        ) from None
    _check_is_own(host)
    from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore("localhost", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    except DistNetworkError as error:
        words = str(error).partition("\n")[0]
        raise TrainingError(
            f"{RENDEZVOUS_VARIABLE} = {endpoint}: nothing can be opened there ({words}): another training has the "
            "port: choose another one"
        ) from None


def _check_is_own(host: str) -> None:
    """Raise TrainingError where a host is not this machine; a name that is not known yet is waited for."""
    deadline = time.monotonic() + _RESOLVE_SECONDS
    while True:
        try:
            found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"{RENDEZVOUS_VARIABLE}: {host} cannot be resolved on {platform.node()} ({error}): give the name "
                    "or address by which the other machines reach this one"
                ) from None
            time.sleep(1.0)
    own = {address.address.partition("%")[0] for each in psutil.net_if_addrs().values() for address in each}
    if not found & own:
        raise TrainingError(
            f"{RENDEZVOUS_VARIABLE}: {host} is {', '.join(sorted(found))}, which is not this machine, "
            f"{platform.node()}: give the name or address by which the others reach the machine with the run"
        )


def _compare(wanted: dict[str, str], found: dict[str, str]) -> None:
    """Raise TrainingError for other code or libraries: the ranks would compute different things."""
    differing = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    if differing:
        shown = [
            f"{name} {found.get(name, 'absent')[:12]} here and {wanted.get(name, 'absent')[:12]} there"
            for name in differing[:_NUM_SHOWN]
        ]
        more = f" and {len(differing) - _NUM_SHOWN} more" if len(differing) > _NUM_SHOWN else ""
        raise TrainingError(
            f"this machine, {platform.node()}, has another version of the product than the one with the run: "
            f"{', '.join(shown)}{more}: install the same one here"
        )
