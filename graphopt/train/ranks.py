"""The processes that train together: how they join, what they agree on, and who reports an error.

Every process of a run is a rank. torchrun (or `graphopt train --ranks`) starts them and says by environment variables who they are.
Everything that decides how a run goes on is the same on all ranks: it is computed from values that were reduced over ranks, or rank 0
decides and the others get its answer.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count as numbers
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, distributed

from graphopt.data.loader import Rank
from graphopt.errors import GraphoptError, RunError, first_line, listed, silenced
from graphopt.train.meeting import elastic, meet, place
from graphopt.train.signals import heard

_distributed: Any = distributed  # torch does not declare all of its names

#: how many times as long ranks wait for each other until the first step of a phase is over: it fills caches, and compiles
SLOW = 6
#: seconds in which ranks notice that a collective has failed
NOTICE = 5.0
Result = TypeVar("Result")
_joins = numbers()  # the same on all ranks: each run of a process has its own part of the store


@dataclass(frozen=True)
class Ranks(Rank):
    """This process among those that train together; with `count` 1, nothing here communicates.

    Attributes:
        local: the number among the processes of this machine, by which it gets its GPU.
        again: whether ranks were there before and have ended, so that the run continues from its last checkpoint; rank 0 knows it.
        members: of some of a run's ranks, their numbers in the run; empty where these are all.
    """

    local: int = 0
    timeout: float = field(default=300.0, compare=False)  # seconds
    again: bool = field(default=False, compare=False)
    _store: Any = field(default=None, repr=False, compare=False)
    _group: Any = field(default=None, repr=False, compare=False)  # gloo, for values on the CPU; never used by gradients
    _owner: bool = field(default=False, repr=False, compare=False)  # whether this object has started torch.distributed
    members: tuple[int, ...] = ()

    @classmethod
    def join(cls, timeout: float) -> Self:
        """Meets the processes that torchrun has started (or those of a process group that exists); alone, there is one rank.

        They can say who reports an error; for all else comes `connected`. Raises RunError, which names the ranks that are missing, if not
        all have come within `timeout` seconds; and for an environment that is not torchrun's.
        """
        exists, again = distributed.is_available() and distributed.is_initialized(), restarted()
        number, count = (distributed.get_rank(), distributed.get_world_size()) if exists else place()
        if count == 1 and (exists or not elastic()):
            return cls(again=again)
        part = f"graphopt/{next(_joins)}"
        if exists:
            store = _distributed.PrefixStore(part, distributed.distributed_c10d._get_default_store())
        else:
            store, again = meet(part, number, count, timeout)
        return cls(number, count, int(os.environ.get("LOCAL_RANK", number)), timeout, again, store)

    def connected(self, device: torch.device) -> Self:
        """The same ranks with the groups that they communicate in: gloo for a CPU, and NCCL for this rank's CUDA device."""
        if self.count == 1:
            return self
        owner = not distributed.is_initialized()
        if owner:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            with heard():
                distributed.init_process_group(backend, store=self._store, rank=self.number, world_size=self.count)
        with heard():
            ranks = replace(self, _group=distributed.new_group(backend="gloo"), _owner=owner)
        ranks.expect(slow=True)
        return ranks

    def expect(self, *, slow: bool) -> None:
        """Sets how long this rank waits for the others in each collective: `timeout`, or longer."""
        if self.count == 1:
            return
        wait = timedelta(seconds=self.timeout * (SLOW if slow else 1))
        # torch gave it a public name in 2.14.
        set_timeout: Any = getattr(distributed, "set_timeout", distributed.distributed_c10d._set_pg_timeout)
        set_timeout(wait, self._group)
        if self._owner:
            # On CUDA, values on the CPU fail first: NCCL's own timeout aborts the process, and names no rank.
            spare = timedelta(minutes=1) if distributed.get_backend() != "gloo" else timedelta(0)
            set_timeout(wait + spare, distributed.group.WORLD)

    def new_group(self, backend: str | None = "gloo") -> Any:
        """A further group of these ranks, for a thread that communicates by itself, say; all of them have to call it."""
        wait, some = timedelta(seconds=self.timeout * SLOW), list(self.members) or None
        with heard():
            return distributed.new_group(some, wait, backend, use_local_synchronization=some is not None)

    def among(self, members: Sequence[int]) -> Self:
        """Some of the ranks, of which this is one; all of those have to call it."""
        if len(members) == 1:
            return type(self)()
        own = replace(self, number=members.index(self.number), count=len(members), members=tuple(members), _owner=False)
        return replace(own, _group=own.new_group())

    def apart(self) -> Self:
        """The same ranks with a group of their own, for a thread that communicates by itself; all ranks have to call it."""
        return replace(self, _group=self.new_group(), _owner=False) if self.count > 1 else self

    @property
    def group(self) -> Any:
        """The gloo group that they communicate in; None alone."""
        return self._group

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints, and writes the run's folder."""
        return self.number == 0

    def leave(self) -> None:
        """Ends what `join` has started."""
        if self._owner and distributed.is_initialized():
            distributed.destroy_process_group()

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The value of one rank, on every rank; any object that can be pickled, tensors on the CPU."""
        values = [value]
        if self.count > 1:
            distributed.broadcast_object_list(values, src=self._in_run(source), group=self._group)
        return values[0]

    def collect(self, value: Any) -> list[Any] | None:
        """The values of all ranks, in order, on rank 0; None on the others."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.first else None
        distributed.gather_object(value, values, dst=self._in_run(0), group=self._group)
        return values

    def _in_run(self, number: int) -> int:
        return self.members[number] if self.members else number

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank."""
        values: list[Any] = [None] * self.count
        if self.count == 1:
            return [value]
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def together(self, work: Callable[[], Result]) -> Result:
        """What `work` gives on this rank; raises the RunError of the first rank that has one on every rank, so that all go on as one."""
        value: Result | None = None
        error: RunError | None = None
        try:
            value = work()
        except RunError as raised:
            error = raised
        for found in self.gather(error):
            if found is not None:
                raise found
        return cast(Result, value)

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

    def require_equal(self, values: Mapping[str, str]) -> None:
        """Raises RunError on every rank unless all ranks have the same texts (digests, say), by what they are; says which ranks differ.

        Where a rank does not have one of rank 0's, only the others are compared.
        """
        if self.count == 1:
            return
        known = self.gather(dict(values))
        other = {name: [rank for rank, of in enumerate(known) if of.get(name, text) != text] for name, text in known[0].items()}
        if different := [name for name, ranks in other.items() if ranks]:
            which = sorted({rank for ranks in other.values() for rank in ranks})
            what = f"{listed(different)}: rank {listed(map(str, which))} differs from rank 0"
            raise RunError(what, where=f"{self.count} ranks", fix="Give all ranks the same files and versions")

    def reported(self, error: Exception) -> Exception:
        """The error to raise for one that has ended a run here: with this rank's number, or silent if another rank reports it."""
        if self.count == 1:
            return error
        broken = isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
        late = broken and "Timed out" in str(error)
        if broken:
            self._tell("waits")
        watched = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun says which rank has died
        if broken and not late and not watched:
            time.sleep(NOTICE / 10)  # the rank that knows more reports it
        if (broken and not late and watched) or not self._claims_report():
            return silenced(error)
        if broken:
            error = self._missing() if late else self._disconnected(error)
        if isinstance(error, GraphoptError):
            return error.with_location(f"rank {self.number}")
        error.add_note(f"rank {self.number}")  # of a user's own code, or an error in graphopt
        return error

    def ask_to_stop(self, signum: int) -> None:
        """Tells all ranks that this one has got a stop signal, without a message to any of them."""
        self._store.set("stop", str(signum))

    def asked_to_stop(self) -> int:
        """The stop signal that a rank has reported, or 0."""
        return int(self._store.get("stop")) if self._store.check(["stop"]) else 0

    def _tell(self, what: str) -> None:
        with suppress(RuntimeError):  # the store's own process may have ended
            self._store.set(f"{what}/{self.number}", "1")

    def _claims_report(self) -> bool:
        with suppress(RuntimeError):
            return bool(self._store.add("reported", 1) == 1)
        return self.first

    def _missing(self) -> RunError:
        """After a collective has waited too long: ranks that wait notice that soon, others hang or are gone."""
        missing, end = list(range(self.count)), time.monotonic() + NOTICE
        with suppress(RuntimeError):
            while missing and time.monotonic() < end:
                missing = [rank for rank in missing if not self._store.check([f"waits/{rank}"])]
                time.sleep(0.05)
        who = f"rank {listed(map(str, missing))} of {self.count}" if missing else "another rank"
        what = f"{who} does not answer; the others have waited for {self.timeout:.0f} s or longer"
        return RunError(what, fix=f"Look for its own error, or raise train.timeout; {_CONTINUE}")

    def _disconnected(self, error: Exception) -> RunError:
        what = f"the connection to another rank broke ({first_line(error)[:200]})"
        return RunError(what, fix=f"Look for that rank's own error; {_CONTINUE}")


_CONTINUE = "the run continues from the last checkpoint with --resume"


ALONE = Ranks()


class Agreement:
    """A number per step that all ranks agree on, the largest that any rank gave; known one step later, so that no step waits for it.

    More numbers may travel with it, as many on each rank; `receive` gets them of all ranks, (ranks, numbers) int64, step by step.
    """

    def __init__(self, ranks: Ranks, receive: Callable[[Tensor], None] | None = None) -> None:
        self._ranks, self._receive = ranks, receive
        self._pending: tuple[Any, list[Tensor]] | None = None
        self._known = 0

    def __call__(self, value: int, *more: int) -> int:
        """Gives this step's numbers, and returns the largest value of the step before; alone, the value itself."""
        if self._ranks.count == 1:
            if self._receive is not None:
                self._receive(torch.tensor([more]))
            return value
        self.finish()
        row = torch.tensor([value, *more])
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
            if self._receive is not None:
                self._receive(found[:, 1:])


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure; `Ranks.again` knows about all processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
