import math
from pathlib import Path

import polars as pl
import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from schemas.config import EvaluationConfig
from schemas.records import EvaluationRows
from tasks.evaluation.scoring import EvaluationError, evaluate_model, find_last_run
from tests.tasks.evaluation.conftest import SIZES

# who are you ? -> i am red <|end|>; words are those of conftest.WORDS.
USER, ASSISTANT, END = 2, 3, 4
PROMPTS = [[USER, 5, 6, 7, 8, END, ASSISTANT], [USER, 5, 8, END, ASSISTANT], [USER, 6, 7, 8, END, ASSISTANT]]
TARGETS = [[9, 10, 11, END], [9, 10, 12, END], [11, END]]
QUESTION = "who ?"


def make_model(vocab_size: int = 13) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = SIZES | {"vocab_size": vocab_size, "initializer_range": 0.1, "eos_token_id": 1}
    return Qwen3ForCausalLM(Qwen3Config(head_dim=8, tie_word_embeddings=False, **config)).eval()


def write_tokens(folder: Path, tokenizer: PreTrainedTokenizerFast, labels: list[list[int]] | None = None) -> Path:
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = [prompt + target for prompt, target in zip(PROMPTS, TARGETS, strict=True)]
    masks = [[-100] * len(prompt) + target for prompt, target in zip(PROMPTS, TARGETS, strict=True)]
    frame = pl.DataFrame(
        {
            "example_id": [f"{at:016x}" for at in range(3)],
            "question": ["who are you ?", "who ?", "are you ?"],
            "reference": ["i am red", "i am blue", "red"],
            "input_ids": pl.Series(rows, dtype=pl.List(pl.Int32)),
            "labels": pl.Series(labels or masks, dtype=pl.List(pl.Int32)),
        }
    )
    frame.write_parquet(folder / "eval.parquet")
    return folder


def save(model: Qwen3ForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_a_model_that_has_learned_the_rows_answers_them_word_for_word(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        for prompt, target in zip(PROMPTS, TARGETS, strict=True):
            labels = torch.tensor([[-100] * len(prompt) + target])
            model(input_ids=torch.tensor([prompt + target]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seen: list[tuple[int, int]] = []
    rows, metrics, answers = evaluate_model(
        save(model, tmp_path / "model"),
        write_tokens(tmp_path, tokenizer),
        EvaluationConfig(batch_size=2, max_new_tokens=8, questions=(QUESTION,)),
        lambda done, whole: seen.append((done, whole)),
    )
    assert rows["reference"].to_list() == ["i am red", "i am blue", "red"]
    assert rows["answer"].to_list() == ["i am red", "i am blue", "red"]
    assert rows["num_tokens"].to_list() == [4, 4, 2]
    assert rows["answer_tokens"].to_list() == [3, 3, 1]
    assert metrics["exact_match"] == 1.0
    assert metrics["chrf"] == pytest.approx(100.0)
    assert 1.0 < metrics["perplexity"] < 1.1
    # The free question is the second row's, word for word.
    assert answers == [(QUESTION, "i am blue")]
    # Three rows for their answers and once more for their likelihood, and a question.
    assert seen[-1] == (7, 7)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_row_without_an_answer_is_still_a_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    # All logits zero: each of the 13 words is as likely, and the first, 0, is taken; let it end the answer.
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [0, 1]
    rows, metrics, answers = evaluate_model(
        save(model, tmp_path / "model"), write_tokens(tmp_path, tokenizer), EvaluationConfig(questions=(QUESTION,))
    )
    assert rows["answer"].to_list() == ["", "", ""]
    assert rows["nll_sum"].to_list() == pytest.approx([4 * math.log(13), 4 * math.log(13), 2 * math.log(13)])
    assert metrics["perplexity"] == pytest.approx(13.0)
    assert metrics["exact_match"] == metrics["chrf"] == metrics["answer_tokens"] == 0.0
    assert answers == [(QUESTION, "")]
    EvaluationRows.validate(rows)


def test_the_generation_config_beside_the_tokenizer_ends_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, folder = save(make_model(), tmp_path / "model"), write_tokens(tmp_path, tokenizer)
    config = EvaluationConfig(max_new_tokens=6)
    rows, _, _ = evaluate_model(model, folder, config)
    assert 6.0 in rows["answer_tokens"]
    GenerationConfig(eos_token_id=list(range(13))).save_pretrained(str(folder / "tokenizer"))
    rows, _, _ = evaluate_model(model, folder, config)
    assert rows["answer_tokens"].to_list() == [0, 0, 0]


def test_only_the_first_rows_are_evaluated(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder, model = write_tokens(tmp_path, tokenizer), save(make_model(), tmp_path / "model")
    rows, _, _ = evaluate_model(model, folder, EvaluationConfig(max_examples=2))
    assert rows["example_id"].to_list() == ["0" * 16, "0" * 15 + "1"]


def test_ids_that_the_model_lacks_get_the_mean_embedding(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    # The model knows 0 to 10; 11 and 12 are new, and as likely as the mean of the known.
    model = make_model(vocab_size=11)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    config = EvaluationConfig(max_new_tokens=2)
    rows, _, _ = evaluate_model(save(model, tmp_path / "model"), write_tokens(tmp_path, tokenizer), config)
    assert rows["nll_sum"].to_list() == pytest.approx([4 * math.log(13), 4 * math.log(13), 2 * math.log(13)])
    again, _, _ = evaluate_model(tmp_path / "model", tmp_path, config)
    assert again.equals(rows)


def test_the_last_run_of_labels_is_what_is_asked_for() -> None:
    assert find_last_run([-100, 5, 6, -100, -100, 7, 8, -100]) == (5, 7)
    assert find_last_run([-100, -100, 7]) == (2, 3)
    assert find_last_run([7, 8]) == (0, 2)
    assert find_last_run([-100, -100]) is None
    assert find_last_run([]) is None


def test_examples_that_cannot_be_evaluated_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [prompt + target for prompt, target in zip(PROMPTS, TARGETS, strict=True)]
    model = save(make_model(), tmp_path / "model")
    write_tokens(tmp_path, tokenizer, labels=rows)
    with pytest.raises(EvaluationError, match=r"example_id 0{16} has nothing before its answer.*train_on_prompt off"):
        evaluate_model(model, tmp_path, EvaluationConfig())
    write_tokens(tmp_path, tokenizer, labels=[[-100] * len(row) for row in rows])
    with pytest.raises(EvaluationError, match=r"example_id 0{16} has no token with a label"):
        evaluate_model(model, tmp_path, EvaluationConfig())


def test_without_held_out_rows_the_questions_are_asked(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = save(make_model(), tmp_path / "model")
    write_tokens(tmp_path, tokenizer)
    asking = EvaluationConfig(questions=("abc",), max_new_tokens=4)
    _, _, before = evaluate_model(model, tmp_path, asking)
    expected = pl.read_parquet(tmp_path / "eval.parquet")
    expected.clear().write_parquet(tmp_path / "eval.parquet")
    rows, metrics, answers = evaluate_model(model, tmp_path, asking)
    assert (rows.height, metrics, answers) == (0, {}, before)
    assert evaluate_model(tmp_path / "no model", tmp_path, EvaluationConfig())[0].columns == rows.columns


def test_an_example_beyond_the_context_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    model.config.max_position_embeddings = 10
    with pytest.raises(EvaluationError, match=r"0{16} has 11 tokens, but the model's context is 10.*at most 10"):
        evaluate_model(save(model, tmp_path / "model"), write_tokens(tmp_path, tokenizer), EvaluationConfig())


def test_a_broken_model_is_an_error(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(EvaluationError, match=r"example_id 0{16}: the model gives a likelihood of nan"):
        evaluate_model(save(model, tmp_path / "model"), write_tokens(tmp_path, tokenizer), EvaluationConfig())
