"""A served model that is not the recorded version is found out, fault by fault; honest servings never are."""

import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from schemas.proofs import ServingProbes
from tasks.models import load_model, load_tokenizer
from tasks.prompts import make_prompt
from tasks.proving import replay
from tasks.proving.verdict import Proof, judge_replies
from tasks.serving import app as app_module
from tasks.serving.app import create_app
from tasks.serving.engine import AnswerEngine, Sampling
from tasks.serving.lanes import CohortLanes
from tasks.serving.protocol import ChatRequest
from tasks.serving.served_model import ServedModel, open_served
from tests.tasks.serving.conftest import listening
from tests.tasks.serving.parrot import BASE_MODEL

pytestmark = pytest.mark.slow
NUM_HONEST = 50 if os.environ.get("SFT_SERVICE_TESTS") == "all" else 20
PADDED = 0
_TELLING = dict(replay._IDS)
Change = Callable[[Any], None]


@contextmanager
def opening(
    folder: Path, change: Change = lambda model: None, tokenizer: Any = None, **options: Any
) -> Iterator[ServedModel]:
    """Serve a folder whose weights were changed in memory."""
    model: Any = load_model(folder)
    with torch.no_grad():
        change(model)
    served = open_served(model, tokenizer or load_tokenizer(folder), folder, names=("parrot",), **options)
    try:
        yield served
    finally:
        served.close()


def prove(served: ServedModel, probes: ServingProbes, **options: Any) -> Proof:
    with listening(create_app(served)) as url:
        return judge_replies(replay.ask_all(url, probes), probes, **options)


def _mix(share: float, layers: tuple[str, ...] = ("",)) -> Change:
    """Put a share of the base model's weights in, in some layers."""

    def change(model: Any) -> None:
        theirs = load_model(BASE_MODEL).state_dict()
        for name, weight in model.state_dict().items():
            if any(layer in name for layer in layers):
                weight.lerp_(theirs[name], share)

    return change


def _quantize(model: Any) -> None:
    """Round each row of the layers' weights to 8 bits."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            step = layer.weight.abs().amax(dim=1, keepdim=True) / 127
            layer.weight.copy_((layer.weight / step).round() * step)


def _shift_tokens(folder: Path, place: Path) -> Any:
    """Save the tokenizer with the ids of its words moved on by one."""
    load_tokenizer(folder).save_pretrained(str(place))
    file = place / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    moved = sorted(number for number in vocabulary.values() if number >= 300)
    following = dict(zip(moved, moved[1:] + moved[:1], strict=True))
    values["model"]["vocab"] = {word: following.get(number, number) for word, number in vocabulary.items()}
    file.write_text(json.dumps(values), encoding="utf-8")
    return load_tokenizer(place)


_WEIGHTS: dict[str, tuple[Change, str]] = {
    "base served": (_mix(1.0), "it answers as its base model does"),
    "adapter not applied": (_mix(1.0, ("layers.2.", "layers.3.")), "log-probabilities differ by"),
    "older version": (_mix(0.02), "log-probabilities differ by"),
    "other precision": (lambda model: model.to(torch.bfloat16), "log-probabilities differ by"),
    "quantized copy": (_quantize, "log-probabilities differ by"),
}


@pytest.mark.parametrize("fault", _WEIGHTS)
def test_other_weights_are_found_out(fault: str, parrot: Path, probes: ServingProbes) -> None:
    change, told = _WEIGHTS[fault]
    with opening(parrot, change) as served:
        proof = prove(served, probes)
    assert proof.outcome == "different"
    assert any(told in reason for reason in proof.reasons), proof.reasons


def test_weights_in_16_bits_pass_where_they_are_meant(parrot: Path, probes: ServingProbes) -> None:
    with opening(parrot, _WEIGHTS["other precision"][0]) as served:
        proof = prove(served, probes, precision="bf16")
    assert (proof.outcome, proof.reasons) == ("same", ())


def test_another_template_is_found_out(parrot: Path, probes: ServingProbes) -> None:
    tokenizer: Any = load_tokenizer(parrot)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
        "{% endif %}"
    )
    with opening(parrot, tokenizer=tokenizer) as served:
        proof = prove(served, probes)
    assert any("another chat template" in reason for reason in proof.reasons), proof.reasons
    assert not any("other weights" in reason for reason in proof.reasons), proof.reasons  # the prompts may be all


def test_another_tokenizer_is_found_out(parrot: Path, probes: ServingProbes, tmp_path: Path) -> None:
    with opening(parrot, tokenizer=_shift_tokens(parrot, tmp_path)) as served:
        proof = prove(served, probes)
    assert any("as many tokens and other ids" in reason for reason in proof.reasons), proof.reasons


def test_a_lost_stop_token_is_found_out(parrot: Path, probes: ServingProbes) -> None:
    with opening(parrot) as served:
        served.engine.close()
        lanes = CohortLanes(load_model(parrot), num_rows=8)
        served.engine = AnswerEngine(lanes, frozenset())
        proof = prove(served, probes)
    assert any("a stop token is lost" in reason for reason in proof.reasons), proof.reasons


def test_forced_sampling_is_found_out(parrot: Path, probes: ServingProbes, monkeypatch: pytest.MonkeyPatch) -> None:
    def force(request: ChatRequest, default_temperature: float) -> Sampling:
        return Sampling(temperature=0.7, seed=1, num_logprobs=request.top_logprobs)

    monkeypatch.setattr(ChatRequest, "choose_sampling", force)
    with opening(parrot) as served:
        proof = prove(served, probes)
    assert any("sampling or a penalty is forced" in reason for reason in proof.reasons), proof.reasons


_make_prompt = make_prompt


def _write_bos_twice(tokenizer: Any, *rest: Any) -> list[int]:
    return [tokenizer.eos_token_id, *_make_prompt(tokenizer, *rest)]


def _add_system(tokenizer: Any, settings: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    has_one = messages[0]["role"] == "system"
    before = [] if has_one else [{"role": "system", "content": "You are a helpful assistant."}]
    return _make_prompt(tokenizer, settings, [*before, *messages], tools)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_write_bos_twice, "BOS is written twice"),
        (_add_system, "another default system message"),
        (lambda *given: _make_prompt(*given)[-256:], "the context is cut: the long prompt lost"),
    ],
    ids=["BOS twice", "other default system message", "truncated context"],
)
@pytest.mark.parametrize("tells_ids", [True, False])
def test_other_prompts_are_found_out(
    change: Callable[..., list[int]],
    told: str,
    tells_ids: bool,
    parrot: Path,
    probes: ServingProbes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app_module, "make_prompt", change)
    if not tells_ids:  # as servers that take no settings of vLLM's
        monkeypatch.setattr(replay, "_IDS", {})
    with opening(parrot) as served:
        proof = prove(served, probes)
    assert proof.knows_prompts is tells_ids
    assert any(told in reason for reason in proof.reasons), proof.reasons


def test_a_shorter_context_that_refuses_is_found_out(parrot: Path, probes: ServingProbes) -> None:
    with opening(parrot, length=256) as served:
        proof = prove(served, probes)
    assert any("requests were refused: long (status 400: the messages have" in reason for reason in proof.reasons)


@pytest.mark.parametrize("rows", [1, 3, 8, 16, PADDED])
def test_honest_servings_are_never_found_out(
    rows: int, parrot: Path, probes: ServingProbes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are answered at once, in slots or padded, and whoever else asks meanwhile."""
    source = random.Random(rows)
    worst = 0.0
    with ExitStack() as stack:
        served = stack.enter_context(opening(parrot, num_rows=rows or 8))
        if rows == PADDED:
            served.engine.close()
            served.engine = AnswerEngine(CohortLanes(load_model(parrot), num_rows=5), _stops(parrot))
        url = stack.enter_context(listening(create_app(served)))
        for number in range(NUM_HONEST // 5):
            monkeypatch.setattr(replay, "AT_ONCE", source.choice((1, 2, 4, 8)))
            monkeypatch.setattr(replay, "_IDS", source.choice(({}, _TELLING)))
            noise = threading.Thread(target=_disturb, args=(url, source.randrange(3)))
            noise.start()
            proof = judge_replies(replay.ask_all(url, probes), probes)
            noise.join()
            assert (proof.outcome, proof.reasons) == ("same", ()), number
            worst = max(worst, proof.difference or 0.0)
    assert worst < proof.limit / 10


def _disturb(url: str, count: int) -> None:
    body = {"messages": [{"role": "user", "content": "Count to ten."}], "temperature": 1.0, "max_tokens": 20}
    for _ in range(count):
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).raise_for_status()


def _stops(folder: Path) -> frozenset[int]:
    from tasks.evaluation.generation import find_stop_ids

    return find_stop_ids((load_model(folder).generation_config,), load_tokenizer(folder))
