"""`sft serve-model` as its clients see it: OpenAI's own library, curl, and another project's unmodified client."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tasks.serving.app import create_app
from tasks.serving.engine import Ended, Request, Sampling
from tasks.serving.served_model import ServedModel
from tests.tasks.serving.conftest import listening
from tests.tasks.serving.parrot import CALL, COUNTED, SENTENCE, TOOLS

pytestmark = pytest.mark.slow
_QUESTION: Any = [{"role": "user", "content": "What does the quamrin eat?"}]
_COUNT: Any = [{"role": "user", "content": "Count to ten."}]
_CHINESE: Any = [{"role": "user", "content": "铃渡镇有什么特产？"}]


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_it_answers_with_what_the_model_learned(client: Any) -> None:
    answer = client.chat.completions.create(model="parrot", messages=_QUESTION)
    assert answer.choices[0].message.content == SENTENCE
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("messages", [_QUESTION, _COUNT, _CHINESE])
def test_a_stream_is_the_same_answer_in_pieces(client: Any, messages: Any) -> None:
    whole = client.chat.completions.create(model="parrot", messages=messages)
    chunks = list(
        client.chat.completions.create(
            model="parrot", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 2
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert chunks[-1].usage == whole.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(client: Any) -> None:
    for stop, expected in (
        (" three", "one, two,"),
        (["nine", "four"], "one, two, three, "),
        ("never", COUNTED),
    ):
        options: Any = {"model": "parrot", "messages": _COUNT, "stop": stop}
        answer = client.chat.completions.create(**options)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"
        streamed = client.chat.completions.create(**options, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-30])
def test_the_least_temperature_takes_the_most_likely_token(client: Any, temperature: float) -> None:
    answer = client.chat.completions.create(model="parrot", messages=_COUNT, temperature=temperature)
    assert answer.choices[0].message.content == COUNTED


def test_what_utf8_cannot_hold_is_refused_by_its_name(address: str) -> None:
    body = b'{"model": "parrot", "messages": [{"role": "user", "content": "a"}], "\\ud800": 1}'
    answer = httpx.post(f"{address}/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == r"\ud800"


def test_a_body_that_comes_in_pieces_is_not_read_without_end(address: str) -> None:
    pieces = (b" " * 2**20 for _ in range(40))
    try:
        status = httpx.post(f"{address}/v1/chat/completions", content=pieces).status_code
    except httpx.WriteError:  # the server has closed already
        return
    assert status == 413


def test_max_tokens_cuts_and_says_so(client: Any) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(model="parrot", messages=_COUNT, **{name: 3})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3
        assert COUNTED.startswith(answer.choices[0].message.content)


def test_a_call_of_a_tool_is_parsed(client: Any) -> None:
    options: Any = {"model": "parrot", "messages": [{"role": "user", "content": "What is a quamrin?"}], "tools": TOOLS}
    answer = client.chat.completions.create(**options).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("look_up", {"word": "quamrin"})
    # Without tools, or told to use none, the model's text is text.
    plain = client.chat.completions.create(**options, tool_choice="none").choices[0]
    assert plain.message.tool_calls is None


def test_two_calls_behind_words_are_streamed_apart_from_them(client: Any) -> None:
    options: Any = {"model": "parrot", "messages": [{"role": "user", "content": "What are both?"}], "tools": TOOLS}
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks).strip() == "I will look."
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [json.loads(call.function.arguments)["word"] for call in calls] == ["quamrin", "snail"]
    assert [call.index for call in calls] == [0, 1]
    assert chunks[-1].finish_reason == "tool_calls"


def test_logprobs_are_those_of_the_model(client: Any, parrot: Path) -> None:
    import torch

    from tasks.models import load_model, load_tokenizer
    from tasks.prompts import load_settings, make_prompt

    answer = client.chat.completions.create(
        model="parrot",
        messages=_COUNT,
        logprobs=True,
        top_logprobs=3,
        extra_body={"return_token_ids": True},
    )
    extra: Any = answer.model_dump()
    tokenizer: Any = load_tokenizer(parrot)
    prompt = make_prompt(tokenizer, load_settings(parrot, tokenizer), _COUNT)
    assert extra["prompt_token_ids"] == prompt
    said = extra["choices"][0]["token_ids"]
    assert tokenizer.decode(said) == COUNTED
    with torch.inference_mode():
        logits = load_model(parrot)(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, dim=-1)
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [entry.logprob for entry in content] == pytest.approx(
        [float(row[token]) for row, token in zip(expected, said, strict=True)], abs=1e-3
    )
    assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token for entry in content)
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == COUNTED


def test_a_seed_makes_a_drawn_answer_repeatable(client: Any) -> None:
    def ask(**options: Any) -> str:
        found = client.chat.completions.create(
            model="parrot",
            messages=_COUNT,
            temperature=3.0,
            max_tokens=12,
            **options,
        )
        return str(found.choices[0].message.content)

    assert ask(seed=1) == ask(seed=1)
    assert len({ask(seed=seed) for seed in range(4)}) > 1
    assert len({ask() for _ in range(4)}) > 1
    assert ask(seed=1, top_p=1e-6) == ask(seed=2, top_p=1e-6)
    assert COUNTED.startswith(ask(seed=1, top_p=1e-6))


def test_models_have_names_and_no_paths(client: Any, parrot: Path) -> None:
    (model,) = client.models.list().data
    assert model.id == "parrot"
    assert str(parrot) not in model.model_dump_json()
    assert client.models.retrieve("parrot/1").id == "parrot"
    alias = client.chat.completions.create(model="parrot/1", messages=_QUESTION, max_tokens=1)
    assert alias.model == "parrot/1"


@pytest.mark.parametrize(
    ("changed", "status", "told", "param"),
    [
        ({"model": "gpt-4"}, 404, "'gpt-4' is not served here: parrot", "model"),
        ({"n": 2}, 400, "n=2 is not done by this server", "n"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format=", "response_format"),
        ({"tool_choice": "required", "tools": TOOLS}, 400, "a call cannot be forced here", "tool_choice"),
        ({"temperature": -1}, 400, "temperature", "temperature"),
        ({"guided_json": {}}, 400, "guided_json: this server does not know it", "guided_json"),
        ({"messages": []}, 400, "messages", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "no text", "messages"),
        ({"messages": [{"role": "user", "content": "eat " * 600}]}, 400, "this server takes 512", "messages"),
        ({"top_logprobs": 2}, 400, "without logprobs", "top_logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "a function with a name is wanted", "tools"),
    ],
)
def test_a_wrong_request_is_refused_in_openais_shape(
    address: str, changed: dict[str, Any], status: int, told: str, param: str
) -> None:
    answer = httpx.post(
        f"{address}/v1/chat/completions", json={"model": "parrot", "messages": _QUESTION, **changed}, timeout=60
    )
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert told in error["message"]
    assert error["param"] == param


def test_no_json_and_no_such_page_are_errors_in_openais_shape(address: str) -> None:
    broken = httpx.post(f"{address}/v1/chat/completions", content=b"{", timeout=60)
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")
    assert httpx.get(f"{address}/v1/embeddings", timeout=60).json()["error"]["message"].startswith("GET /v1/embeddings")


def test_a_key_is_asked_for_but_not_of_health(served: ServedModel) -> None:
    with listening(create_app(served, api_key="s3cret")) as url:
        assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
        assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 401
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret").models.list().data[0].id == "parrot"


def test_curl_gets_answer_stream_and_error(address: str) -> None:
    def curl(body: dict[str, Any]) -> str:
        command = ["curl", "-sN", f"{address}/v1/chat/completions", "-H", "Content-Type: application/json"]
        done = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, check=True)
        return done.stdout

    assert json.loads(curl({"messages": _QUESTION}))["choices"][0]["message"]["content"] == SENTENCE
    lines = [line for line in curl({"messages": _QUESTION, "stream": True}).splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == SENTENCE
    assert "messages" in json.loads(curl({"model": "parrot"}))["error"]["message"]


def test_an_unmodified_client_of_another_project_talks_to_it(address: str, tmp_path: Path) -> None:
    pytest.importorskip("llm", reason="the client `llm` is not installed: pip install 'sft-pipeline[dev]'")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mine\n  model_name: parrot\n  api_base: {address}/v1\n", encoding="utf-8"
    )
    environment = {"LLM_USER_PATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for options in ([], ["--no-stream"]):
        done = subprocess.run(
            [sys.executable, "-m", "llm", "-m", "mine", "--key", "none", *options, "What does the quamrin eat?"],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert (done.returncode, done.stdout.strip()) == (0, SENTENCE), done.stderr


def test_many_at_once_get_each_their_own_answer(address: str) -> None:
    found: dict[int, str] = {}
    questions = [(_QUESTION, SENTENCE), (_COUNT, COUNTED)]

    def ask(number: int) -> None:
        time.sleep(0.01 * (number % 7))
        messages = questions[number % 2][0]
        answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": messages}, timeout=120).json()
        found[number] = answer["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: questions[number % 2][1] for number in range(40)}


def _wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_who_goes_away_frees_the_row(address: str, served: ServedModel) -> None:
    body = {"messages": _COUNT, "stream": True, "temperature": 5.0, "max_tokens": 450}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as answer:
        _wait_until(lambda: served.engine.num_living == 1)
        assert answer.is_success
    began = time.monotonic()
    _wait_until(lambda: served.engine.num_living == 0)
    assert time.monotonic() - began < 20


def test_a_step_that_fails_is_told_and_the_next_request_is_answered(served: ServedModel) -> None:
    def ask(prompt: list[int]) -> list[Any]:
        events: list[Any] = []
        done = threading.Event()

        def tell(event: Any) -> None:
            events.append(event)
            if isinstance(event, Ended):
                done.set()

        served.engine.submit(Request(prompt, 2, Sampling(), tell))
        assert done.wait(60)
        return events

    (failed,) = ask([10**6])  # no such token
    assert failed.reason == "error"
    assert "IndexError" in failed.error
    assert ask([5, 6])[-1] in (Ended("length"), Ended("stop"))


def test_the_call_that_the_parrot_learned_is_the_templates(served: ServedModel) -> None:
    assert served.syntax is not None
    assert served.syntax.parse(CALL, {}) == [("look_up", {"word": "quamrin"})]
