"""What a training step costs one of several ranks: how the forecast stands for the others, and what ranks send each other.

A forecast runs in one process. The other ranks are a process group that sends nothing; rank 0, whose shards are the largest, takes the
step on fake tensors, wrapped as in training, so that gathers, shards and messages are those of a real step. DistributedDataParallel alone
needs real tensors: `Replica` does on fake ones what its reducer does.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import _DEFAULT_FIRST_BUCKET_BYTES, _compute_bucket_assignment_by_size  # type: ignore[attr-defined]  # DDP's

from graphopt.errors import CostError

#: sizes in bytes of DDP's buckets: of the first, whose gradients come first, and of all others (`bucket_cap_mb`)
BUCKET_LIMITS = (_DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20)
#: names of torch's operators
_COLLECTIVES = {
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "broadcast_": "broadcast",
}


@dataclass(frozen=True)
class Parallel:
    """How a step runs on several ranks.

    Attributes:
        ranks: their number.
        wrap: the module that a step calls, from the plain one; called before the optimizer is made.
        without_reduction: the context for all micro-batches of a step but the last.
        warm_up: steps before the one that counts: DDP assigns its buckets in the second, FSDP allocates in the first.
        after_backward: sums gradients that no backward has summed.
        backend: "gloo" (CPU) or "nccl" (CUDA), which a forecast stands for.
    """

    ranks: int
    wrap: Callable[[nn.Module], nn.Module]
    without_reduction: Callable[[nn.Module], AbstractContextManager[Any]] = lambda _: nullcontext()
    warm_up: int = 2
    after_backward: Callable[[], None] = lambda: None
    backend: str = "gloo"

    @classmethod
    def alone(cls) -> "Parallel":
        """One process, for a measurement too."""
        return cls(1, lambda module: module, warm_up=0)

    @classmethod
    def replicated(cls, ranks: int, *, unused: Collection[str] = (), backend: str = "gloo") -> "Parallel":
        """DistributedDataParallel, for a forecast; `unused` are trainable parameters that no forward reads."""
        return cls(ranks, lambda module: Replica(module, ranks, unused), _no_sync, warm_up=1, backend=backend)


def _no_sync(module: nn.Module) -> AbstractContextManager[Any]:
    assert isinstance(module, Replica)
    return module.no_sync()


@dataclass(frozen=True)
class Collective:
    """One kind of message of a step: how many, and the bytes of all that they reduce, gather or scatter (whole, not a rank's share).

    Attributes:
        sizes: bytes of each, DDP's buckets for example, in their order; those of micro-batches in the middle once.
    """

    name: str
    calls: int
    bytes: int
    sizes: tuple[int, ...] = ()

    def sent(self, ranks: int, backend: str) -> int:
        """Bytes that one rank sends, and receives as many, by the ring algorithm. gloo's reduce-scatter sends what an all-reduce sends."""
        twice = self.name == "all-reduce" or (self.name == "reduce-scatter" and backend == "gloo")
        return self.bytes * (ranks - 1) * (1 + twice) // ranks


def collectives(messages: Iterable[tuple[str, int, int]]) -> tuple[Collective, ...]:
    """The messages of a step (operator, bytes, how often it counts), added up by collective."""
    calls: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    sizes: dict[str, list[int]] = {}
    for operator, size, times in messages:
        name = _COLLECTIVES.get(operator, operator)
        calls[name] += times
        totals[name] += times * size
        sizes.setdefault(name, []).append(size)
    return tuple(Collective(name, calls[name], totals[name], tuple(sizes[name])) for name in calls)


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """Inside, this process is rank 0 of `count`, and the others do not exist: nothing is sent.

    Raises CostError in a process that is one of several already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if distributed.is_initialized():
        raise CostError("a process of several cannot forecast other ranks", fix="Forecast in a process of its own: graphopt check --ranks")
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        distributed.destroy_process_group()


class Replica(nn.Module):
    """DistributedDataParallel(gradient_as_bucket_view=True) on fake tensors: every gradient moves to its place in a bucket.

    As DDP does, it fills buckets in the order in which gradients come; the first backward pass only records that.

    Attributes:
        buckets: one tensor each; they stay allocated between steps.
    """

    def __init__(self, module: nn.Module, ranks: int, unused: Collection[str] = ()) -> None:
        super().__init__()
        self.module, self.share, self.reduces = module, 1 / ranks, True
        self.buckets: list[Tensor] = []
        self._come: list[Tensor] = []
        self._places: dict[Tensor, tuple[Tensor, Tensor, set[Tensor]]] = {}  # view of a bucket, the bucket, and what it still waits for
        trained = [p for name, p in module.named_parameters() if p.requires_grad and name not in unused]
        self._count = len(trained)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._receive)

    def _receive(self, parameter: Tensor) -> None:
        """Takes a gradient that is ready."""
        if not self.buckets:
            self._come.append(parameter)
            if len(self._come) == self._count:
                self._assign(self._come)
        elif self.reduces and parameter.grad is not None:
            view, bucket, waiting = self._places[parameter]
            torch.mul(parameter.grad, self.share, out=view)
            parameter.grad = view
            waiting.discard(parameter)
            if not waiting:
                waiting.update(p for p, (_, other, _) in self._places.items() if other is bucket)
                distributed.all_reduce(bucket)

    def _assign(self, parameters: list[Tensor]) -> None:
        assigned, _ = _compute_bucket_assignment_by_size(parameters, list(BUCKET_LIMITS))
        for indices in assigned:
            members = [parameters[index] for index in indices]
            bucket = torch.empty(sum(p.numel() for p in members), dtype=members[0].dtype)
            offset, waiting = 0, set(members)
            for parameter in members:
                self._places[parameter] = bucket.as_strided(parameter.shape, parameter.stride(), offset), bucket, waiting
                offset += parameter.numel()
            self.buckets.append(bucket)

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients add up and stay on this rank."""
        self.reduces = False
        try:
            yield
        finally:
            self.reduces = True
