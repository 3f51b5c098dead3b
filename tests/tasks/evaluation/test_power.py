"""The smallest effect that is told before training is the one that the comparison then finds four times out of five."""

import numpy as np
import pytest

from schemas.config import EvaluationConfig, GateConfig
from tasks.evaluation import paired
from tasks.evaluation.power import expect_effects, find_smallest_effect
from tests.tasks.evaluation.test_comparison import make_rows


@pytest.mark.parametrize("num", [30, 150])
def test_an_effect_of_this_size_is_found_in_about_four_of_five_cases(num: int) -> None:
    source = np.random.default_rng(2)
    num_draws, correlation = 400, 0.5
    common = source.normal(size=(num, num_draws))
    common, rest = np.sqrt(correlation) * common, np.sqrt(1 - correlation)
    sides = [common + rest * source.normal(size=(num, num_draws)) for _ in range(2)]
    found = []
    for draw in range(num_draws):
        base = sides[0][:, draw]
        effect = find_smallest_effect(base, np.ones(num), is_binary=False, level=0.05)
        assert effect is not None
        found.append(sides[1][:, draw] + effect - base)
    p_values = paired.randomize(np.stack(found, axis=1), paired.draw_signs(num, 1000, source))
    assert 0.7 < (p_values <= 0.05).mean() < 0.9


def test_right_or_wrong_needs_six_changes_even_when_none_is_to_the_worse() -> None:
    wrong = np.zeros(205)
    effect = find_smallest_effect(wrong, np.ones(205), is_binary=True, level=0.05)
    # Of 205 rows, 8 in the mean hit at least six in 81 % of the cases, 7 in 70 %.
    assert effect == pytest.approx(8 / 205)
    assert find_smallest_effect(np.zeros(5), np.ones(5), is_binary=True, level=0.05) is None
    assert find_smallest_effect(np.zeros(1), np.ones(1), is_binary=False, level=0.05) is None


def test_the_sentence_names_conversations_size_and_limits() -> None:
    rows = make_rows([0] * 205)
    gate = GateConfig(metric="exact_match", min_gain=0.5)
    sentence, warnings = expect_effects(rows, {}, EvaluationConfig(), gate)
    assert sentence == (
        "205 held-out conversations can show a change of 3.9 % in exact_match (registry.gate.min_gain = 0.5 asks for "
        "more), in four of five cases; smaller ones look like chance"
    )
    assert warnings == ()


def test_rows_of_one_conversation_count_once_and_too_few_are_a_warning() -> None:
    rows = make_rows([0, 1] * 20, nll=np.linspace(1, 3, 40))
    together = {example: str(place // 2) for place, example in enumerate(rows["example_id"])}
    sentence, warnings = expect_effects(rows, together, EvaluationConfig(), GateConfig())
    assert sentence.startswith("20 held-out conversations can show a change of ")
    assert (
        "20 held-out conversations are too few to promote a version: registry.gate.min_conversations is 30"
        in (warnings[0])
    )
    assert expect_effects(rows, {}, EvaluationConfig(), GateConfig())[1] == ()
    two, _ = expect_effects(rows.head(2), {}, EvaluationConfig(), GateConfig(metric="exact_match"))
    assert two.startswith("2 held-out conversations can show no change of exact_match, however large")
