"""The fused engine with divided weights: the curve of whole ones, and checkpoints that any strategy goes on from."""

import gc
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.decoder.recognition import UnknownDecoderError
from tasks.training.distributed import keep_pace
from tasks.training.engines import self_check
from tasks.training.frozen import load_base
from tasks.training.loop import train_adapter
from tasks.training.preparation import prepare_training
from tasks.training.process.messages import TrainingJob
from tasks.training.records import StepRecord, TrainingError, TrainingStopped
from tests.tasks.training.conftest import build_model, write_split, write_tokens
from tests.tasks.training.families import build_family
from tests.tasks.training.ranks import on_two_ranks
from tests.tasks.training.test_distributed import CONFIG, Curves, farthest
from tests.tasks.training.test_preferences import write_pairs

DIVIDED = "frozen layers divided among 2 ranks"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def many_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("many"), num_train=44, num_eval=7)


class Told:
    """Curves of a training on one of the ranks, and what it says of itself."""

    def __init__(self, base_model: Path, tokens: Path, folder: Path, changes: dict[str, Any], stop_at: int = 0) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.eval_losses: list[float] = []
        self.engine = ""
        self.warnings: tuple[str, ...] = ()

        def note(record: StepRecord) -> None:
            self.losses.append(record.loss)
            self.norms.append(record.grad_norm)

        with suppress(TrainingStopped):
            outcome = train_adapter(
                base_model, tokens, folder, CONFIG.model_copy(update={"num_epochs": 1.0, **changes}), seed=5,
                identity="x", on_step=note, on_eval=lambda record: self.eval_losses.append(record.loss),
                should_stop=lambda: bool(stop_at) and len(self.losses) == stop_at,
            )  # fmt: skip
            self.engine, self.warnings = outcome.engine, outcome.warnings


def train_both_ways(number: int, models: Path, tokens: Path, folder: Path) -> list[tuple[Told, Told]]:
    """Train each case with whole weights and with divided ones."""
    return [
        (
            Told(models / model, tokens, folder / f"{case}-whole", {"max_steps": 4, **changes}),
            Told(models / model, tokens, folder / f"{case}-divided", {"max_steps": 4, **changes, "strategy": "fsdp"}),
        )
        for case, (model, changes) in enumerate(CASES)
    ]


PACKED = {"packing": True, "tokens_per_pack": 48, "micro_batch": 1, "gradient_checkpointing": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"dropout": 0.2}),
    ("llama", PACKED),
    ("mixtral", {"router_aux_loss_coef": 0.05}),
    ("mixtral", {"target_modules": ("q_proj", "v_proj"), "dropout": 0.2, **PACKED}),
    ("qwen3_5_text", {"gradient_checkpointing": True}),
]


def test_dividing_changes_no_loss_and_no_adapter(many_tokens: Path, tmp_path: Path) -> None:
    for family in {family for family, _ in CASES}:
        kinds = {"layer_types": ["linear_attention", "full_attention"] * 2} if family == "qwen3_5_text" else {}
        build_family(tmp_path / family, family, num_hidden_layers=4, **kinds)
    ranks = on_two_ranks(train_both_ways, tmp_path, many_tokens, tmp_path, folder=tmp_path / "ranks")
    for told in ranks:
        for case, (whole, divided) in enumerate(told):
            assert whole.engine.startswith("fused"), whole.warnings
            assert divided.engine == f"{whole.engine}, {DIVIDED}"
            assert len(divided.losses) == len(whole.losses) > 3
            assert divided.losses == pytest.approx(whole.losses, abs=1e-6)
            assert divided.norms == pytest.approx(whole.norms, rel=1e-5)
            assert divided.eval_losses == pytest.approx(whole.eval_losses, abs=1e-6)
            files = [
                tmp_path / f"{case}-{way}" / "adapter" / "adapter_model.safetensors" for way in ("whole", "divided")
            ]
            assert farthest(*map(load_file, files)) < 1e-6


def train_part(
    number: int, base_model: Path, tokens: Path, folder: Path, changes: dict[str, Any], stop_at: int
) -> Told:
    return Told(base_model, tokens, folder, changes, stop_at)


def test_divided_whole_and_fsdp2_go_on_from_each_other_along_one_curve(
    base_model: Path, many_tokens: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"num_epochs": 1.0})
    alone = Curves(TrainingJob(base_model, many_tokens, tmp_path / "alone", config, 5, "x"))
    folder, done = tmp_path / "together", 0
    for changes, stop_at in (
        ({"strategy": "fsdp"}, 2),
        ({"strategy": "fsdp", "engine": "general"}, 2),
        ({}, 2),
        ({"strategy": "fsdp"}, 0),
    ):
        given = (base_model, many_tokens, folder, changes, stop_at)
        first, second = on_two_ranks(train_part, *given, folder=tmp_path / f"from-{done}")
        assert first.losses == second.losses == pytest.approx(alone.losses[done : done + len(first.losses)], abs=1e-5)
        done += len(first.losses)
    assert done == len(alone.losses)
    assert DIVIDED in first.engine
    assert farthest(load_file(folder / "adapter" / "adapter_model.safetensors"), alone.adapter) < 1e-5


def train_with_a_wrong_trial(number: int, base_model: Path, tokens: Path, folder: Path, engine: str) -> Told:
    """Train, where the second rank's trial of the fused engine fails."""

    def refuse(*_: Any) -> None:
        raise UnknownDecoderError("on a trial its gradient differs")

    kept = self_check.verify.__globals__["compare"]
    if number == 1:
        self_check.verify.__globals__["compare"] = refuse_after(kept, refuse)
    return Told(base_model, tokens, folder, {"strategy": "fsdp", "engine": engine})


def refuse_after(compare: Any, refuse: Any) -> Any:
    """Compare, as the other rank does, and refuse then."""

    def both(*arguments: Any) -> None:
        compare(*arguments)
        refuse()

    return both


def test_where_one_ranks_trial_fails_the_general_engine_trains_on_all(
    base_model: Path, many_tokens: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"num_epochs": 1.0})
    alone = Curves(TrainingJob(base_model, many_tokens, tmp_path / "alone", config, 5, "x"))
    given = (base_model, many_tokens, tmp_path / "run", "auto")
    for told in on_two_ranks(train_with_a_wrong_trial, *given, folder=tmp_path / "ranks"):
        assert told.engine.startswith("general engine")
        assert any("on a trial its gradient differs" in warning for warning in told.warnings)
        assert told.losses == pytest.approx(alone.losses, abs=1e-5)
    given = (base_model, many_tokens, tmp_path / "run", "fused")
    for error in on_two_ranks(train_with_a_wrong_trial, *given, folder=tmp_path / "refused"):
        assert isinstance(error, TrainingError)
        assert "the fused engine does not do this" in str(error)


def pace(number: int) -> list[tuple[str, bool]]:
    batches: Any = [f"{number}-{turn}" for turn in range(1 + 2 * number)]
    assert [batch for batch, counts in keep_pace(batches, is_even=False) if counts] == batches
    return list(keep_pace(batches, is_even=True))  # type: ignore[arg-type]


def test_ranks_with_fewer_batches_keep_pace(tmp_path: Path) -> None:
    first, second = on_two_ranks(pace, folder=tmp_path / "ranks")
    assert first == [("0-0", True), ("0-0", False), ("0-0", False)]
    assert second == [("1-0", True), ("1-1", True), ("1-2", True)]


def test_ranks_whose_held_out_examples_make_other_numbers_of_batches_finish(tmp_path: Path) -> None:
    """Shares of equally many examples, of which one has more tokens than a pass on a CPU takes."""
    build_model(tmp_path / "model", max_position_embeddings=4096, num_hidden_layers=4)
    tokens = write_tokens(tmp_path / "tokens", num_train=12, num_eval=6)
    lengths = (900, 700, 700, 650, 600, 600)  # 2,200 tokens for the first rank, 1,950 for the second
    write_split(tokens / "eval.parquet", [([2 + n % 90 for n in range(length)], 4) for length in lengths])
    whole = Curves(TrainingJob(tmp_path / "model", tokens, tmp_path / "alone", short_config(), 5, "x"))
    given = (tmp_path / "model", tokens, tmp_path / "run", {"strategy": "fsdp", **SHORT}, 0)
    for told in on_two_ranks(train_part, *given, folder=tmp_path / "ranks"):
        assert told.eval_losses == pytest.approx(whole.eval_losses, abs=1e-5)


SHORT = {"max_steps": 1, "eval_every_steps": 1}


def short_config() -> Any:
    return CONFIG.model_copy(update={"num_epochs": 1.0, **SHORT})


def measure_memory(number: int, base_model: Path, tokens: Path, folder: Path, strategy: str) -> tuple[int, int]:
    """Return by how many bytes this process grows when it reads the model, and those of all tensors that then train."""
    config = CONFIG.model_copy(update={"strategy": strategy, "rank": 1, "target_modules": ("q_proj",)})
    load_base(base_model, config, dtype=torch.float32, device=torch.device("cpu"))  # imports what reading takes
    before = read_own_bytes()
    model = load_base(base_model, config, dtype=torch.float32, device=torch.device("cpu"))
    grown = read_own_bytes() - before
    del model
    setup = prepare_training(base_model, tokens, folder, config, seed=5)
    assert (DIVIDED in setup.engine.describe()) == (strategy == "fsdp")
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return grown, sum(storages.values())


def read_own_bytes() -> int:
    """Return the memory of this process; pages of files, which it shares with others, do not count."""
    gc.collect()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (size,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return 1024 * int(size)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process")
def test_no_rank_holds_the_whole_model(many_tokens: Path, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "head_dim": 64}
    model = build_model(tmp_path / "model", "llama", **shape)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    for strategy, part in (("ddp", 1.0), ("fsdp", 14 / 24)):  # half of 24 layers, and two of them
        given = (model, many_tokens, tmp_path / "examples", strategy)
        for grown, held in on_two_ranks(measure_memory, *given, folder=tmp_path / strategy):
            assert grown < 0.1 * size
            assert held == pytest.approx(part * size, rel=0.05)


def test_preferences_are_learned_with_divided_weights(tmp_path: Path) -> None:
    """Five pairs are held out: two for each rank, whose model's own log-probabilities it finds, and one for both."""
    build_family(tmp_path / "model", "llama", num_hidden_layers=4)
    pairs = write_pairs(tmp_path / "pairs")
    whole: dict[str, Any] = {"objective": "dpo", "micro_batch": 4, "gradient_accumulation_steps": 1, "max_steps": 3}
    for told in on_two_ranks(train_both, tmp_path / "model", pairs, tmp_path, whole, folder=tmp_path / "ranks"):
        assert DIVIDED in told[1].engine
        assert told[1].losses == pytest.approx(told[0].losses, abs=1e-6)
        assert told[1].eval_losses == pytest.approx(told[0].eval_losses, abs=1e-6)


def train_both(number: int, base_model: Path, tokens: Path, folder: Path, changes: dict[str, Any]) -> tuple[Told, Told]:
    return (
        Told(base_model, tokens, folder / "whole", changes),
        Told(base_model, tokens, folder / "divided", {**changes, "strategy": "fsdp"}),
    )
