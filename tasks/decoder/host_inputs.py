"""Inputs of recomputed layers in the host's memory.

Dimensions: `T` tokens of a flat batch, `H` hidden size.

A layer that runs again keeps its input [T, H] alone. Here that is copied to page-locked memory of the host while the
layer is computed, and brought back while the layer after it runs its backward pass. On the device there are at most two
on their way: the layer's own, and the one before (forward) or the next (backward). All copies are on one stream, in the
order in which the layers need them, so that a piece of the host's memory is another input's as soon as the copy from it
has been queued. The numbers are the same, bit by bit.
"""

from typing import Any

import torch
from torch import Tensor

# Of a piece of the host's memory. A power of two: PyTorch rounds page-locked memory up to one.
CHUNK_BYTES = 1 << 26


class HostMemory:
    """Page-locked memory in pieces, which passes lend and give back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.num_chunks = 0
        """That were ever allocated."""
        self._free: list[Tensor] = []

    @property
    def held_bytes(self) -> int:
        """Return the bytes that have been allocated; they stay for later passes."""
        return self.num_chunks * CHUNK_BYTES

    def lend(self, count: int) -> list[Tensor]:
        """Return pieces of memory, uint8; what lies in them is another's until the stream's copies are done."""
        while len(self._free) < count:
            self._free.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=self.stream is not None))
            self.num_chunks += 1
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give_back(self, chunks: list[Tensor]) -> None:
        """Take pieces back; copies from them may still be queued on the stream."""
        self._free.extend(chunks)


class HostInputs:
    """The inputs of one forward pass's layers, until its backward pass has brought them back."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._passing: dict[int, Tensor] = {}
        """Inputs on the device that their layer has not begun with."""
        self._chunks: dict[int, list[Tensor]] = {}
        self._shapes: dict[int, tuple[torch.Size, torch.dtype]] = {}
        self._arriving: dict[int, tuple[Tensor, Any]] = {}
        self._leaving: tuple[Tensor, Any] | None = None

    def __del__(self) -> None:
        """Give back what a pass without a backward pass has left."""
        for chunks in self._chunks.values():
            self._memory.give_back(chunks)
        if self._arriving and self._memory.stream is not None:
            self._memory.stream.synchronize()  # its room is going to be another's

    def replace(self, number: int, stream: Tensor) -> Tensor:
        """Return a tensor that takes no memory in place of a layer's input [T, H]; the layer calls `take` with it."""
        result: Tensor = _Leave.apply(stream, self, number)
        return result

    def take(self, number: int, placeholder: Tensor) -> Tensor:
        """Return a layer's input: as it was, when the layer runs; brought back, when it runs again."""
        result: Tensor = _Take.apply(placeholder, self, number)
        return result

    def announce(self, number: int, stream: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what a layer gives as it is; before its backward pass the input of layer `number` is called back."""
        result: tuple[Tensor, Tensor | None] = _Announce.apply(stream, delta, self, number)
        return result

    def leave(self, number: int, tensor: Tensor) -> None:
        """Begin to copy an input to the host."""
        tensor = tensor.contiguous()
        size = tensor.numel() * tensor.element_size()
        chunks = self._memory.lend(-(-size // CHUNK_BYTES))
        self._passing[number], self._chunks[number] = tensor, chunks
        self._shapes[number] = tensor.shape, tensor.dtype
        self.let_go()
        self._leaving = tensor, self._copy(tensor, chunks, to_host=True)

    def begin(self, number: int) -> None:
        """Begin to bring an input back."""
        if number < 0 or number in self._arriving or number not in self._chunks:
            return
        shape, dtype = self._shapes[number]
        chunks = self._chunks.pop(number)
        tensor = torch.empty(shape, dtype=dtype, device=self._memory.device)
        self._arriving[number] = tensor, self._copy(tensor, chunks, to_host=False)
        self._memory.give_back(chunks)

    def find(self, number: int) -> Tensor:
        """Return an input on the device, in the order of its work."""
        if number in self._passing:
            return self._passing.pop(number).detach()
        self.let_go()
        self.begin(number)
        assert number in self._arriving, "a pass has one backward pass"
        tensor, event = self._arriving.pop(number)
        if event is not None:
            torch.cuda.current_stream(self._memory.device).wait_event(event)
        self.begin(number - 1)
        return tensor

    def let_go(self) -> None:
        """Let go of the input that was copied last, which has to be done before its room is another's."""
        if self._leaving is not None and self._leaving[1] is not None:
            torch.cuda.current_stream(self._memory.device).wait_event(self._leaving[1])
        self._leaving = None

    def _copy(self, tensor: Tensor, chunks: list[Tensor], *, to_host: bool) -> Any:
        """Copy between a tensor and the host's memory; return the event after it, None on a CPU."""
        stream = self._memory.stream
        if stream is None:
            _copy_chunks(tensor, chunks, to_host=to_host)
            return None
        # Behind what writes the tensor, or what had its room before.
        stream.wait_stream(torch.cuda.current_stream(self._memory.device))
        with torch.cuda.stream(stream):
            _copy_chunks(tensor, chunks, to_host=to_host)
            event = torch.cuda.Event()
            event.record(stream)
        return event


@torch.no_grad()
def _copy_chunks(tensor: Tensor, chunks: list[Tensor], *, to_host: bool) -> None:
    flat = tensor.detach().view(-1).view(torch.uint8)
    for part, chunk in zip(flat.split(CHUNK_BYTES), chunks, strict=True):
        held = chunk[: part.numel()]
        if to_host:
            held.copy_(part, non_blocking=True)
        else:
            part.copy_(held, non_blocking=True)


class _Leave(torch.autograd.Function):
    """[T, H] -> the same without values, which takes no memory."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, inputs: HostInputs, number: int) -> Tensor:
        inputs.leave(number, stream.detach())
        return stream.new_full((), float("nan")).expand(stream.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, None


class _Take(torch.autograd.Function):
    """The placeholder of `_Leave` -> the layer's input."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, inputs: HostInputs, number: int) -> Tensor:
        return inputs.find(number)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, None


class _Announce(torch.autograd.Function):
    """What a layer gives, as it is."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, delta: Tensor | None, inputs: HostInputs, number: int
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.settings = inputs, number
        inputs.let_go()
        return stream, delta

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        inputs, number = ctx.settings
        inputs.begin(number)
        return *grads, None, None
