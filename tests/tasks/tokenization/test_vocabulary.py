"""An id that words or the chat template need has a row in the embedding; other added tokens are told of."""

from pathlib import Path

import pytest

from tasks.tokenization.templates import TemplateError, prepare_tokenizer
from tasks.tokenization.vocabulary import check_vocabulary

FOLDER = Path("deploy/demo/base_model")  # 2,044 words, <|endoftext|>, <|pad|>, <|im_start|>, <|im_end|>


def test_ids_that_are_needed_have_rows() -> None:
    prepared = prepare_tokenizer(FOLDER, None)
    assert check_vocabulary(prepared, FOLDER, 2048) == ()
    highest = max(prepared.tokenizer.get_vocab().values())
    for num_rows in (2000, highest):  # words, and what chatml writes
        with pytest.raises(TemplateError, match=rf"embedding has {num_rows} rows: take the tokenizer that belongs"):
            check_vocabulary(prepared, FOLDER, num_rows)


def test_an_added_token_that_nothing_needs_is_told_of() -> None:
    prepared = prepare_tokenizer(FOLDER, None)
    prepared.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    number = max(prepared.tokenizer.get_vocab().values())
    (told,) = check_vocabulary(prepared, FOLDER, number)
    assert told.startswith(f"The tokenizer has 1 added token without a row in the model's embedding ({number} rows)")
    assert "pads with" not in told
    prepared.tokenizer.pad_token = "<image>"
    (told,) = check_vocabulary(prepared, FOLDER, number)
    assert told.endswith("whoever pads with '<image>' gets an error: set another pad_token")
