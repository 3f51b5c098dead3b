"""`sft init` writes a config that loads, and whose numbers are those of the data."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.first_config import choose_fraction, choose_length
from schemas.loading import load_config

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "base_model"


def write_rows(path: Path, count: int, answer: str) -> Path:
    rows = [{"instruction": f"Question {number}?", "output": f"{answer} {number}."} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("num_rows", "fraction"), [(100, 0.2), (200, 0.18), (400, 0.1), (5_000, 0.1), (50_000, 0.01), (0, 0.2)]
)
def test_enough_is_held_out_for_the_gate_and_not_much_more(num_rows: int, fraction: float) -> None:
    assert choose_fraction(num_rows) == fraction


@pytest.mark.parametrize(
    ("longest", "context", "length"), [(51, 32768, 512), (513, 32768, 1024), (2048, 32768, 2048), (9000, 4096, 4096)]
)
def test_length_holds_the_longest_example(longest: int, context: int, length: int) -> None:
    assert choose_length(longest, context) == length


@pytest.mark.parametrize(("answer", "metric"), [("Yes", "exact_match"), ("A long answer of many words, " * 8, "nll")])
def test_the_config_loads_and_says_what_was_found(tmp_path: Path, answer: str, metric: str) -> None:
    data, config = write_rows(tmp_path / "support rows.jsonl", 200, answer), tmp_path / "mine.yaml"
    result = CliRunner().invoke(app, ["init", str(data), str(MODEL), "--output", str(config)])
    assert result.exit_code == 0, result.output
    loaded = load_config(config)
    assert (loaded.data.source, loaded.model.base_model) == (str(data), str(MODEL))
    assert (loaded.data.eval_fraction, loaded.registry.gate.metric) == (0.18, metric)
    assert loaded.registry.name == "base_model-support-rows".replace("_", "-")
    assert "Made from 200 rows" in config.read_text()
    again = CliRunner().invoke(app, ["init", str(data), str(MODEL), "--output", str(config)])
    assert again.exit_code == 1
    assert "is there already" in again.output


def test_pairs_of_answers_get_a_config_that_trains_the_preference(tmp_path: Path) -> None:
    data, config = tmp_path / "pairs.jsonl", tmp_path / "mine.yaml"
    rows = [{"prompt": f"q {number}", "chosen": f"good {number}", "rejected": f"bad {number}"} for number in range(200)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(app, ["init", str(data), str(MODEL), "--output", str(config)])
    assert result.exit_code == 0, result.output
    loaded = load_config(config)
    assert (loaded.training.objective, loaded.training.learning_rate) == ("dpo", 1e-5)
    assert loaded.registry.gate.metric == "reward_accuracy"


def test_entries_of_an_index_give_the_name(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", 50, "Yes")
    columns = {"prompt": "instruction", "response": "output"}
    index = {"my_rows": {"file_name": "a.jsonl", "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(index))
    config = tmp_path / "mine.yaml"
    command = ["init", f"{tmp_path}/dataset_info.json#my_rows", str(MODEL), "--output", str(config)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert load_config(config).registry.name == "base-model-my-rows"


def test_columns_of_other_names_are_mapped_as_the_error_says(tmp_path: Path) -> None:
    data, config = tmp_path / "odd.csv", tmp_path / "mine.yaml"
    data.write_text("Frage,Antwort\n" + "".join(f"Frage {number}?,Antwort {number}\n" for number in range(60)))
    result = CliRunner().invoke(app, ["init", str(data), str(MODEL)])
    assert result.exit_code == 1
    assert "--set 'data.columns={prompt: ONE_OF_YOURS, completion: ANOTHER}'" in result.output
    mapping = ["--set", "data.columns={prompt: Frage, completion: Antwort}", "--set", "data.screen=report"]
    result = CliRunner().invoke(app, ["init", str(data), str(MODEL), *mapping, "--output", str(config)])
    assert result.exit_code == 0, result.output
    loaded = load_config(config).data
    assert (loaded.columns, loaded.screen) == ({"prompt": "Frage", "completion": "Antwort"}, "report")
    for wrong, told in (("training.rank=8", "only settings of data"), ("data.colums={}", "did you mean columns?")):
        result = CliRunner().invoke(app, ["init", str(data), str(MODEL), "--set", wrong])
        assert result.exit_code == 1
        assert told in " ".join(result.output.split())


def test_the_first_line_and_the_fraction_do_not_contradict_each_other(tmp_path: Path) -> None:
    data, config = write_rows(tmp_path / "rows.jsonl", 200, "Yes"), tmp_path / "mine.yaml"
    with data.open("a") as file:
        file.write('{"instruction": "Question 0?", "output": "Yes 0."}\n')
    assert CliRunner().invoke(app, ["init", str(data), str(MODEL), "--output", str(config)]).exit_code == 0
    text = config.read_text()
    assert text.startswith("# Made from 201 rows: 200 to train on or hold out, 1 duplicate.\n")
    assert "0.18         # about 36 of them are held out" in text


def test_rows_that_are_neither_conversations_nor_pairs_are_told_as_conversations(tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "Once upon a time"}\n' * 50)
    result = CliRunner().invoke(app, ["init", str(data), str(MODEL)])
    assert result.exit_code == 1
    assert "rows of plain text (continued pretraining) hold no answer" in result.output


def test_data_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["init", str(tmp_path / "nowhere.jsonl"), str(MODEL)])
    assert result.exit_code == 1
    assert "nowhere.jsonl" in result.output
