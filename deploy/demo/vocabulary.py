"""The tokenizer: byte-level BPE, trained on the pretraining text, of the same make as Qwen's."""

import json
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, TURN_START, TURN_END)
"""The last entries of the vocabulary. The turn markers are there for fine-tuning; no text of the demo holds them."""


def train_tokenizer(documents: list[str], vocab_size: int = VOCAB_SIZE) -> Qwen2Tokenizer:
    """Return a tokenizer of `vocab_size` entries, special tokens included.

    In training every character off ASCII stands alone, so that no entry spans two Chinese characters: a name has the
    same tokens in every sentence. Qwen's own splitting, with which the tokenizer ships, keeps such characters
    together, and still gives the same tokens, because UTF-8 has no merge that crosses from one character to the next.
    """
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[^\x00-\x7F]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(documents, trainer)
    return ship_tokenizer(trained)


def ship_tokenizer(trained: Tokenizer) -> Qwen2Tokenizer:
    """Return a Qwen tokenizer with the trained entries, the special tokens behind them, and no chat template."""
    model = json.loads(trained.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    for token in SPECIAL_TOKENS:
        vocab[token] = len(vocab)
    merges: Any = [tuple(merge) for merge in model["merges"]]
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        unk_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=512,
    )
