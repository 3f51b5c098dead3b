"""Has two ways through a model with routed experts choose the same experts, so that a trial compares their arithmetic.

A router takes the experts with the largest scores. Where two scores are nearly equal, rounding decides, and two right
ways through a model in 16 bits send some tokens to other experts, from where on nothing of them is alike. What the
reference chose is therefore written down, and the way on trial is given it; it takes its own scores of these experts.

Dimensions: `T` tokens of a trial's pieces end to end, `K` experts a token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tasks.training.batches import Batch

# Rounding changes a few choices. Where fewer than this part are alike, it is the way that is another one.
_LEAST_ALIKE = 0.5
_TOPK = (torch.topk, torch.Tensor.topk)


class _Call(NamedTuple):
    """A choice of the largest along the last dimension."""

    scores: Tensor
    num_chosen: int


class RouteRecorder:
    """The choices of a reference that goes through one piece after the other."""

    def __init__(self) -> None:
        self._pieces: list[list[Tensor]] = []
        self._lengths: list[int] = []

    @contextmanager
    def recording(self, num_tokens: int) -> Iterator[None]:
        """Write down the choices of a forward pass of the next piece."""
        choices: list[Tensor] = []

        def note(call: _Call, found: Any) -> Any:
            choices.append(found[1].detach().reshape(-1, call.num_chosen))
            return found

        with _Listening(note):
            yield
        self._pieces.append(choices)
        self._lengths.append(num_tokens)

    def join(self) -> tuple[Tensor, ...]:
        """Return the choices [T, K], or of more rows where a token chooses several times, in the order of the calls.

        Nothing where the pieces did not go the same way.
        """
        if len({len(choices) for choices in self._pieces}) != 1:
            return ()
        joined = tuple(torch.cat(parts) for parts in zip(*self._pieces, strict=True))
        return joined if all(len(choices) % sum(self._lengths) == 0 for choices in joined) else ()


@contextmanager
def routed_as(choices: Sequence[Tensor], batch: Batch) -> Iterator[None]:
    """Have a forward pass of the batch, with all pieces, choose as the reference did.

    Args:
        choices: from `RouteRecorder`; nothing is changed without any.
        batch: flat, or one piece a row.
    """
    if not choices:
        yield
        return
    left = list(reversed(choices))
    places = _place_tokens(batch)

    def give(call: _Call, found: Any) -> Any:
        if not left:
            return found
        wanted = left.pop().unflatten(0, (batch.num_tokens, -1))
        num_rows, rest = divmod(found[1].numel(), wanted[0].numel())
        fitting = [] if rest else [place for place in places if place.num_rows == num_rows]
        rows = found[1].reshape(num_rows, *wanted.shape[1:]) if fitting else found[1]
        shares = [_share_alike(rows[place.own], wanted[place.tokens]) for place in fitting]
        if not shares or max(shares) < _LEAST_ALIKE:
            left.clear()  # it goes another way: from here on it chooses by itself
            return found
        place = fitting[shares.index(max(shares))]
        rows[place.own] = wanted[place.tokens]
        indices = rows.view(found[1].shape)
        return torch.return_types.topk((call.scores.gather(-1, indices), indices))

    with _Listening(give):
        yield


class _Seen(NamedTuple):
    """Where tokens of the pieces are among the rows that a router may see."""

    num_rows: int
    own: Tensor
    """[N]: rows."""
    tokens: Tensor
    """[N]: which token each of them is."""


def _place_tokens(batch: Batch) -> list[_Seen]:
    """Return what a router may see: all of the batch, or the rows that the last layer of a flat one goes on with."""
    device, width = batch.input_ids.device, batch.input_ids.shape[1]
    own = [number * width + place for number, length in enumerate(batch.row_lengths) for place in range(length)]
    places = [_Seen(batch.input_ids.numel(), torch.tensor(own, device=device), torch.arange(len(own), device=device))]
    if batch.trained is not None:
        inside = (batch.trained < batch.num_tokens).nonzero()[:, 0]
        places.append(_Seen(len(batch.trained), inside, batch.trained[inside]))
    return places


def _share_alike(own: Tensor, wanted: Tensor) -> float:
    """Return which part of the wanted choices [N, ..., K] were chosen."""
    return float((own[..., None, :] == wanted[..., None]).any(-1).double().mean())


class _Listening(TorchFunctionMode):
    """Hands each choice of the largest along the last dimension to a function, which says what comes of it."""

    def __init__(self, hear: Any) -> None:
        super().__init__()
        self.hear = hear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`; see TorchFunctionMode."""
        found = func(*args, **(kwargs or {}))
        if func not in _TOPK:
            return found
        scores = args[0] if args else kwargs["input"]
        dim = args[2] if len(args) > 2 else (kwargs or {}).get("dim", -1)
        if dim not in (-1, scores.dim() - 1):
            return found
        return self.hear(_Call(scores, found[1].shape[-1]), found)
