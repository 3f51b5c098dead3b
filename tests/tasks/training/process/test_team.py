"""Machines that train together, come and go: processes of their own, in folders of their own, really killed.

`SFT_TEAM_TESTS=all` brings what takes minutes: four ranks, every kind of loss, from a folder and from S3.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.training.place import open_place
from tasks.training.process.joining import NobodyCameError, join_team
from tasks.training.process.launch import run_training
from tasks.training.process.messages import TrainingJob, write_job
from tasks.training.process.team import answers, find_offer, leading, meet_again, prepare_job, take_offer
from tasks.training.records import TrainingError, TrainingOutcome
from tests.tasks.training.conftest import write_tokens
from tests.tasks.training.process.machines import Team, hold_until_told_to_stop, kill_tree, shared
from tests.tasks.training.process.test_launch import find_processes
from tests.tasks.training.ranks import find_port
from tests.tasks.training.test_distributed import CONFIG as SHORT
from tests.tasks.training.test_distributed import Curves, farthest

# Machines on a busy one may be silent for longer than a second.
# Long enough that a machine comes back while it is trained, however busy this one is.
CONFIG = SHORT.model_copy(
    update={"num_epochs": 40, "learning_rate": 1e-3, "eval_every_steps": 80, "checkpoint_every_steps": 10}
)
NUM_STEPS = 320
_CONF = "last_call_timeout=2,keep_alive_interval=2,keep_alive_max_attempt=3"
is_long = pytest.mark.skipif(os.environ.get("SFT_TEAM_TESTS") != "all", reason="SFT_TEAM_TESTS=all brings it")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def many_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("many"), num_train=44, num_eval=7)


@pytest.fixture(scope="module")
def alone(base_model: Path, many_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    torch.set_num_threads(1)
    return Curves(TrainingJob(base_model, many_tokens, tmp_path_factory.mktemp("alone"), CONFIG, 5, "x"))


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_RENDEZVOUS", f"127.0.0.1:{find_port()}")
    monkeypatch.setenv("SFT_RENDEZVOUS_CONF", _CONF)


def make_team(base_model: Path, tokens: Path, folder: Path, **changes: Any) -> Team:
    config = CONFIG.model_copy(update={"num_nodes": 2, **changes})
    (folder / "head").mkdir()
    return Team(TrainingJob(base_model, tokens, folder / "head", config, 5, "x"), folder)


def check_curve(team: Team, outcome: TrainingOutcome, alone: Curves) -> None:
    assert sorted(team.losses) == list(range(1, NUM_STEPS + 1))
    assert [team.losses[step] for step in sorted(team.losses)] == pytest.approx(alone.losses, abs=1e-5)
    assert list(team.evaluations.values()) == pytest.approx(alone.eval_losses, abs=1e-5)
    assert farthest(load_file(outcome.adapter / "adapter_model.safetensors"), alone.adapter) < 1e-5
    assert find_processes(team.job) == []


def bring_guest(team: Team) -> None:
    """Let a machine come, which the run's machine waits for in the middle of its training."""
    hold_until_told_to_stop(team.own_ranks)
    team.add_guest()


@pytest.mark.usefixtures("meeting")
def test_a_machine_that_comes_grows_the_team_and_a_lost_one_shrinks_it(
    base_model: Path, many_tokens: Path, tmp_path: Path, alone: Curves, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = random.SystemRandom().randint(2, 60)
    with shared("bucket", tmp_path) as place:
        monkeypatch.setenv("SFT_TEAM", place)
        team = make_team(base_model, many_tokens, tmp_path)
        team.when_told("Training on 1 machine", lambda: bring_guest(team))
        team.when_told(
            "came after step",
            lambda: team.when(lambda record: record.step >= step, team.lose_guests),
        )
        outcome = team.train()
    check_curve(team, outcome, alone)
    (came,) = (line for line in team.lines if "came after step" in line)
    (lost,) = (warning for warning in outcome.warnings if warning.startswith("Lost"))
    assert "2 machines with 2 processes go on" in came
    assert "1 machine with 1 process go on from the last checkpoint" in lost


@is_long
@pytest.mark.parametrize("kind", ["folder", "bucket"])
@pytest.mark.parametrize("loss", ["machine", "rank", "agent of the run's machine", "pre-empted"])
@pytest.mark.usefixtures("meeting")
def test_four_ranks_on_two_machines_survive_any_loss(
    base_model: Path,
    many_tokens: Path,
    tmp_path: Path,
    alone: Curves,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    loss: str,
    record_property: Callable[[str, Any], None],
) -> None:
    step = random.SystemRandom().randint(2, 60)
    with shared(kind, tmp_path) as place:
        monkeypatch.setenv("SFT_TEAM", place)
        team = make_team(base_model, many_tokens, tmp_path, num_processes=2)
        team.when_told("Training on 1 machine", lambda: bring_guest(team))

        def act() -> None:
            if loss == "machine":
                team.lose_guests()
            elif loss == "rank":
                random.choice([p for p in team.guest_processes if "RANK" in p.environ()]).kill()
            elif loss == "pre-empted":
                team.guests[0].terminate()
            else:
                (agent,) = (p for p in find_processes(team.job) if "RANK" not in p.environ())
                kill_tree(agent.pid)

        team.when_told("came after step", lambda: team.when(lambda record: record.step >= step, act))
        outcome = team.train()
    check_curve(team, outcome, alone)
    record_property("lines", [step, *team.lines])
    record_property("farthest", max(abs(team.losses[n + 1] - loss) for n, loss in enumerate(alone.losses)))
    codes = {"machine": -signal.SIGKILL, "pre-empted": 143}
    assert team.guests[0].returncode == codes.get(loss, 0), team.read_log(0)
    assert outcome.warnings


@is_long
@pytest.mark.usefixtures("meeting")
def test_a_lost_machine_comes_back_and_torchrun_itself_joins(
    base_model: Path, many_tokens: Path, tmp_path: Path, alone: Curves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_TEAM", str(tmp_path / "shared"))
    team = make_team(base_model, many_tokens, tmp_path)
    team.when_told("Training on 1 machine", lambda: bring_guest(team))

    def bring_torchrun() -> None:
        hold_until_told_to_stop(team.own_ranks)
        threading.Thread(target=team.add_torchrun).start()

    def lose_guest() -> None:
        team.when_told("Lost", bring_torchrun)
        team.when(lambda record: record.step >= 10, team.lose_guests)

    team.when_told("came after step", lose_guest)
    outcome = team.train()
    check_curve(team, outcome, alone)
    assert [guest.returncode for guest in team.guests] == [-signal.SIGKILL, 0], team.read_log(1)
    assert sum("2 machines with 2 processes go on" in line for line in team.lines) == 2, team.lines


# A machine with the run, that a scheduler takes away at a step: as Prefect does, it raises in the main thread.
TAKEN_AWAY = """
import os, signal, sys
from pathlib import Path
from tasks.training.process.launch import run_training
from tasks.training.process.messages import read_job

def end(*_):
    raise SystemExit(143)

told = []

def on_step(record):
    if record.step == int(sys.argv[2]) and not told:  # it is told of the step again that was interrupted
        told.append(record)
        os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGTERM, end)
run_training(read_job(Path(sys.argv[1])), on_step=on_step)
"""


def test_a_machine_that_is_taken_away_leaves_a_checkpoint_that_another_goes_on_from(
    base_model: Path, many_tokens: Path, tmp_path: Path, alone: Curves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_STOP_SECONDS", "100")
    step = random.SystemRandom().randint(1, 30)
    config = CONFIG.model_copy(update={"checkpoint_every_steps": 1000})
    job = TrainingJob(base_model, many_tokens, tmp_path / "one", config, 5, "x")
    write_job(job, tmp_path / "given.json")
    with shared("bucket", tmp_path) as place:
        monkeypatch.setenv("SFT_TEAM", place)
        command = [sys.executable, "-c", TAKEN_AWAY, str(tmp_path / "given.json"), str(step)]
        assert subprocess.run(command, timeout=300, check=False).returncode == 143
        rest = Curves(replace(job, run_folder=tmp_path / "two"))
    last = rest.outcome.resumed_from_step
    assert last is not None
    assert step <= last < NUM_STEPS
    assert rest.steps == list(range(last + 1, NUM_STEPS + 1))
    assert rest.losses == alone.losses[last:]
    assert farthest(rest.adapter, alone.adapter) == 0.0


def test_what_several_machines_need_is_asked_for(
    base_model: Path, many_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = TrainingJob(base_model, many_tokens, tmp_path, CONFIG.model_copy(update={"num_nodes": 2}), 5, "x")
    with pytest.raises(TrainingError, match=r"num_nodes is 2, but SFT_TEAM is not set: .* run `sft join`"):
        run_training(job)
    monkeypatch.setenv("SFT_TEAM", str(tmp_path / "shared"))
    with pytest.raises(TrainingError, match="SFT_RENDEZVOUS is not set"):
        run_training(job)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for endpoint, message in (
            ("10.0.0.5", "host:port is wanted"),
            ("192.0.2.1:29400", "192.0.2.1, which is not this machine"),
            (f"127.0.0.1:{port}", "another training has the port"),
        ):
            monkeypatch.setenv("SFT_RENDEZVOUS", endpoint)
            with pytest.raises(TrainingError, match=message):
                run_training(job)
    assert open_place(str(tmp_path / "shared")).list_names("jobs") == []


def test_a_machine_with_another_version_is_refused(
    base_model: Path, many_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_TEAM", str(tmp_path / "shared"))
    monkeypatch.setenv("SFT_RENDEZVOUS", f"127.0.0.1:{find_port()}")
    place = open_place(str(tmp_path / "shared"))
    config = CONFIG.model_copy(update={"num_nodes": 2})
    job = prepare_job(TrainingJob(base_model, many_tokens, tmp_path, config, 5, "x"))
    with leading(job):
        offer = find_offer(place)
        assert offer is not None
        assert answers(offer)
        taken = take_offer(place, offer, tmp_path / "mine")
        assert read_files(taken.base_model) == read_files(base_model)
        assert read_files(taken.tokens) == read_files(many_tokens)
        known = ("config", "seed", "identity", "place", "endpoint", "round_id")
        assert [getattr(taken, name) for name in known] == [getattr(job, name) for name in known]
        other = replace(offer, fingerprint={**offer.fingerprint, "torch": "1.0", "code": "f" * 64})
        newer = replace(other, config={**offer.config, "setting_of_tomorrow": 1})
        for each in (other, newer):
            with pytest.raises(TrainingError, match=r"code \w{12} here and f{12} there, torch .* here and 1.0 there"):
                take_offer(place, each, tmp_path / "mine")
    assert find_offer(place) is None
    assert not answers(offer)


@pytest.mark.parametrize("text", ["{", '{"seed": 1}', "[]"])
def test_what_is_no_offer_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "x.json").write_text(text)
    with pytest.raises(TrainingError, match=r"jobs/x.json is no offer that this version of the product can read"):
        find_offer(open_place(str(tmp_path)))


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nobody_comes(tmp_path: Path) -> None:
    with pytest.raises(NobodyCameError, match="waited 1 s, and no training was offered there"):
        join_team(open_place(str(tmp_path)), tmp_path / "mine", wait_seconds=1)


@pytest.mark.parametrize("error", [TrainingError("the loss is not finite"), KeyboardInterrupt()])
def test_only_a_training_that_may_go_on_is_still_offered(
    base_model: Path, many_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setenv("SFT_TEAM", str(tmp_path / "shared"))
    monkeypatch.setenv("SFT_RENDEZVOUS", f"127.0.0.1:{find_port()}")
    config = CONFIG.model_copy(update={"num_nodes": 2})
    job = prepare_job(TrainingJob(base_model, many_tokens, tmp_path, config, 5, "x"))

    def begin(current: TrainingJob) -> None:
        with leading(current):
            raise error

    with pytest.raises(type(error)):
        begin(job)
    offer = find_offer(open_place(str(tmp_path / "shared")))
    assert (offer is not None) == isinstance(error, KeyboardInterrupt)
    if offer is not None:
        assert meet_again(job).round_id == "x-1"
        assert offer.round_id == "x-0"
