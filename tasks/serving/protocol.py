"""A request of OpenAI's chat API as it is understood here, and its errors in OpenAI's shape."""

import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.serving.engine import MAX_TOP_LOGPROBS, Sampling

_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key"}
)
"""What says nothing about the answer."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "top_k": (0, -1),
    "min_p": (0,),
    "best_of": (1,),
    "echo": (False,),
    "ignore_eos": (False,),
}
"""What is not done here: the values that ask for nothing."""


class ApiError(Exception):
    """A request that is refused, with what OpenAI's API says of it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {
                "message": _as_text(message),
                "type": kind or ("invalid_request_error" if status < 500 else "server_error"),
                "param": None if param is None else _as_text(param),
                "code": code,
            }
        }


def _as_text(text: str) -> str:
    """Write the halves of characters that JSON can name and UTF-8 cannot hold as the names that they have."""
    return text.encode("utf-8", "backslashreplace").decode()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


class ChatRequest(_Strict):
    """The body of `POST /v1/chat/completions`."""

    model: str | None = None
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=5.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    return_token_ids: bool = False
    """Also the ids of prompt and answer, under the names that vLLM gives them."""
    return_tokens_as_token_ids: bool = False
    """Tokens of log-probabilities are `token_id:N`, as vLLM writes them."""

    @property
    def room(self) -> int | None:
        """Most tokens of the answer; None where the request names no limit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        """Stop texts; empty ones stop nothing."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def used_tools(self) -> list[dict[str, Any]] | None:
        """Tools that the model is told of."""
        return self.tools if self.tools and self.tool_choice != "none" else None

    def choose_sampling(self, default_temperature: float) -> Sampling:
        """Return how tokens are chosen; without a seed, by one of its own."""
        return Sampling(
            temperature=default_temperature if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def read_request(body: Any) -> ChatRequest:
    """Read a request; what would be done otherwise than asked is refused by its name.

    Raises:
        ApiError: 400.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object: {'model': …, 'messages': […]} is wanted")
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in _WITHOUT_EFFECT:
            continue
        if name in _NEUTRAL:
            if value not in _NEUTRAL[name]:
                wanted = " or ".join(map(repr, _NEUTRAL[name]))
                raise ApiError(
                    400, f"{name}={value!r:.100} is not done by this server: leave it out, or {wanted}", param=name
                )
            continue
        if name == "tool_choice" and value not in ("auto", "none"):
            raise ApiError(
                400, f"tool_choice={value!r:.100}: a call cannot be forced here: auto or none is wanted", param=name
            )
        if name not in ChatRequest.model_fields:
            raise ApiError(400, f"{name}: this server does not know it: leave it out", param=name)
        kept[name] = value
    try:
        request = ChatRequest.model_validate(kept)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ApiError(
            400, f"{place}: {first['msg']}, got {first.get('input')!r:.100}", param=place.split(".")[0]
        ) from None
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs is given without logprobs: set logprobs to true", param="top_logprobs")
    for number, tool in enumerate(request.tools or []):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(400, f"tools.{number}: a function with a name is wanted, got {tool!r:.100}", param="tools")
    return request
