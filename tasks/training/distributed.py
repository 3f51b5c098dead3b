"""Several processes that train one adapter: each holds all of it, and takes its share of every step's micro batches.

    gradient of a step = sum over ranks of the gradients of their micro batches' loss sums / trained tokens of the step

so that any number of ranks optimizes the same sum as one. Only the adapter is trained: its gradients are put into one
vector and summed once a step. With one process the functions here communicate nothing and return what they are given.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from schemas.config import TrainingConfig
from schemas.plurals import count_of
from tasks.training.batches import Batch
from tasks.training.records import TrainingError
from tasks.training.token_table import TokenTable

T = TypeVar("T")
_BUCKET = 1 << 26  # gradients summed in one collective
_EXAMPLES_AT_ONCE = 4096  # of a part, whose tokens are copied
_TIMEOUT = timedelta(minutes=10)  # of a collective: a rank that hangs is an error, and no run that never ends


@contextmanager
def init_process_group() -> Iterator[None]:
    """Join the ranks that the elastic launcher started, and leave them at the end; alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        number, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= num_gpus:
            raise TrainingError(
                f"training.num_processes is over the {count_of(num_gpus, 'GPU')} that this machine shows: set it "
                f"to {num_gpus}, or widen CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=_TIMEOUT)
    yield
    # Not after an error: the others may never come.
    dist.barrier()
    dist.destroy_process_group()


def world_size() -> int:
    """Return how many ranks train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def machine() -> int:
    """Return the number of the machine that this rank is on."""
    return int(os.environ.get("GROUP_RANK", "0"))


def is_rank0() -> bool:
    """Say whether this rank is the one that writes and tells."""
    return rank() == 0


def count_sharing(config: TrainingConfig) -> int:
    """Return how many ranks share the tokens of a batch."""
    return config.context_parallel if world_size() > 1 else 1


def find_turn(num_sharing: int) -> tuple[int, int]:
    """Return this rank's number among those that batches are dealt to, and how many there are.

    Args:
        num_sharing: ranks that share the tokens of a batch, and take the same ones.
    """
    return rank() // num_sharing, max(1, world_size() // num_sharing)


def shard_batches(batches: Sequence[Batch], *, is_even: bool, num_sharing: int = 1) -> list[tuple[Batch, float]]:
    """Return this rank's micro batches with weight 1.

    Args:
        batches: of the whole step, longest first: dealt in turns, so that each rank gets its share of long ones; or
            this rank's, and one that counts those of the others.
        num_sharing: see `find_turn`.
        is_even: give each rank as many, filled up with micro batches of weight 0, for models whose forward pass is a
            collective.
    """
    number, count = find_turn(num_sharing)
    if any(batch.is_elsewhere for batch in batches):  # they were dealt before they were formed
        own = [batch for batch in batches if not batch.is_elsewhere]
        num_turns = max(gather(len(own))) if is_even else len(own)
        return [(batch, 1.0) for batch in own] + [(own[-1], 0.0)] * (num_turns - len(own))
    mine = [(batch, 1.0) for batch in batches[number::count]]
    num_turns = -(-len(batches) // count) if is_even else len(mine)
    return mine + [(batches[-1], 0.0)] * (num_turns - len(mine))


def keep_pace(batches: Iterable[Batch], *, is_even: bool) -> Iterator[tuple[Batch, bool]]:
    """Give this rank's batches, and whether each counts; every rank gets as many where passes are collectives.

    Args:
        batches: at least one where another rank has one.
        is_even: fill up with the last batch, which does not count again.
    """
    if not is_even:
        yield from ((batch, True) for batch in batches)
        return
    mine = list(batches)
    num_turns = max(gather(len(mine)))
    yield from ((mine[min(turn, len(mine) - 1)], turn < len(mine)) for turn in range(num_turns))


def sum_gradients(parameters: Iterable[nn.Parameter], *figures: Tensor) -> list[Tensor]:
    """Sum gradients (in place) and scalar figures over the ranks; return the figures, in fp32.

    An adapter's go in one collective, a whole model's in some, so that no second copy of them is held.
    A rank without a gradient, because it had no micro batch, adds zero.
    """
    numbers = [figure.detach().float().reshape(1) for figure in figures]
    if world_size() == 1:
        return [number[0] for number in numbers]
    *buckets, last = _divide(parameters)
    for bucket in buckets:
        _sum_bucket(bucket, [])
    return _sum_bucket(last, numbers)


def _sum_bucket(trained: Sequence[nn.Parameter], numbers: Sequence[Tensor]) -> list[Tensor]:
    """Sum some gradients and numbers [1] in one collective."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), *numbers])
    dist.all_reduce(flat)
    *pieces, sums = flat.split([*(gradient.numel() for gradient in gradients), len(numbers)])
    for parameter, gradient, piece in zip(trained, gradients, pieces, strict=True):
        parameter.grad = gradient.copy_(piece.view_as(gradient))
    return list(sums)


def _divide(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return parameters in groups of about _BUCKET values, at least one group."""
    buckets: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        if size >= _BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return buckets


def sum_flat(gradient: Tensor, *figures: Tensor) -> list[Tensor]:
    """Sum gradients that lie end to end (in place) and scalar figures over the ranks; return the figures, in fp32."""
    numbers = torch.stack([figure.detach().float() for figure in figures])
    if world_size() > 1:
        dist.all_reduce(gradient)
        dist.all_reduce(numbers)
    return list(numbers)


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank."""
    if world_size() == 1:
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes)


def gather(value: T) -> list[T]:
    """Return every rank's value, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_rank0(work: Callable[[], T]) -> T:
    """Have the leader alone do something; return the result, or raise the error, on every rank."""
    if world_size() == 1:
        return work()
    answer: list[Any] = [None, None]
    if is_rank0():
        try:
            answer[0] = work()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    result: T = answer[0]
    return result


def run_once_per_node(work: Callable[[], None]) -> None:
    """Call a function on one rank of each machine; all ranks wait before and after it.

    Raises:
        Exception: on every rank, what one of them raised.
    """
    gather(None)
    failure = None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        try:
            work()
        except Exception as error:
            failure = error
    for found in gather(failure):
        if found is not None:
            raise found


def check_ranks_agree(parameters: Mapping[str, nn.Parameter], *, step: int) -> None:
    """Raise TrainingError unless every rank holds the same bits.

    Compares the sum of each tensor's bit patterns as integers: exact, and nothing is copied to the host but the sums.
    """
    if world_size() == 1:
        return
    sums = torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for p in parameters.values()])
    everyone = gather(sums.tolist())
    different = [number for number, values in enumerate(everyone) if values != everyone[0]]
    if different:
        raise TrainingError(
            f"step {step}: the adapter of rank {different[0]} is no longer the one of rank 0: a device computes "
            "wrongly or the ranks run different software; the checkpoints before this step are whole"
        )


def share_table(table: TokenTable, num_sharing: int = 1) -> list[tuple[TokenTable, bool]]:
    """Divide examples for evaluation: this rank's part, equally many on each, and the few left over, which all compute.

    Args:
        table: the examples.
        num_sharing: see `find_turn`.

    Returns:
        Tables, and whether this rank counts them.
    """
    return [(part, counts) for part, _, counts in share_examples(table, num_sharing)]


def share_examples(table: TokenTable, num_sharing: int = 1) -> Iterable[tuple[TokenTable, NDArray[np.int64], bool]]:
    """Do what `share_table` does, and tell the examples' numbers in the whole table as well; pairs stay together.

    Of a table in parts each rank takes whole parts, some thousands of examples at a time.
    """
    number, num_ranks = find_turn(num_sharing)
    if table.parts is not None:
        return _share_parts(table, number, num_ranks)
    num_groups = len(table.group_lengths)
    order = np.argsort(-table.group_lengths, kind="stable")
    num_dealt = num_groups - num_groups % num_ranks
    parts = ((order[number:num_dealt:num_ranks], True), (order[num_dealt:], number == 0))
    if num_ranks == 1:
        return [(table, np.arange(len(table.example_ids)), True)]
    chosen = [(table.list_groups(groups), counts) for groups, counts in parts if len(groups)]
    return [(_choose(table, indices), indices, counts) for indices, counts in chosen]


def _share_parts(
    table: TokenTable, number: int, num_ranks: int
) -> Iterator[tuple[TokenTable, NDArray[np.int64], bool]]:
    """Yield this rank's share, as many pieces as every other rank has; one without so many has its last one again."""
    bounds, size, user = table.parts.bounds, _EXAMPLES_AT_ONCE * table.group, object()
    pieces: list[list[tuple[int, int, int]]] = [[] for _ in range(num_ranks)]
    for part, (start, stop) in enumerate(pairwise(bounds.tolist())):
        pieces[part % num_ranks] += [(part, at, min(at + size, stop)) for at in range(start, stop, size)]
    own = pieces[number] or pieces[0]
    for turn in range(max(map(len, pieces))):
        part, start, stop = own[min(turn, len(own) - 1)]
        table.parts.prepare(user, list(dict.fromkeys(each[0] for each in own[turn : turn + 2])) or [part])
        indices = np.arange(start, stop)
        yield _choose(table, indices), indices, bool(pieces[number]) and turn < len(own)
    table.parts.prepare(user, [])


def _choose(table: TokenTable, indices: np.ndarray[Any, Any]) -> TokenTable:
    """Return a table of the chosen examples."""
    if len(indices) == len(table.example_ids) and table.parts is None:
        return table
    spans = [slice(int(table.offsets[i]), int(table.offsets[i + 1])) for i in indices]
    return replace(
        table,
        example_ids=[table.example_ids[i] for i in indices],
        offsets=np.cumsum([0, *table.lengths[indices]]).astype(np.int64),
        input_ids=np.concatenate([table.input_ids[span] for span in spans]),
        targets=np.concatenate([table.targets[span] for span in spans]),
        weights=None if table.weights is None else np.concatenate([table.weights[span] for span in spans]),
        reference=None if table.reference is None else table.reference[indices],
        index=None,
        parts=None,
        head=None,
    )
