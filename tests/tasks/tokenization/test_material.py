"""The law and the serve parity on tokenizers and templates that nobody here wrote."""

from collections import Counter

import pytest
from transformers import PreTrainedTokenizerBase

from schemas.config import TokenizationConfig
from tasks.tokenization.masking import MaskError, build_examples
from tests.tasks.tokenization import oracle
from tests.tasks.tokenization.conversations import CONVERSATIONS
from tests.tasks.tokenization.material import OWN_ENDINGS, TEMPLATES, TOKENIZERS, dress, family_of, load

pytestmark = pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="borrowed tokenizers are not here")
LONG = TokenizationConfig(max_length=100_000)
# A small vocabulary of each kind carries the templates: byte-level BPE, and sentence-piece BPE with a prefix space.
CARRIERS = ("minimind", "tok512-tinystories")
TEMPLATE_NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
# Generation prompts that open a thought: rows without reasoning are refused.
THINKING = ("trl__deepseekv3", "trl__nemotron")


def judge_all(tokenizer: PreTrainedTokenizerBase, end_of_turn: str | None) -> tuple[Counter[str], list[str]]:
    """Return how many conversations were kept, refused or wrong, and what was wrong."""
    kinds: Counter[str] = Counter()
    wrong = []
    for shape, (messages, tools) in CONVERSATIONS.items():
        try:
            examples = build_examples(messages, tokenizer, tools=tools, config=LONG)
        except MaskError as error:
            kinds["refused"] += 1
            kinds[error.reason] += 1
            continue
        pairs = [(example.input_ids, example.labels) for example in examples]
        verdict = oracle.check(tokenizer, messages, tools, pairs, end_of_turn)
        kinds[verdict.kind] += 1
        if verdict.kind == "wrong":
            wrong.append(f"{shape}: {verdict.why}")
    return kinds, wrong


@pytest.mark.parametrize("name", sorted(OWN_ENDINGS))
def test_no_conversation_is_masked_wrongly_by_its_own_template(name: str) -> None:
    kinds, wrong = judge_all(load(name), OWN_ENDINGS[name])
    assert not wrong
    assert kinds["kept"] >= 15


@pytest.fixture(scope="module")
def carriers() -> dict[str, PreTrainedTokenizerBase]:
    return {name: load(name) for name in CARRIERS}


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_no_template_is_masked_wrongly(
    carriers: dict[str, PreTrainedTokenizerBase], carrier: str, template: str
) -> None:
    kinds, wrong = judge_all(dress(carriers[carrier], template), family_of(template)[3])
    assert not wrong
    if template.startswith(THINKING):
        assert kinds["missing_reasoning"] >= 14
        assert kinds["kept"] + kinds["not_representable"] >= 1
    else:
        assert kinds["kept"] >= 11
