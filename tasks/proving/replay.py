"""Asks a served model the recorded requests, over OpenAI's chat API."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from schemas.proofs import ServingProbe, ServingProbes

TOP = 5
"""Alternatives that are asked for: what most servers give."""
EXTRA_TOKENS = 8
"""Beyond a recorded answer that ended: where the stop token is lost, the answer goes on."""
AT_ONCE = 8
_IDS = {"return_token_ids": True, "return_tokens_as_token_ids": True}
"""As vLLM and `sft serve-model` know them; left out for servers that refuse them."""


class ProofError(ValueError):
    """The address cannot be asked."""


@dataclass(frozen=True)
class Said:
    """A token of a served answer."""

    token: int | None
    """Its id, where the server tells it."""
    text: str
    logprob: float
    top: tuple[tuple[int | None, str, float], ...]
    """Id, text and log-probability of the most likely tokens."""


@dataclass(frozen=True)
class Reply:
    """What came back for a probe."""

    probe: ServingProbe
    error: str = ""
    num_prompt: int | None = None
    prompt: tuple[int, ...] | None = None
    said: tuple[Said, ...] | None = None
    """None where the server tells no log-probabilities."""
    content: str = ""
    reason: str = ""


def ask_all(
    url: str, probes: ServingProbes, *, model: str = "", api_key: str = "", timeout: float = 600.0
) -> list[Reply]:
    """Ask every probe, several at once.

    Args:
        url: of the server, with or without /v1.
        probes: recorded.
        model: served name; empty for the first that the server lists.
        api_key: sent as a bearer token; empty for none.
        timeout: seconds that an answer may take.

    Raises:
        ProofError: nobody answers there, or it is no server of this API.
    """
    place = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=place, headers=headers, timeout=timeout) as client:
        name = model or _find_name(client)
        extras = _IDS if _takes_ids(client, name, probes.probes[0]) else {}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda probe: _ask(client, name, probe, extras), probes.probes))


def _find_name(client: httpx.Client) -> str:
    try:
        answer = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise ProofError(
            f"{client.base_url}: nobody answers ({error}): start the server, or correct the address"
        ) from None
    if answer.status_code in (401, 403):
        raise ProofError(f"{client.base_url}: it asks for a key: --api-key ({_describe_error(answer)})")
    try:
        names = [str(entry["id"]) for entry in answer.json()["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    if not names:
        raise ProofError(f"{client.base_url}: /v1/models lists no model: is it a server of OpenAI's API?")
    return names[0]


def _takes_ids(client: httpx.Client, name: str, probe: ServingProbe) -> bool:
    """Tell whether the server takes the further settings."""
    body = {"model": name, "messages": probe.messages, "max_tokens": 1, **_IDS}
    try:
        return client.post("/v1/chat/completions", json=body).is_success
    except httpx.HTTPError as error:
        raise ProofError(
            f"{client.base_url}: nobody answers ({error}): start the server, or correct the address"
        ) from None


def _ask(client: httpx.Client, name: str, probe: ServingProbe, extras: dict[str, Any]) -> Reply:
    body: dict[str, Any] = {
        "model": name,
        "messages": probe.messages,
        "temperature": 0.0,
        "max_tokens": len(probe.answer.tokens) + (EXTRA_TOKENS if probe.answer.ended else 0),
        "logprobs": True,
        "top_logprobs": TOP,
        **extras,
    }
    if probe.tools:
        body["tools"] = probe.tools
    try:
        answer = client.post("/v1/chat/completions", json=body)
        if answer.status_code == 400 and "logprobs" in answer.text:  # a server that has none
            answer = client.post(
                "/v1/chat/completions", json={k: v for k, v in body.items() if k not in ("logprobs", "top_logprobs")}
            )
        if not answer.is_success:
            return Reply(probe, error=_describe_error(answer))
        return _read(probe, answer.json())
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        return Reply(probe, error=f"{type(error).__name__}: {error}")


def _describe_error(answer: httpx.Response) -> str:
    try:
        told = answer.json()["error"]
        message = told["message"] if isinstance(told, dict) else told
    except (ValueError, KeyError, TypeError):
        message = answer.text
    return f"status {answer.status_code}: {str(message)[:200]}"


def _read(probe: ServingProbe, told: dict[str, Any]) -> Reply:
    choice = told["choices"][0]
    entries = (choice.get("logprobs") or {}).get("content")
    ids = choice.get("token_ids")
    prompt = told.get("prompt_token_ids") or choice.get("prompt_token_ids")
    return Reply(
        probe,
        num_prompt=(told.get("usage") or {}).get("prompt_tokens"),
        prompt=tuple(prompt) if prompt else None,
        said=None if entries is None else tuple(_read_token(entry, n, ids) for n, entry in enumerate(entries)),
        content=str(choice["message"].get("content") or ""),
        reason=str(choice.get("finish_reason") or ""),
    )


def _read_token(entry: dict[str, Any], number: int, ids: Sequence[int] | None) -> Said:
    token, text = _read_name(entry)
    if token is None and ids is not None and number < len(ids):
        token = ids[number]
    top = tuple((*_read_name(other), float(other["logprob"])) for other in entry.get("top_logprobs") or ())
    return Said(token, text, float(entry["logprob"]), top)


def _read_name(entry: dict[str, Any]) -> tuple[int | None, str]:
    name = str(entry["token"])
    if name.startswith("token_id:") and name[9:].isdigit():
        return int(name[9:]), ""
    spelled = entry.get("bytes")
    return None, bytes(spelled).decode("utf-8", "replace") if spelled and "\N{REPLACEMENT CHARACTER}" in name else name
