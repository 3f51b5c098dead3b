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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tasks.training.place import open_place
from tasks.training.process.joining import NobodyCameError, join_team
from tasks.training.process.launch import run_training
from tasks.training.process.messages import TrainingJob, write_job
from tasks.training.process.team import answers, find_offer, leading, meet_again, prepare_job, take_offer
from tasks.training.records import EvalRecord, StepRecord, TrainingError, TrainingOutcome
from tests.object_store import serve_bucket
from tests.tasks.training.conftest import write_tokens
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


class Team:
    """The machine of the run, whose part is this process's, and others; each has a folder of its own."""

    def __init__(self, job: TrainingJob, folder: Path) -> None:
        self.job, self._folder = job, folder
        self.losses: dict[int, float] = {}
        self.evaluations: dict[int, float] = {}
        self.lines: list[str] = []
        self.guests: list[subprocess.Popen[bytes]] = []
        self.own_ranks: list[psutil.Process] = []
        """Of the run's machine, known before they train: a training is over sooner than they are looked for."""
        self.guest_processes: list[psutil.Process] = []
        """Of the others, with their agents and ranks."""
        self._is_over = threading.Event()
        self._answers: dict[str, Callable[[], None]] = {}
        self._acts: list[tuple[Callable[[StepRecord], bool], Callable[[], None]]] = []

    def add_guest(self, *, wait_seconds: float = 300) -> None:
        """Start a machine that joins."""
        folder = self._folder / f"guest-{len(self.guests)}"
        command = [sys.executable, "-m", "flows.cli", "join", "--wait", str(wait_seconds)]
        environment = {**os.environ, "SFT_HOME": str(folder)}
        with folder.with_suffix(".log").open("w") as log:
            guest = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.guests.append(guest)

    def add_torchrun(self) -> None:
        """Start a machine that joins by torchrun's own command, as `sft join --torchrun` prints it."""
        number = len(self.guests)
        environment = {**os.environ, "SFT_HOME": str(self._folder / f"guest-{number}")}
        asked = [sys.executable, "-m", "flows.cli", "join", "--torchrun"]
        command = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout
        with (self._folder / f"guest-{number}.log").open("w") as log:
            guest = subprocess.Popen(command, shell=True, stdout=log, stderr=log, start_new_session=True)
        self.guests.append(guest)

    def read_log(self, number: int) -> str:
        return (self._folder / f"guest-{number}.log").read_text()

    def when(self, condition: Callable[[StepRecord], bool], act: Callable[[], None]) -> None:
        """Do something once, at the first step, after what was said before, that is as wanted."""
        self._acts.append((condition, act))

    def when_told(self, word: str, act: Callable[[], None]) -> None:
        """Do something once when a line of the log has a word."""
        self._answers[word] = act

    def train(self) -> TrainingOutcome:
        """Train on the run's machine; the others end by themselves then."""
        threading.Thread(target=self._watch_ranks, daemon=True).start()
        try:
            return run_training(
                self.job,
                on_step=self._note,
                on_eval=self._note_evaluation,
                on_log=lambda level, text: self._note_line(text),
                silence_seconds=600,  # of processes that a test has stopped
            )
        finally:
            self._is_over.set()
            for guest in self.guests:
                try:
                    guest.wait(timeout=60)
                finally:
                    kill_tree(guest.pid)

    def find_guest_processes(self) -> list[psutil.Process]:
        """Return ranks, agents and commands of other machines than the run's."""
        living = [psutil.Process(guest.pid) for guest in self.guests if guest.poll() is None]
        return [each for guest in living for each in (guest, *guest.children(recursive=True))]

    def lose_guests(self) -> None:
        """Kill them with all that they have started, at once, as a machine takes it along that loses its power."""
        for process in self.guest_processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _watch_ranks(self) -> None:
        while not self._is_over.wait(0.3):
            below = psutil.Process().children(recursive=True)
            self.own_ranks = [process for process in below if is_rank_of(self.job, process)]
            self.guest_processes = self.find_guest_processes()

    def _note(self, record: StepRecord) -> None:
        self.losses[record.step] = record.loss  # a step that is done again has the same loss, or the test fails
        if self._acts and self._acts[0][0](record):
            self._acts.pop(0)[1]()

    def _note_line(self, text: str) -> None:
        self.lines.append(text)
        for word in [word for word in self._answers if word in text]:
            self._answers.pop(word)()

    def _note_evaluation(self, record: EvalRecord) -> None:
        self.evaluations[record.step] = record.loss


def kill_tree(pid: int) -> None:
    """Kill a process and all that it has started, as a machine takes them along that loses its power."""
    try:
        every = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in every:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


@contextmanager
def shared(kind: str, folder: Path) -> Iterator[str]:
    """Give what machines share: a folder, or one of a bucket."""
    if kind == "folder":
        yield str(folder / "shared")
        return
    with serve_bucket("team"):
        yield f"s3://team/{folder.name}"  # of its own: the server keeps what tests before have left


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


def hold_until_told_to_stop(processes: list[psutil.Process]) -> None:
    """Stop ranks where they are until their agent has sent them SIGTERM: somebody else has come."""
    assert processes, "no rank is known"
    for process in processes:
        process.suspend()

    def wait() -> None:
        for process in processes:
            while not has_pending(process.pid, signal.SIGTERM):
                time.sleep(0.05)
            process.resume()

    threading.Thread(target=wait, daemon=True).start()


def has_pending(pid: int, number: signal.Signals) -> bool:
    """Say whether a signal waits for a process, or the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    (mask,) = (int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd"))
    return bool(mask >> (number - 1) & 1)


def is_rank_of(job: TrainingJob, process: psutil.Process) -> bool:
    """Say whether a process is a rank of the run's machine, and no agent."""
    try:
        return str(job.run_folder / "job.json") in process.cmdline() and "RANK" in process.environ()
    except psutil.Error:
        return False


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
