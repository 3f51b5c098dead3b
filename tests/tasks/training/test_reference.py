"""The plain loop is the oracle: first it is held against arithmetic of others, then the real loop against it."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from peft import PeftModel

from schemas.config import TrainingConfig
from tasks.models import load_model, load_tokenizer
from tasks.tokenization.labels import Example, write_ids
from tasks.tokenization.templates import prepare_tokenizer
from tasks.training.loop import train_adapter
from tasks.training.lora import attach_adapter, collect_trained
from tasks.training.micro_batches import iterate_steps
from tasks.training.records import EvalRecord, StepRecord
from tasks.training.reference import average_loss, fine_tune, learning_rate, main, plan_steps, sum_losses
from tasks.training.schedule import compute_learning_rate
from tests.tasks.tokenization.oracle import trained_runs
from tests.tasks.training.conftest import KINDS, build_model, build_tokenizer, read_tokens, write_tokens


def read_examples(tokens: Path, split: str = "train") -> dict[str, Example]:
    rows = pl.read_parquet(tokens / f"{split}.parquet", columns=["example_id", "input_ids", "labels"]).rows()
    return {name: Example(write_ids(ids), tuple(trained_runs(labels))) for name, ids, labels in rows}


def test_loss_is_the_models_own(base_model: Path, tokens: Path) -> None:
    model = load_model(base_model)
    for example in list(read_examples(tokens).values())[:5]:
        own = model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
        count = sum(label != -100 for label in example.labels)
        assert sum_losses(model, example).item() / count == pytest.approx(own.item(), abs=1e-5)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_real_loop_has_the_same_losses_over_20_steps(tmp_path: Path, kind: str, packing: bool) -> None:
    base_model = build_model(tmp_path / "model", kind)
    # 44 rows in steps of 3 x 2: the last step of each epoch has 2 rows, in one micro batch.
    tokens = write_tokens(tmp_path / "tokens", num_train=110 if packing else 44)
    config = TrainingConfig(
        rank=4, alpha=8, learning_rate=1e-2, micro_batch=3, gradient_accumulation_steps=2, max_steps=20,
        num_epochs=9, packing=packing, tokens_per_pack=40, weight_decay=0.01, max_grad_norm=0.5,
    )  # fmt: skip
    records: list[StepRecord] = []
    evaluations: list[EvalRecord] = []
    outcome = train_adapter(
        base_model, tokens, tmp_path / "run", config, seed=7, identity="x",
        on_step=records.append, on_eval=evaluations.append,
    )  # fmt: skip

    examples = read_examples(tokens)
    table, rows = read_tokens(tokens / "train.parquet", packing=packing, tokens_per_pack=40)
    batches = iterate_steps(table, rows, config, seed=7, first=0, last=20)
    steps = [[examples[name] for batch in step for name in batch.example_ids] for step in batches]
    model: Any = attach_adapter(load_model(base_model), config, seed=7).train()
    rates = [learning_rate(step, 20, config) for step in range(20)]
    losses = list(fine_tune(model, steps, rates, max_grad_norm=0.5, weight_decay=0.01))

    assert len({len(step) for step in steps}) > 1
    assert [record.learning_rate for record in records] == pytest.approx(rates)
    assert losses[-1] < losses[0] - 0.2  # it did learn
    assert max(abs(record.loss - loss) for record, loss in zip(records, losses, strict=True)) <= 1e-4
    held_out = list(read_examples(tokens, "eval").values())
    assert evaluations[-1].loss == pytest.approx(average_loss(model, held_out), abs=1e-4)
    assert outcome.num_steps == 20


def test_runs_alone_from_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base_model = build_tokenizer(build_model(tmp_path / "model", vocab_size=120))
    rows = [{"instruction": f"say {word}", "input": "", "output": word * 2} for word in "abcdefgh"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        f"model: {{base_model: {base_model}}}\n"
        f"data: {{source: {tmp_path / 'rows.jsonl'}, eval_fraction: 0.25}}\n"
        "training: {rank: 4, micro_batch: 2, num_epochs: 8, learning_rate: 0.01}\n"
    )
    main(tmp_path / "run.yaml", output=tmp_path / "adapter", question="say a")
    told, _, answer = capsys.readouterr().out.partition("\nsay a\n")
    *lines, saved = told[told.index("held-out loss ") :].splitlines()
    assert lines[0].startswith("held-out loss ")
    assert lines[-1].startswith("held-out loss ")
    assert saved == f"adapter and tokenizer in {tmp_path / 'adapter'}"
    model: Any = PeftModel.from_pretrained(load_model(base_model), str(tmp_path / "adapter")).eval()
    tokenizer: Any = load_tokenizer(tmp_path / "adapter")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say a"}], add_generation_prompt=True, return_dict=False, return_tensors="pt"
    )
    stops = list(prepare_tokenizer(base_model, None).stop_token_ids)
    output = model.generate(input_ids=ids, max_new_tokens=128, do_sample=False, eos_token_id=stops)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer == f"{expected}\n"
    # 6 of the 8 rows are trained, in steps of 2: 3 steps an epoch.
    assert [line.split()[1] for line in lines[1:-1]] == [f"{step}/24" for step in range(1, 25)]
    losses = [float(line.split()[3]) for line in lines[1:-1]]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


def test_trains_and_saves_all_weights_and_all_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base_model = build_tokenizer(build_model(tmp_path / "model", vocab_size=120))
    rows = [{"instruction": f"say {word}", "input": "", "output": word * 2} for word in "abcd"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        f"model: {{base_model: {base_model}}}\n"
        f"data: {{source: {tmp_path / 'rows.jsonl'}, eval_fraction: 0}}\n"
        "training: {method: full, micro_batch: 2, num_epochs: 2, learning_rate: 0.003}\n"
    )
    main(tmp_path / "run.yaml", output=tmp_path / "trained")
    told = capsys.readouterr().out
    assert told.count("no row is held out\n") == 2
    assert told.endswith(f"model and tokenizer in {tmp_path / 'trained'}\n")
    before, after = load_model(base_model), load_model(tmp_path / "trained")
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert not torch.equal(old, new), name


def test_any_model_with_or_without_an_adapter(base_model: Path, tokens: Path) -> None:
    examples = list(read_examples(tokens).values())[:4]
    whole = load_model(base_model).train()
    before = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    losses = list(fine_tune(whole, [examples] * 6, [1e-2] * 6))
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in whole.named_parameters())

    adapted = attach_adapter(load_model(base_model), TrainingConfig(rank=4), seed=0)
    losses = list(fine_tune(adapted, [examples] * 6, [1e-2] * 6))
    assert losses[-1] < losses[0]
    frozen = {name: p for name, p in adapted.named_parameters() if name not in collect_trained(adapted)}
    for name, parameter in frozen.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(parameter, before[plain])


def test_steps_see_each_example_once_an_epoch() -> None:
    examples = [Example(write_ids([number]), ()) for number in range(10)]
    config = TrainingConfig(micro_batch=2, gradient_accumulation_steps=2, num_epochs=2)
    steps = list(plan_steps(examples, config, seed=0))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(example.input_ids[0] for step in epoch for example in step) == list(range(10))


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
def test_both_loops_have_one_schedule(scheduler: str) -> None:
    config = TrainingConfig.model_validate({"scheduler": scheduler, "warmup_fraction": 0.25})
    for step in range(30):
        assert learning_rate(step, 30, config) == compute_learning_rate(step, 30, config)
