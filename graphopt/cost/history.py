"""What a history of allocations needs of a CUDA device: its peaks, and the smallest capacity that suffices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.cost.allocator import GRANULE, Allocator, Block, OutOfMemory


@dataclass(frozen=True)
class History:
    """Allocations and releases in order.

    Attributes:
        sizes: bytes of each storage; one of no bytes takes no memory.
        events: storage i allocated: i; freed: ~i.
        streams: of storages that are not allocated on stream 0.
    """

    sizes: Sequence[int]
    events: Sequence[int]
    streams: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage:
    """What a history needs, in bytes: the peaks of an `Allocator`, and how often it had to give memory back to go on."""

    requested: int
    allocated: int
    reserved: int
    retries: int


def play(history: History, allocator: Allocator) -> None:
    """Allocates and frees as the history says. Raises OutOfMemory."""
    held: dict[int, Block] = {}
    sizes, streams = history.sizes, history.streams
    for event in history.events:
        if event < 0:
            block = held.pop(~event, None)
            if block is not None:
                allocator.free(block)
        elif sizes[event]:
            held[event] = allocator.malloc(sizes[event], streams.get(event, 0))


def usage(history: History, capacity: int | None = None, *, expandable: bool = False) -> Usage:
    """The peaks of a history on a device that can give `capacity` bytes. Raises OutOfMemory."""
    allocator = Allocator(capacity, expandable=expandable)
    try:
        play(history, allocator)
    finally:
        allocator.close()
    return Usage(allocator.peak_requested, allocator.peak_allocated, allocator.peak_reserved, allocator.retries)


def smallest_capacity(history: History, *, expandable: bool = False, reserved: int | None = None) -> int:
    """The smallest capacity in bytes that suffices, and from which on every larger one does.

    `reserved` is what the history reserves on a device that can give any number, where that is known.

    The real allocator is not monotone: where memory is short it gives segments back and gets others, and may then need less in all. So a
    still smaller device may do, and between it and this one there is one that does not; bisection would find any of these. Here every
    capacity is covered: a run that was given `c` bytes and reserved at most `p` goes the same way for every capacity from `p` to `c`,
    because each segment that was refused at `c` is refused there too. So the next run gets just less than `p`, until one fails.
    """
    found = usage(history, expandable=expandable).reserved if reserved is None else reserved
    while found > 0:
        try:
            found = usage(history, found - GRANULE, expandable=expandable).reserved
        except OutOfMemory:
            break
    return found
