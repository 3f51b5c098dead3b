"""Whether a model's embedding has a row for each id that its tokenizer gives."""

from contextlib import suppress
from pathlib import Path

from schemas.plurals import count_of
from tasks.tokenization.errors import MaskError
from tasks.tokenization.masking import build_examples
from tasks.tokenization.templates import PreparedTokenizer, TemplateError

_PROBE = ({"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."})
_NAMED = 3


def check_vocabulary(prepared: PreparedTokenizer, folder: Path, num_rows: int) -> tuple[str, ...]:
    """Refuse a tokenizer that needs ids beyond the embedding: for words, or for what the template writes around them.

    Added tokens that neither needs are no reason: Gemma 3's tokenizer has one for images, its text models no row of it.

    Args:
        prepared: the tokenizer.
        folder: of the model, for the sentence.
        num_rows: of the embedding.

    Returns:
        A sentence about added tokens without a row; none where there are none.

    Raises:
        TemplateError: an id that is needed has no row.
    """
    tokenizer = prepared.tokenizer
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    needed = {index: text for text, index in tokenizer.get_vocab().items() if index not in added}
    with suppress(MaskError):  # a template that refuses the probe is judged by its rows
        written = (index for example in build_examples(_PROBE, tokenizer) for index in example.input_ids)
        needed |= {index: added[index] for index in (*written, *prepared.stop_token_ids) if index in added}
    highest = max(needed, default=-1)
    if highest >= num_rows:
        raise TemplateError(
            f"{folder}: the tokenizer writes {needed[highest]!r} as id {highest}, and the model's embedding has "
            f"{num_rows} rows: take the tokenizer that belongs to this model, resize its embedding (transformers' "
            "resize_token_embeddings), or, where the token is the chat template's, set model.chat_template to another"
        )
    beyond = sorted(index for index in added if index >= num_rows)
    if not beyond:
        return ()
    names = ", ".join(repr(added[index]) for index in beyond[:_NAMED])
    pads = tokenizer.pad_token_id is not None and int(tokenizer.pad_token_id) >= num_rows
    return (
        f"The tokenizer has {count_of(len(beyond), 'added token')} without a row in the model's embedding ({num_rows} "
        f"rows), such as {names}: a row of the dataset that writes one cannot be trained"
        + (f", and whoever pads with {tokenizer.pad_token!r} gets an error: set another pad_token" if pads else ""),
    )
