"""OpenAI's chat API over a served model, as an ASGI application."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tasks.prompts import make_prompt
from tasks.serving.engine import Chosen, Ended, Request
from tasks.serving.protocol import ApiError, ChatRequest, read_request
from tasks.serving.served_model import ServedModel
from tasks.serving.text import AnswerText, write_calls

_CHECK_SECONDS = 0.5
"""How often it is looked whether somebody still waits for an answer."""
_MOST_BYTES = 32 * 2**20
"""Of a request's body."""

logger = logging.getLogger(__name__)


@dataclass
class _Job:
    """A request on its way through the model."""

    asked: ChatRequest
    prompt: list[int]
    text: AnswerText
    request: Request
    events: "asyncio.Queue[Chosen | Ended]"
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    tokens: list[int] = field(default_factory=list)
    reason: str = ""


def create_app(model: ServedModel, *, api_key: str = "") -> Starlette:
    """Return the application.

    Args:
        model: that answers; closed by whoever opened it.
        api_key: asked for as a bearer token everywhere but at /health; empty for none.
    """

    def guarded(handler: Callable[[HttpRequest], Awaitable[Response]]) -> Callable[[HttpRequest], Awaitable[Response]]:
        async def answer(request: HttpRequest) -> Response:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
            if api_key and not hmac.compare_digest(given.encode(), api_key.encode()):
                told = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`"
                raise ApiError(401, told, code="invalid_api_key")
            return await handler(request)

        return answer

    async def complete(request: HttpRequest) -> Response:
        return await _complete(model, request)

    async def list_models(request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [model.describe()]})

    async def show_model(request: HttpRequest) -> Response:
        _check_name(model, request.path_params["name"])
        return JSONResponse(model.describe())

    async def health(request: HttpRequest) -> Response:
        alive = model.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", guarded(complete), methods=["POST"]),
            Route("/v1/models", guarded(list_models)),
            Route("/v1/models/{name:path}", guarded(show_model)),
            Route("/health", health),
        ],
        exception_handlers={ApiError: _answer_error, HTTPException: _answer_http, Exception: _answer_failure},
    )


async def _answer_error(request: HttpRequest, error: Any) -> Response:
    return JSONResponse(error.body, error.status)


async def _answer_http(request: HttpRequest, error: Any) -> Response:
    told = f"{request.method} {request.url.path}: {error.detail}. There are /v1/chat/completions, /v1/models, /health"
    return JSONResponse(ApiError(error.status_code, told).body, error.status_code)


async def _answer_failure(request: HttpRequest, error: Any) -> Response:
    logger.exception("A request failed", exc_info=error)
    return JSONResponse(ApiError(500, f"{type(error).__name__}: {error}").body, 500)


def _check_name(model: ServedModel, name: str | None) -> None:
    if name is not None and name not in model.names:
        raise ApiError(
            404,
            f"the model {name!r:.100} is not served here: {', '.join(model.names)}",
            param="model",
            code="model_not_found",
        )


async def _complete(model: ServedModel, http: HttpRequest) -> Response:
    content = await _read(http)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON ({error})") from None
    asked = read_request(body)
    _check_name(model, asked.model)
    job = _start(model, asked)
    if asked.stream:
        return StreamingResponse(_stream(model, job), media_type="text/event-stream")
    logprobs: list[dict[str, Any]] = []
    try:
        async for chosen, _ in _follow(model, job, http):
            if chosen is not None and asked.logprobs:
                logprobs.append(_describe_token(model, chosen, asked))
    finally:
        job.request.is_cancelled = True
    message: dict[str, Any] = {"role": "assistant", "content": job.text.content, "refusal": None}
    if job.text.calls:
        calls = write_calls(job.text.calls, _make_call_id)
        message |= {"content": job.text.content.strip() or None, "tool_calls": calls}
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": job.reason}
    choice["logprobs"] = {"content": logprobs, "refusal": None} if asked.logprobs else None
    told = {**_head(model, job, "chat.completion"), "choices": [choice], "usage": _count(job)}
    if asked.return_token_ids:
        told["prompt_token_ids"] = job.prompt
        choice["token_ids"] = job.tokens
    return JSONResponse(told)


async def _read(http: HttpRequest) -> bytes:
    """Return the body, and not more of it than is read here: it may come in pieces whose sum nobody says before.

    Raises:
        ApiError: it is too long.
    """
    content = bytearray()
    async for piece in http.stream():
        content += piece
        if len(content) > _MOST_BYTES:
            raise ApiError(413, f"the body has more than {_MOST_BYTES} bytes")
    return bytes(content)


def _start(model: ServedModel, asked: ChatRequest) -> _Job:
    """Make the prompt and hand it to the engine.

    Raises:
        ApiError: the template refuses the messages, or the prompt is too long.
    """
    tools = asked.used_tools
    try:
        prompt = make_prompt(model.tokenizer, model.settings, asked.messages, tools)
    except Exception as error:  # whatever a template refuses with
        raise ApiError(400, f"the model's chat template refuses these messages: {error}", param="messages") from error
    left = model.length - len(prompt)
    if left < 1 or not prompt:
        raise ApiError(
            400,
            f"the messages have {len(prompt)} tokens, and this server takes {model.length} with the answer",
            param="messages",
            code="context_length_exceeded",
        )
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Chosen | Ended]()

    def tell(event: Chosen | Ended) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(events.put_nowait, event)

    functions = [tool.get("function", tool) for tool in tools or []]
    text = AnswerText(
        model.tokenizer,
        asked.stops,
        model.syntax if tools else None,
        {function["name"]: function.get("parameters") for function in functions},
    )
    sampling = asked.choose_sampling(model.temperature)
    request = Request(prompt, min(asked.room or left, left), sampling, tell)
    model.engine.submit(request)
    return _Job(asked, prompt, text, request, events)


async def _follow(
    model: ServedModel, job: _Job, http: HttpRequest | None = None
) -> AsyncIterator[tuple[Chosen | None, str]]:
    """Give each token with the content that is certain with it, and at the end None with the rest.

    Raises:
        ApiError: the model failed.
    """
    while True:
        try:
            event = await asyncio.wait_for(job.events.get(), _CHECK_SECONDS)
        except TimeoutError:
            if http is not None and await http.is_disconnected():
                raise ApiError(499, "nobody waits for this answer any more") from None
            if not model.engine.is_alive:
                raise ApiError(500, "the engine has ended") from None
            continue
        if isinstance(event, Ended):
            if event.reason == "error":
                raise ApiError(500, f"the model could not go on: {event.error}")
            job.reason = event.reason
            break
        job.tokens.append(event.token)
        piece = job.text.add(event.token)
        yield event, piece
        if job.text.is_stopped:
            job.request.is_cancelled = True
            job.reason = "stop"
            break
    rest = job.text.finish()
    if job.text.calls:
        job.reason = "tool_calls"
    yield None, rest


async def _stream(model: ServedModel, job: _Job) -> AsyncIterator[str]:
    """Give the chunks of an answer as server-sent events."""
    asked = job.asked
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage
    head = _head(model, job, "chat.completion.chunk")
    extra = {"usage": None} if with_usage else {}

    def write(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason, **more}
        return _write_event({**head, "choices": [choice], **extra})

    try:
        first = {"prompt_token_ids": job.prompt} if asked.return_token_ids else {}
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        yield _write_event({**head, **first, "choices": [{"index": 0, "delta": delta, "finish_reason": None}], **extra})
        waiting: list[Chosen] = []
        async for chosen, piece in _follow(model, job):
            waiting += [chosen] if chosen is not None else []
            # Tokens whose text is still held back travel with the next piece, so that none is lost.
            if not piece and not (waiting and (asked.logprobs or asked.return_token_ids)):
                continue
            more: dict[str, Any] = {}
            if asked.logprobs:
                described = [_describe_token(model, token, asked) for token in waiting]
                more["logprobs"] = {"content": described, "refusal": None}
            if asked.return_token_ids:
                more["token_ids"] = [token.token for token in waiting]
            waiting = []
            yield write({"content": piece}, **more)
        for number, call in enumerate(write_calls(job.text.calls, _make_call_id)):
            yield write({"tool_calls": [{"index": number, **call}]})
        yield write({}, job.reason)
        if with_usage:
            yield _write_event({**head, "choices": [], "usage": _count(job)})
    except ApiError as error:
        yield _write_event(error.body)
    finally:
        job.request.is_cancelled = True
    yield "data: [DONE]\n\n"


def _write_event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _head(model: ServedModel, job: _Job, kind: str) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": kind,
        "created": job.created,
        "model": job.asked.model or model.names[0],
        "system_fingerprint": model.fingerprint,
    }


def _count(job: _Job) -> dict[str, int]:
    counts = {"prompt_tokens": len(job.prompt), "completion_tokens": len(job.tokens)}
    return {**counts, "total_tokens": sum(counts.values())}


def _make_call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


def _describe_token(model: ServedModel, chosen: Chosen, asked: ChatRequest) -> dict[str, Any]:
    """Return a token with its log-probability as OpenAI's API has it."""

    def describe(token: int, logprob: float | None) -> dict[str, Any]:
        text, spelled = model.spell(token)
        name = f"token_id:{token}" if asked.return_tokens_as_token_ids else text
        return {"token": name, "logprob": logprob, "bytes": spelled}

    alternatives: Sequence[tuple[int, float]] = chosen.top
    return {
        **describe(chosen.token, chosen.logprob),
        "top_logprobs": [describe(token, logprob) for token, logprob in alternatives],
    }
