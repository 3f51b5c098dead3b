"""What is said of an export is what two tables of probabilities say."""

from pathlib import Path

import polars as pl
import pytest
import torch

from tasks.exporting.proof import AnswerPlaces, compare_distributions, read_examples


def test_divergence_agreement_and_ends_by_hand() -> None:
    parent = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]).log()
    export = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [0.4, 0.3, 0.3]]).log()
    found = compare_distributions(parent, export, stops=[2])
    first = 0.5 * torch.tensor(2.0).log() + 0.25 * torch.tensor(0.5).log()
    assert found.largest_kl > float(first)
    assert found.agreement == found.acceptance == pytest.approx(1 / 3)
    tied = torch.tensor([[0.48, 0.5, 0.02], [0.3, 0.5, 0.2]]).log()
    turned = torch.tensor([[0.5, 0.48, 0.02], [0.5, 0.3, 0.2]]).log()
    near = compare_distributions(tied, turned, stops=[])
    assert (near.agreement, near.acceptance) == (0.0, 0.5)
    assert (found.num_positions, found.num_stops, found.stop_agreement) == (3, 1, 0.0)
    same = compare_distributions(parent, parent, stops=[0, 2])
    assert (same.mean_kl, same.agreement, same.num_stops, same.stop_agreement) == (0.0, 1.0, 2, 1.0)
    assert compare_distributions(parent, export, stops=[7]).stop_agreement == 1.0


def test_positions_are_those_before_a_trained_token_up_to_the_limit(tmp_path: Path) -> None:
    ids = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    labels = [[-100, -100, 3, 4], [-100, -100], [7, 8, 9]]
    pl.DataFrame({"input_ids": ids, "labels": labels}).write_parquet(tmp_path / "eval.parquet")
    whole = [AnswerPlaces([1, 2, 3, 4], [1, 2]), AnswerPlaces([7, 8, 9], [0, 1])]  # nothing predicts the first token
    assert read_examples(tmp_path / "eval.parquet") == whole
    assert read_examples(tmp_path / "eval.parquet", most=3)[1].positions == [0]
