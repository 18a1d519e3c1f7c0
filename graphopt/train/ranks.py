"""The processes that train together: how they join, what they agree on, and who reports an error.

Every process of a run is a rank. torchrun (or `graphopt train --ranks`) starts them and says by environment variables who they are.
Everything that decides how a run goes on is the same on all ranks: it is computed from values that were reduced over ranks, or rank 0
decides and the others get its answer.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import rendezvous

from graphopt.data.loader import Rank
from graphopt.errors import GraphoptError, RunError, first_line, listed

#: how long a rank waits for the others to join, and for each collective
JOIN_TIMEOUT, STEP_TIMEOUT = timedelta(minutes=5), timedelta(minutes=30)


class SilentError(RunError):
    """An error that another rank reports. It only ends this process, with the exit status of `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.silent = True
        self.exit_code = getattr(error, "exit_code", 1)


@dataclass(frozen=True)
class Ranks(Rank):
    """This process among those that train together; with `count` 1, nothing here communicates.

    Attributes:
        local: the number among the processes of this machine, which is also the number of its GPU.
    """

    local: int = 0
    _group: Any = field(default=None, repr=False, compare=False)  # gloo, for values on the CPU; never used by gradients
    _store: Any = field(default=None, repr=False, compare=False)
    _owner: bool = field(default=False, repr=False, compare=False)  # whether this object has started torch.distributed

    @classmethod
    def join(cls, device: str) -> Self:
        """Joins the processes that torchrun has started (or a process group that exists); alone, there is one rank.

        `device` is "cpu" (gloo) or "cuda" (NCCL). Raises RunError, which names the ranks that are missing, if not all join in time.
        """
        if distributed.is_available() and distributed.is_initialized():
            local = int(os.environ.get("LOCAL_RANK", distributed.get_rank()))
            return cls._with_group(distributed.get_rank(), distributed.get_world_size(), local)
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        number, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
        if device == "cuda":
            torch.cuda.set_device(local)
        store, _, _ = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
        store.set(f"joined/{number}", "1")
        try:
            for other in range(count):
                store.wait([f"joined/{other}"], JOIN_TIMEOUT)
        except RuntimeError as error:
            missing = [str(rank) for rank in range(count) if not store.check([f"joined/{rank}"])]
            what = f"rank {listed(missing)} of {count} did not join within {JOIN_TIMEOUT.total_seconds():.0f} s"
            raise RunError(what, where=f"rank {number}", fix="Look for its error on its machine") from error
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=STEP_TIMEOUT)
        return cls._with_group(number, count, local, store=store, owner=True)

    @classmethod
    def _with_group(cls, number: int, count: int, local: int, store: Any = None, owner: bool = False) -> Self:
        group = distributed.new_group(backend="gloo", timeout=STEP_TIMEOUT) if count > 1 else None
        return cls(number, count, local, group, store, owner)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints, and writes the run's folder."""
        return self.number == 0

    def leave(self) -> None:
        """Ends what `join` has started."""
        if self._owner and distributed.is_initialized():
            distributed.destroy_process_group()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank; any object that can be pickled, tensors on the CPU."""
        values = [value]
        if self.count > 1:
            distributed.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank."""
        values: list[Any] = [None] * self.count
        if self.count == 1:
            return [value]
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over ranks, in float64."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def largest(self, value: float) -> float:
        """The largest value of any rank."""
        return self._reduced([value], distributed.ReduceOp.MAX)[0]

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.count > 1:
            distributed.all_reduce(tensor, operation, group=self._group)
        found: list[float] = tensor.tolist()
        return found

    def differing(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Per rank, the floating-point tensors (same names and shapes everywhere) that are not equal on all ranks; copies on the CPU."""
        if self.count == 1:
            return [{}]
        mine = {name: t.detach().to("cpu", copy=True) for name, t in sorted(tensors.items()) if t.is_floating_point()}
        for name, value in list(mine.items()):
            low, high = value.double().clone(), value.double().clone()
            distributed.all_reduce(low, distributed.ReduceOp.MIN, group=self._group)
            distributed.all_reduce(high, distributed.ReduceOp.MAX, group=self._group)
            if torch.equal(low, high):
                del mine[name]
        return self.gather(mine)

    def require_equal(self, value: str, what: str) -> None:
        """Raises RunError on every rank unless all ranks have the same text, a digest say; names the ranks that differ from rank 0."""
        if self.count == 1:
            return
        values = self.gather(value)
        other = [str(rank) for rank, found in enumerate(values) if found != values[0]]
        if other:
            raise RunError(f"{what}: rank {listed(other)} differs from rank 0", where=f"{self.count} ranks")

    def reported(self, error: Exception) -> Exception:
        """The error to raise for one that has ended a run here: with this rank's number, or silent if another rank reports it."""
        if self.count == 1:
            return error
        broken = isinstance(error, distributed.DistError) or "gloo" in str(error)
        if broken:
            what = f"the connection to another rank broke ({first_line(error)[:200]})"
            fix = "Look for that rank's own error; the run continues from the last checkpoint with --resume"
            error = RunError(what, fix=fix)
        if not self._claims_report():
            return SilentError(error)
        return error.with_location(f"rank {self.number}") if isinstance(error, GraphoptError) else error

    def _claims_report(self) -> bool:
        with suppress(RuntimeError):  # the store's own process may have ended
            return self._store is None or bool(self._store.add("reported", 1) == 1)
        return self.first


ALONE = Ranks()


class Agreement:
    """A number per step that all ranks agree on, the largest that any rank gave; known one step later, so that no step waits for it.

    More numbers may travel with it, as many on each rank; `receive` gets them of all ranks, (ranks, numbers) int64, step by step.
    """

    def __init__(self, ranks: Ranks, receive: Callable[[Tensor], None]) -> None:
        self._ranks, self._receive = ranks, receive
        self._pending: tuple[Any, list[Tensor]] | None = None
        self._known = 0

    def __call__(self, value: int, *more: int) -> int:
        """Gives this step's numbers, and returns the largest value of the step before; alone, the value itself."""
        row = torch.tensor([value, *more])
        if self._ranks.count == 1:
            self._receive(row[None, 1:])
            return value
        self.finish()
        rows = [torch.empty_like(row) for _ in range(self._ranks.count)]
        self._pending = distributed.all_gather(rows, row, group=self._ranks._group, async_op=True), rows
        known, self._known = self._known, 0
        return known

    def finish(self) -> None:
        """Waits for the last step's numbers, which a checkpoint after it needs; its value is returned by the next call."""
        if self._pending is not None:
            work, rows = self._pending
            self._pending = None
            work.wait()
            found = torch.stack(rows)
            self._known = max(self._known, int(found[:, 0].max()))
            self._receive(found[:, 1:])


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure; the run then continues from its last checkpoint."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
