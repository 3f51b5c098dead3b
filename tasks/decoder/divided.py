"""A decoder's frozen weights divided among ranks, each layer's whole for as long as it is used.

Dimensions: `P` bytes of a layer's frozen weights, `n` ranks.

Each rank keeps P / n bytes of a layer. While a layer is computed, the next one is gathered into the other of two slots,
on a stream of its own: the one after it on the way forward, the one before it on the way back. The adapter is whole on
every rank, and its working copies are put into the joint matrices once these are there.

A layer that is not in a slot has matrices of NaN that take no memory: nothing can be computed with it by mistake.
Gathering is a collective: every rank has to go through the same passes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.decoder.frozen_matrices import BACKWARD, BOTH, FORWARD, Matrix, list_matrices
from tasks.decoder.layer import Layer

# From PyTorch 2.13 on by another name.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Of the first byte of a matrix: what the fastest products want.
_ALIGNMENT = 256
_ALL = (BOTH, FORWARD, BACKWARD)


class DividedWeightsError(RuntimeError):
    """What was gathered is not what was divided."""


class _Location(NamedTuple):
    """Where a matrix lies in the gathered bytes of its part."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    matrix: Matrix


@dataclass
class LayerPart:
    """What one way reads of a layer."""

    share: Tensor
    """[P / n] uint8: this rank's bytes."""
    places: tuple[_Location, ...]
    num_bytes: int
    """P, rounded up."""


@dataclass
class _Slot:
    """Room for one layer, whole."""

    rooms: dict[str, Tensor] = field(default_factory=dict)
    """uint8, of each part."""
    number: int = -1
    """Of the layer that lies there."""
    parts: set[str] = field(default_factory=set)
    """Of it, those that were gathered."""
    shown: set[str] = field(default_factory=set)
    """Of these, those that the layer uses."""
    arrived: torch.cuda.Event | None = None


class DividedLayers:
    """The layers of a decoder, in the order in which they are computed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.modules: list[nn.Module] = []
        """The model's own, layer by layer."""
        self._layers: list[dict[str, LayerPart]] = []
        self._slots = (_Slot(), _Slot())
        # Before the products, where both are ready: little work for which the next layer waits.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._is_exact = torch.ones((), dtype=torch.int32, device=device)

    @property
    def num_ranks(self) -> int:
        """Return n."""
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def held_bytes(self) -> int:
        """Return the bytes of frozen weights that this rank holds: its shares, and the slots."""
        shares = sum(part.share.numel() for layer in self._layers for part in layer.values())
        return shares + sum(room.numel() for slot in self._slots for room in slot.rooms.values())

    def describe(self) -> str:
        """Say what lies where."""
        return f"frozen layers divided among {self.num_ranks} ranks"

    def take(self, module: nn.Module, build: Callable[[], Layer]) -> Layer:
        """Bring the next layer to the device, build it, and keep this rank's share of it alone.

        Args:
            module: the model's own layer, wherever it is.
            build: makes the decoder's layer of it.
        """
        module.to(self.device)
        layer = build()
        self.modules.append(module)
        self._layers.append({})
        self._divide(len(self._layers) - 1, layer)
        return layer

    def add_layer(self, matrices: Mapping[str, Sequence[Matrix]]) -> None:
        """Have the next layer's matrices written by their own `fill` whenever they are wanted; nothing is kept of them.

        Args:
            matrices: by the way that reads them.
        """
        parts = {}
        for name, found in matrices.items():
            places, num_bytes = _lay_out(found)
            parts[name] = LayerPart(torch.empty(0, dtype=torch.uint8, device=self.device), places, num_bytes)
            for matrix in found:
                matrix.hide()
        self._layers.append(parts)

    def replace(self, number: int, change: Callable[[], Layer]) -> Layer:
        """Have a layer made anew of its whole weights, and keep this rank's share of the new one."""
        self.hold(number, _ALL)
        layer = change()
        # What the layer used there has become the new one's, or nothing's.
        self._slots[number % 2].number, self._slots[number % 2].shown = -1, set()
        self._divide(number, layer)
        return layer

    def finish(self) -> None:
        """Keep no more room than the layers want, once all of them are there.

        Raises:
            DividedWeightsError: on all ranks, where on one of them a layer was not gathered as it had been.
        """
        self._settle()
        for slot in self._slots:
            self._empty(slot)
            slot.rooms = {}
        for name in _ALL:
            sizes = [layer[name].num_bytes for layer in self._layers if name in layer]
            for slot in self._slots if sizes else ():
                slot.rooms[name] = self._allocate(max(sizes))
        if self.num_ranks > 1:
            dist.all_reduce(self._is_exact, op=dist.ReduceOp.MIN)
        if not int(self._is_exact):
            raise DividedWeightsError(
                "the weights that were gathered from all ranks are not those that were read: the ranks have read "
                "different files, or a device or the network between them errs"
            )

    def hold(
        self, number: int, parts: Sequence[str] = (BOTH,), upcoming: tuple[int, Sequence[str]] | None = None
    ) -> None:
        """Have a layer's weights there for what is computed from now on; begin to gather others meanwhile.

        Args:
            number: of the layer.
            parts: that are read.
            upcoming: the layer that is wanted after it, and its parts.
        """
        slot = self._gather(number, parts)
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        for name in slot.parts - slot.shown:
            for place in self._layers[number][name].places:
                place.matrix.show(_view(slot.rooms[name], place))
        slot.shown |= slot.parts
        if upcoming is not None and 0 <= upcoming[0] < len(self._layers):
            self._gather(*upcoming)

    def hold_forward(self, number: int, num_recomputed: int) -> None:
        """Hold a layer on the way forward; the last one's weights for the way back come after it."""
        upcoming: tuple[int, Sequence[str]] = number + 1, (BOTH, FORWARD)
        if number == len(self._layers) - 1:
            upcoming = number, _name_backward(number, num_recomputed)
        is_wanted = torch.is_grad_enabled() or number + 1 < len(self._layers)
        self.hold(number, (BOTH, FORWARD), upcoming if is_wanted else None)

    def hold_backward(self, number: int, num_recomputed: int) -> None:
        """Hold a layer on the way back."""
        before = number - 1, _name_backward(number - 1, num_recomputed)
        self.hold(number, _name_backward(number, num_recomputed), before)

    def forget(self) -> None:
        """Say that what is trained has changed: what lies in the slots has the old working copies."""
        for slot in self._slots:
            self._empty(slot)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Have the model's own layers compute with gathered weights, each when it is called.

        They must run again for their gradient: a pass's weights are gone when the next layer is called.
        """
        hooks = [
            module.register_forward_pre_hook(lambda *_, number=number: self.hold(number, _ALL))
            for number, module in enumerate(self.modules)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def give_back(self) -> None:
        """Put the layers whole into the host's memory, where the model's own modules then have them."""
        for number, module in enumerate(self.modules):
            self.hold(number, _ALL)
            self._settle()
            held = {name: parameter.data.to("cpu", copy=True) for name, parameter in module.named_parameters()}
            for slot in self._slots:
                self._empty(slot)
            for name, parameter in module.named_parameters():
                parameter.data = held[name]
            module.to("cpu")
        self._layers, self._slots = [], (_Slot(), _Slot())

    def _divide(self, number: int, layer: Layer) -> None:
        """Keep this rank's share of a layer's matrices, and make sure that the whole can be had back."""
        slot = self._slots[number % 2]
        self._settle()
        self._empty(slot)
        self._layers[number] = {}
        for name, matrices in list_matrices(layer).items():
            if matrices:
                part, whole = self._cut(matrices)
                self._layers[number][name] = part
                if name not in slot.rooms or slot.rooms[name].numel() < part.num_bytes:
                    slot.rooms[name] = self._allocate(part.num_bytes)
                self._collect(part, slot.rooms[name])
                if not torch.equal(slot.rooms[name][: part.num_bytes], whole):
                    self._is_exact.zero_()
            for matrix in matrices:
                matrix.hide()

    def _settle(self) -> None:
        """Have what comes wait for what is being gathered, perhaps for nobody: its room is going to be another's."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _cut(self, matrices: Sequence[Matrix]) -> tuple[LayerPart, Tensor]:
        """Return this rank's share of some matrices, and all their bytes."""
        places, end = _lay_out(matrices)
        total = _round_up(end, _ALIGNMENT * self.num_ranks)
        whole = torch.zeros(total, dtype=torch.uint8, device=self.device)
        for place, matrix in zip(places, matrices, strict=True):
            _view(whole, place).copy_(matrix.values)
        rank = dist.get_rank() if dist.is_initialized() else 0
        return LayerPart(whole.view(self.num_ranks, -1)[rank].clone(), places, total), whole

    def _gather(self, number: int, parts: Sequence[str]) -> _Slot:
        """Begin to gather what of some parts of a layer is not there, and return their slot."""
        slot = self._slots[number % 2]
        if slot.number != number:
            self._empty(slot)
            slot.number = number
        layer = self._layers[number]
        missing = [name for name in _ALL if name in parts and name in layer and name not in slot.parts]
        if missing and self._stream is not None:
            # Behind all that was begun with what lay here, and with the working copies as they are now.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                self._bring(layer, slot, missing)
                slot.arrived = torch.cuda.Event()
                slot.arrived.record(self._stream)
        elif missing:
            self._bring(layer, slot, missing)
        slot.parts.update(missing)
        return slot

    @torch.no_grad()
    def _bring(self, layer: dict[str, LayerPart], slot: _Slot, names: Sequence[str]) -> None:
        for name in names:
            part, room = layer[name], slot.rooms[name]
            self._collect(part, room)
            for place in part.places:
                if place.matrix.fill is not None:
                    place.matrix.fill(_view(room, place))

    def _collect(self, part: LayerPart, room: Tensor) -> None:
        """Put all ranks' shares of a part into a room."""
        if self.num_ranks > 1:
            _all_gather(room[: part.num_bytes], part.share)
        else:
            room[: part.num_bytes].copy_(part.share)

    def _empty(self, slot: _Slot) -> None:
        """Have the layer that lies in a slot use nothing of it."""
        for name in slot.shown:
            for place in self._layers[slot.number][name].places:
                place.matrix.hide()
        slot.number, slot.parts, slot.shown = -1, set(), set()


class WayBack(torch.autograd.Function):
    """What a layer gives, as it is; before the layer's gradient is computed its weights are gathered."""

    @staticmethod
    def forward(
        ctx: Any, layers: DividedLayers, number: int, num_recomputed: int, stream: Tensor, delta: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Change nothing."""
        ctx.set_materialize_grads(False)
        ctx.settings = layers, number, num_recomputed
        return stream, delta

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Hold the layer, whose own backward pass comes next."""
        layers, number, num_recomputed = ctx.settings
        layers.hold_backward(number, num_recomputed)
        return None, None, None, *grads


def _name_backward(number: int, num_recomputed: int) -> tuple[str, ...]:
    """Return the parts that a layer's gradient reads; one that runs again reads all."""
    return _ALL if number < num_recomputed else (BOTH, BACKWARD)


def _lay_out(matrices: Sequence[Matrix]) -> tuple[tuple[_Location, ...], int]:
    """Return where matrices lie one after the other, without their values, and the bytes up to their end."""
    places, end = [], 0
    for matrix in matrices:
        values = matrix.values
        places.append(_Location(end, tuple(values.shape), values.dtype, matrix._replace(values=values.new_empty(0))))
        end += _round_up(values.numel() * values.element_size(), _ALIGNMENT)
    return tuple(places), end


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _view(room: Tensor, place: _Location) -> Tensor:
    """Return a matrix in the bytes of its part."""
    count = 1
    for size in place.shape:
        count *= size
    return room[place.start : place.start + count * place.dtype.itemsize].view(place.dtype).view(place.shape)
