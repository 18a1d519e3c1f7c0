"""Holds the simulated allocator against a recording of the real one.

A recording is what torch writes on a machine with a GPU:

    torch.cuda.memory._record_memory_history(stacks="python")     # before anything is allocated
    ...                                                           # some training steps
    torch.cuda.memory._dump_snapshot("snapshot.pickle")

Its `device_traces` list every request to the allocator and every segment that the driver gave or got back; its `segments` are what there
was at the end. Replaying the requests must lead to the same segments at the same moments, to the same addresses, and to the same end.

The file is a pickle. It is read without running code: an unpickler that knows plain values alone refuses everything else.
"""

import pickle
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.cost.allocator import Allocator, Block
from graphopt.cost.history import Usage
from graphopt.errors import CostError
from graphopt.units import show_size

#: what the driver gave or took, as torch names it, without and with expandable segments
_GIVEN, _TAKEN = ("segment_alloc", "segment_map"), ("segment_free", "segment_unmap")
_IN_USE = ("active_allocated", "active_awaiting_free", "active_pending_free")
_FROM_THE_START = "Record from the start of the process, with max_entries large enough"


class _PlainValues(pickle.Unpickler):
    """Builds numbers, texts and containers; a pickle that asks for anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a recording holds plain values alone")


def read_snapshot(path: Path) -> dict[str, Any]:
    """A recording, read without running code. Raises CostError if the file is none, or holds more than plain values."""
    try:
        with path.open("rb") as file:
            found = _PlainValues(file).load()
    except OSError as error:
        raise CostError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise CostError(f"is no recording: {error}", where=str(path), fix="Write it with torch.cuda.memory._dump_snapshot") from error
    if not isinstance(found, dict) or not {"segments", "device_traces"} <= found.keys():
        raise CostError("is no recording: it has no segments and device_traces", where=str(path))
    return found


@dataclass(frozen=True)
class Replay:
    """What a replay found.

    Attributes:
        simulated: the peaks of the simulation. reserved: the recorded peak of what the driver gave, in bytes.
        differences: how the simulation and the recording differ, in the order in which it shows; none if they agree.
    """

    simulated: Usage
    reserved: int
    differences: tuple[str, ...]


def replay(snapshot: Mapping[str, Any], device: int = 0, *, peak_allocated: int | None = None) -> Replay:
    """Replays the requests of one device.

    Args:
        snapshot: a recording that began before anything was allocated, without private pools (those of CUDA graphs).
        peak_allocated: what `torch.cuda.max_memory_allocated()` was at the end, to compare too: the recording itself does not say.

    Raises:
        CostError: the recording is not of the form that torch documents, or began in the middle.
    """
    try:
        trace = snapshot["device_traces"][device]
        run = _Run(expandable=any(entry["action"] == "segment_map" for entry in trace))
        for number, entry in enumerate(trace):
            run.follow(number, entry)
        run.compare_end([s for s in snapshot["segments"] if s.get("device", 0) == device], peak_allocated)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise CostError(f"the recording is not of torch's form: {type(error).__name__}: {error}") from error
    sim = run.allocator
    found = Usage(sim.peak_requested, sim.peak_allocated, sim.peak_reserved, sim.retries)
    return Replay(found, run.peak_reserved, tuple(run.differences))


class _Run:
    """A replay under way: the simulation, and what the recording says of the driver."""

    def __init__(self, *, expandable: bool) -> None:
        self.allocator = Allocator(expandable=expandable, place=self._place)
        self.differences: list[str] = []
        self.reserved = self.peak_reserved = 0
        self._held: dict[int, Block] = {}
        self._pending: dict[int, Block] = {}
        self._given: deque[tuple[int, int]] = deque()
        self._taken = 0
        self._at = 0
        self._actions: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "alloc": self._alloc,
            "free_requested": self._free_requested,
            "free_completed": self._free_completed,
            **dict.fromkeys(_GIVEN, self._gave),
            **dict.fromkeys(_TAKEN, self._took),
        }

    def follow(self, number: int, entry: Mapping[str, Any]) -> None:
        self._at = number
        action = entry["action"]
        if self._taken and action not in _TAKEN:
            self._release()
        if action in self._actions:
            self._actions[action](entry)

    def _differs(self, what: str) -> None:
        self.differences.append(f"entry {self._at}: {what}")

    def _gave(self, entry: Mapping[str, Any]) -> None:
        self._given.append((entry["addr"], entry["size"]))
        self.reserved += entry["size"]
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _took(self, entry: Mapping[str, Any]) -> None:
        self._taken += entry["size"]
        self.reserved -= entry["size"]

    def _release(self) -> None:
        """The driver had no more, or the cache was emptied: all that is free went back."""
        before = self.allocator.reserved
        self.allocator.release_cached()
        released, self._taken, recorded = before - self.allocator.reserved, 0, self._taken
        if released != recorded:
            self._differs(f"{show_size(recorded)} went back to the driver, simulated {show_size(released)}")

    def _place(self) -> int | None:
        """Where the recording has the segment that the simulation asks for."""
        return self._given[0][0] if self._given else None

    def _alloc(self, entry: Mapping[str, Any]) -> None:
        address, size = entry["addr"], entry["size"]
        before = self.allocator.reserved
        block = self.allocator.malloc(size, entry["stream"])
        simulated, recorded = self.allocator.reserved - before, sum(given for _, given in self._given)
        self._given.clear()
        if simulated != recorded:
            self._differs(f"for {size:,} bytes the driver gave {show_size(recorded)}, simulated {show_size(simulated)}")
        elif block.address != address:
            self._differs(f"{size:,} bytes lie at {address:#x}, simulated at {block.address:#x}")
        self._held[address] = block

    def _free_requested(self, entry: Mapping[str, Any]) -> None:
        address = entry["addr"]
        block = self._held.pop(address, None)
        if block is None:
            raise CostError(f"the recording frees {address:#x} (entry {self._at}), which it never allocated", fix=_FROM_THE_START)
        self.allocator.request_free(block)
        self._pending[address] = block

    def _free_completed(self, entry: Mapping[str, Any]) -> None:
        block = self._pending.pop(entry["addr"], None)
        if block is None:
            self._free_requested(entry)  # a recording may leave these out
            block = self._pending.pop(entry["addr"])
        self.allocator.complete_free(block)

    def compare_end(self, recorded: list[Mapping[str, Any]], peak_allocated: int | None) -> None:
        if self._taken:
            self._release()
        theirs = {s["address"]: (s["total_size"], s["stream"], s["segment_type"], _blocks(s)) for s in recorded}
        ours = {s.address: (s.size, s.stream, "small" if s.small else "large", s.blocks) for s in self.allocator.segments()}
        for address in sorted(theirs.keys() | ours.keys()):
            real, found = theirs.get(address), ours.get(address)
            if real != found:
                self.differences.append(f"at the end, segment {address:#x}: {_shown(real)}, simulated {_shown(found)}")
        sim = self.allocator
        for name, peak, simulated in (
            ("reserved", self.peak_reserved, sim.peak_reserved),
            ("allocated", peak_allocated, sim.peak_allocated),
        ):
            if peak is not None and peak != simulated:
                self.differences.append(f"peak {name}: {peak:,} bytes, simulated {simulated:,}")


def _blocks(segment: Mapping[str, Any]) -> tuple[tuple[int, bool], ...]:
    return tuple((b["size"], b["state"] in _IN_USE) for b in segment["blocks"])


def _shown(segment: tuple[int, int, str, tuple[tuple[int, bool], ...]] | None) -> str:
    if segment is None:
        return "none"
    size, stream, kind, blocks = segment
    parts = ", ".join(f"{part:,}" if used else f"{part:,} free" for part, used in blocks)
    return f"{show_size(size)} of the {kind} pool, stream {stream}, blocks {parts}"
