"""Held-out pairs: both answers' likelihoods, and how far a model prefers the right one more than its base."""

import math
from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from schemas.config import DpoConfig, EvaluationConfig, GateConfig, RunConfig
from tasks.evaluation.comparison import compare
from tasks.evaluation.gate import judge
from tasks.evaluation.power import expect_effects
from tasks.evaluation.preferences import add_rewards, find_runs, has_pairs
from tasks.evaluation.scoring import evaluate_model
from tasks.evaluation.verdict import state_verdict
from tests.tasks.evaluation.test_scoring import END, PROMPTS, TARGETS, make_model, save, write_tokens

REJECTED = [[12, END], [10, 11, 12, END], [12, 12, END]]
_RUN = {"model": {"base_model": "m"}, "data": {"source": "d.jsonl"}}


def add_rejected(tokens: Path) -> Path:
    """Make pairs of the rows; the second rejected answer has two turns."""
    frame = pl.read_parquet(tokens / "eval.parquet")
    ids = [prompt + answer for prompt, answer in zip(PROMPTS, REJECTED, strict=True)]
    labels = [[-100] * len(prompt) + answer for prompt, answer in zip(PROMPTS, REJECTED, strict=True)]
    labels[1][len(PROMPTS[1]) + 1] = -100
    kind = pl.List(pl.Int32)
    columns = [pl.Series("rejected_ids", ids, dtype=kind), pl.Series("rejected_labels", labels, dtype=kind)]
    frame.with_columns(columns).write_parquet(tokens / "eval.parquet")
    return tokens


def test_both_answers_are_scored_at_their_own_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = add_rejected(write_tokens(tmp_path / "tokens", tokenizer))
    model = make_model()
    rows, metrics, _ = evaluate_model(save(model, tmp_path / "model"), tokens, EvaluationConfig(max_new_tokens=2))
    assert has_pairs(rows)
    assert "preference_loss" not in metrics
    assert rows["rejected_tokens"].to_list() == [2, 3, 3]
    assert rows["chosen_nll"].to_list() == pytest.approx(rows["nll_sum"].to_list())
    assert rows["chosen_tokens"].to_list() == [len(target) for target in TARGETS]
    skipped: list[set[int]] = [set(), {1}, set()]
    for place, (prompt, answer) in enumerate(zip(PROMPTS, REJECTED, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        wanted = sum(
            -float(logits[len(prompt) + at - 1, token]) for at, token in enumerate(answer) if at not in skipped[place]
        )
        assert rows["rejected_nll"][place] == pytest.approx(wanted, rel=1e-4)


def test_runs_of_labels() -> None:
    assert find_runs([-100, 5, 6, -100, 7]) == ((1, 3), (4, 5))
    assert find_runs([-100]) == ()


def make_rows(margins: list[float], num_tokens: int = 2) -> pl.DataFrame:
    """Make rows of a model that prefers the chosen answers by so many nats."""
    count = len(margins)
    measured = ("exact_match", "rouge_l", "chrf", "repetition_rate", "empty_answers", "answer_tokens")
    return pl.DataFrame(
        {
            "example_id": [f"{at:016x}" for at in range(count)],
            "question": ["?"] * count,
            "reference": ["!"] * count,
            "answer": ["!"] * count,
            "nll_sum": [4.0] * count,
            "num_tokens": [num_tokens] * count,
            **{name: [0.0] * count for name in measured},
            "chosen_nll": [4.0] * count,
            "chosen_tokens": [num_tokens] * count,
            "rejected_nll": [4.0 + margin for margin in margins],
            "rejected_tokens": [num_tokens] * count,
        }
    )


def test_rewards_are_measured_from_the_base() -> None:
    base, tuned = make_rows([1.0, -2.0, 0.5]), make_rows([4.0, -2.0, -1.5])
    config = DpoConfig(beta=0.5)
    found = add_rewards(tuned, base, config)
    assert found["reward_margin"].to_list() == pytest.approx([1.5, 0.0, -1.0])
    assert found["reward_accuracy"].to_list() == [1.0, 0.5, 0.0]
    wanted = [math.log1p(math.exp(-1.5)), math.log(2), math.log1p(math.exp(1.0))]
    assert found["preference_loss"].to_list() == pytest.approx(wanted)
    itself = add_rewards(base, base, config)
    assert itself["preference_loss"].to_list() == pytest.approx([math.log(2)] * 3)
    by_token = add_rewards(tuned, base, DpoConfig(beta=0.5, loss="ipo"))
    assert by_token["reward_margin"].to_list() == pytest.approx([0.75, 0.0, -0.5])


def test_gate_judges_preferences_by_their_intervals() -> None:
    num = 40
    base = make_rows([float(at % 3) for at in range(num)])
    dpo = DpoConfig()
    gate = GateConfig(metric="reward_accuracy", further_metrics=("preference_loss",), guards={"chrf": None})
    decisions = {}
    for name, right in (("learned", 34), ("chance", 22)):
        gains = [3.0 if at < right else -3.0 for at in range(num)]
        tuned = make_rows([float(at % 3) + gain for at, gain in enumerate(gains)])
        comparison = compare(
            add_rewards(base, base, dpo), add_rewards(tuned, base, dpo), EvaluationConfig(), seed=0, judged=gate.metrics
        )
        assert comparison.after["reward_accuracy"] == right / num
        assert comparison.before["preference_loss"] == pytest.approx(math.log(2))
        decisions[name] = judge(comparison.delta, gate, num_conversations=num)
        if name == "learned":
            assert state_verdict(comparison)[1].startswith(
                "The fine-tuned model is better than the base model. Preference"
            )
    assert decisions["learned"].verdict == "promoted"
    assert decisions["learned"].reasons[0].startswith("reward_accuracy gained 0.35 over the base model (interval 0.")
    assert decisions["chance"].verdict == "refused"
    assert any("chance" in reason or "zero" in reason for reason in decisions["chance"].reasons)


def test_what_pairs_can_show_is_known_before() -> None:
    rows = make_rows([0.0] * 100)
    gate = GateConfig(metric="reward_accuracy")
    sentence, warnings = expect_effects(rows, {}, EvaluationConfig(), gate)
    assert sentence.startswith("100 held-out conversations can show a change of 14.")
    assert warnings == ()
    sentence, warnings = expect_effects(
        make_rows([0.0] * 9), {}, EvaluationConfig(), GateConfig(metric="preference_loss")
    )
    assert sentence == "What change of preference_loss 9 held-out conversations can show depends on what is learned"
    assert "too few to promote" in warnings[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"objective": "dpo"}}, "registry.gate.metric to preference_loss or reward_accuracy"),
        ({"registry": {"gate": {"metric": "reward_margin"}}}, "training.objective is sft"),
        ({"data": {"source": "d", "format": "preference"}}, "training.objective to dpo"),
        (
            {"training": {"objective": "dpo"}, "data": {"source": "d", "format": "alpaca", "eval_fraction": 0}},
            "data.format is alpaca",
        ),
        ({"training": {"dpo": {"loss": "hinge", "label_smoothing": 0.1}}}, "only sigmoid is smoothed"),
        ({"training": {"objective": "dpo", "router_aux_loss_coef": 0.1}}, "no such loss of pairs"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RunConfig.model_validate({**_RUN, **changes})
