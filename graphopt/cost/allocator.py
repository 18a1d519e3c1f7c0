"""Simulates CUDA's caching allocator: what `torch.cuda.max_memory_allocated` and `max_memory_reserved` would show, without a GPU.

The rules are those of torch's native backend with its default settings (`c10/cuda/CUDACachingAllocator.cpp`, constants in
`c10/core/AllocatorConfig.h`; torch 2.14), and, as an option, of `expandable_segments:True`:

- A request is rounded up to a multiple of 512 bytes. Up to 1 MiB it belongs to the small pool, else to the large one; each stream has
  pools of its own.
- The smallest free block that is large enough is taken, of equal ones that at the lowest address. What is left of it becomes a block of
  its own: in the small pool from 512 bytes on, in the large pool only above 1 MiB. Otherwise the whole block is handed out and counted.
- Without such a block, a segment comes from the driver: 2 MiB for the small pool, 20 MiB for requests below 10 MiB, else the request
  rounded up to 2 MiB. If the device cannot give it, all segments that are wholly free go back, and it is tried once more.
- A freed block is joined with its free neighbours in the segment.
- Expandable segments: a pool is one range of addresses that grows by pages of 2 MiB (small pool) or 20 MiB, and is split down to 512 bytes.

One thing is unknown: the address that the driver gives a segment. It decides only between free blocks of equal size in different segments.
Here addresses grow, and a `place` of the caller's may give recorded ones.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from graphopt.errors import CostError
from graphopt.units import show_size

MIB = 2**20
MIN_BLOCK = 512
SMALL = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
MIN_OWN_SEGMENT = 10 * MIB
#: every segment is a multiple of it
GRANULE = 2 * MIB
#: bytes of addresses that an expandable segment may grow to
_ADDRESSES = 2**46
_ADDRESS_BITS = 64


class OutOfMemory(CostError):
    """The device cannot give a segment, although all that is free has gone back to it."""


def rounded(size: int) -> int:
    """Bytes of the block for a request: a multiple of 512."""
    return -(-size // MIN_BLOCK) * MIN_BLOCK or MIN_BLOCK


def segment_size(size: int) -> int:
    """Bytes of the segment that is asked of the driver for a block of `size`."""
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < MIN_OWN_SEGMENT else -(-size // GRANULE) * GRANULE


class Block:
    """A range of addresses in one segment: allocated, free, or, in an expandable segment, without memory behind it (not `mapped`)."""

    __slots__ = ("address", "allocated", "mapped", "next", "pool", "prev", "requested", "size")

    def __init__(self, pool: "_Pool", address: int, size: int, *, mapped: bool = True) -> None:
        self.pool, self.address, self.size, self.mapped = pool, address, size, mapped
        self.allocated, self.requested = False, 0
        self.prev: Block | None = None
        self.next: Block | None = None

    def split(self, size: int) -> "Block":
        """Keeps the first `size` bytes; the rest is the block that is returned."""
        rest = Block(self.pool, self.address + size, self.size - size, mapped=self.mapped)
        rest.prev, rest.next, self.next, self.size = self, self.next, rest, size
        if rest.next is not None:
            rest.next.prev = rest
        return rest


class _Pool:
    """The free blocks of one stream and size class."""

    def __init__(self, stream: int, small: bool) -> None:
        self.stream, self.small = stream, small
        self.page = SMALL_SEGMENT if small else LARGE_SEGMENT
        #: sizes and, below them, addresses: one number is compared faster than two
        self.keys: list[int] = []
        self.at: dict[int, Block] = {}
        self.unmapped: list[Block] = []

    def add(self, block: Block) -> None:
        key = block.size << _ADDRESS_BITS | block.address
        insort(self.keys, key)
        self.at[key] = block

    def remove(self, block: Block) -> None:
        key = block.size << _ADDRESS_BITS | block.address
        del self.keys[bisect_left(self.keys, key)]
        del self.at[key]

    def blocks(self) -> list[Block]:
        return [self.at[key] for key in self.keys]


@dataclass(frozen=True)
class Segment:
    """Memory that the driver gave, with its blocks in the order of their addresses."""

    address: int
    stream: int
    small: bool
    blocks: tuple[tuple[int, bool], ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(size for size, _ in self.blocks)


class Allocator:
    """The allocator of one device.

    Args:
        capacity: bytes that the device can give it; None: any number.
        expandable: whether segments grow (`expandable_segments:True`).
        place: gives the address of the next segment, or None: above all others, as without it.

    Attributes:
        requested, allocated, reserved: bytes that were asked for, that the blocks handed out have, and that the driver has given.
        peak_requested, peak_allocated, peak_reserved: the most of each so far.
        retries: how often free segments had to go back to the driver.
    """

    def __init__(self, capacity: int | None = None, *, expandable: bool = False, place: Callable[[], int | None] = lambda: None) -> None:
        self.capacity, self.expandable = capacity, expandable
        self.requested = self.allocated = self.reserved = 0
        self.peak_requested = self.peak_allocated = self.peak_reserved = self.retries = 0
        self._place = place
        self._top = GRANULE
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._heads: dict[int, Block] = {}

    def malloc(self, size: int, stream: int = 0) -> Block:
        """A block for `size` bytes, at least 1. Raises OutOfMemory if the capacity does not suffice."""
        if size < 1:
            raise ValueError(f"a block has at least one byte, found {size}")
        need = rounded(size)
        kind = stream, need <= SMALL
        pool = self._pools.get(kind)
        if pool is None:
            pool = self._pools[kind] = _Pool(*kind)
        block = self._best_fit(pool, need) or self._grow(pool, need)
        if block is None:
            self.release_cached()
            self.retries += 1
            block = self._grow(pool, need)
        if block is None:
            raise OutOfMemory(
                f"{show_size(segment_size(need))} more do not fit in {show_size(self.capacity or 0)}: {show_size(self.reserved)} are "
                f"reserved, of which {show_size(self.allocated)} are in use",
                fix="Give the device more memory, or use a smaller batch",
            )
        rest = block.size - need
        if rest >= MIN_BLOCK if pool.small or self.expandable else rest > SMALL:
            pool.add(block.split(need))
        block.allocated, block.requested = True, size
        self.requested += size
        self.allocated += block.size
        if self.requested > self.peak_requested:
            self.peak_requested = self.requested
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def free(self, block: Block) -> None:
        """Gives a block back. Raises ValueError if it is not handed out."""
        self.request_free(block)
        self.complete_free(block)

    def request_free(self, block: Block) -> None:
        """The first half of `free`: from here on the block does not count as allocated."""
        if not block.allocated or not block.requested:
            raise ValueError("this block is not handed out")
        self.requested -= block.requested
        self.allocated -= block.size
        block.requested = 0

    def complete_free(self, block: Block) -> None:
        """The second half: other streams have finished with the block, and it can be handed out again."""
        block.allocated = False
        block.pool.add(self._joined(block))

    def release_cached(self) -> None:
        """Gives all memory that is wholly free back to the driver (`torch.cuda.empty_cache`)."""
        for pool in self._pools.values():
            for block in pool.blocks():
                if self.expandable:
                    self._unmap(block)
                elif block.prev is None and block.next is None:
                    pool.remove(block)
                    del self._heads[block.address]
                    self.reserved -= block.size

    def close(self) -> None:
        """Lets go of all blocks, which hold one another, so that the cyclic collector need not find them. The peaks stay."""
        for head in self._heads.values():
            for block in _chain(head):
                block.prev = None
        for pool in self._pools.values():
            pool.at.clear()

    def segments(self) -> tuple[Segment, ...]:
        """The segments that the driver has given, by address; of an expandable one each mapped range."""
        found = []
        for head in self._heads.values():
            run: list[Block] = []
            for block in (*_chain(head), None):
                if block is not None and block.mapped:
                    run.append(block)
                elif run:
                    parts = tuple((b.size, b.allocated) for b in run)
                    found.append(Segment(run[0].address, head.pool.stream, head.pool.small, parts))
                    run = []
        return tuple(sorted(found, key=lambda s: s.address))

    def _address(self, size: int) -> int:
        address = self._place()
        if address is None:
            address, self._top = self._top, self._top + size
        return address

    def _best_fit(self, pool: _Pool, need: int) -> Block | None:
        at = bisect_left(pool.keys, need << _ADDRESS_BITS)
        if at == len(pool.keys):
            return None
        if not self.expandable:
            return pool.at.pop(pool.keys.pop(at))
        block = pool.at[pool.keys[at]]
        # A block that can grow counts as large as it can become: it is taken last.
        while at + 1 < len(pool.keys):
            at += 1
            after = pool.at[pool.keys[at]]
            if _growable(after) >= _growable(block):
                break
            block = after
        pool.remove(block)
        return block

    def _grow(self, pool: _Pool, need: int) -> Block | None:
        """A free block from the driver, in no list; None if the device cannot give it."""
        if self.expandable:
            return self._expand(pool, need)
        size = segment_size(need)
        if not self._take(size):
            return None
        block = Block(pool, self._address(size), size)
        self._heads[block.address] = block
        return block

    def _take(self, size: int) -> bool:
        if self.capacity is not None and self.reserved + size > self.capacity:
            return False
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _expand(self, pool: _Pool, need: int) -> Block | None:
        """Maps pages behind the lowest free addresses that suffice."""
        found = next((c for u in pool.unmapped if _room(c := _start(u)) >= need), None)
        if found is None:
            found = Block(pool, self._address(_ADDRESSES), _ADDRESSES, mapped=False)
            self._heads[found.address] = found
            pool.unmapped.append(found)
        if not found.mapped:
            found = self._map(found, min(found.size, need))
        while found is not None and found.size < need:
            assert found.next is not None
            found = self._map(found.next, min(need - found.size, found.next.size))
        if found is not None:
            pool.remove(found)
        return found

    def _map(self, block: Block, size: int) -> Block | None:
        """Puts memory behind the first `size` bytes of a block, in whole pages; the free block that they are then part of."""
        pool = block.pool
        size = -(-size // pool.page) * pool.page
        if not self._take(size):
            return None
        pool.unmapped.remove(block)
        if size < block.size:
            insort(pool.unmapped, block.split(size), key=lambda b: b.address)
        block.mapped = True
        joined = self._joined(block)
        pool.add(joined)
        return joined

    def _unmap(self, block: Block) -> None:
        """Takes the whole pages from behind a free block."""
        pool = block.pool
        base = self._base(block)
        first = base + -(-(block.address - base) // pool.page) * pool.page
        last = base + (block.address + block.size - base) // pool.page * pool.page
        if first >= last:
            return
        pool.remove(block)
        if first > block.address:
            kept, block = block, block.split(first - block.address)
            pool.add(kept)
        if last < block.address + block.size:
            pool.add(block.split(last - block.address))
        block.mapped = False
        self.reserved -= block.size
        block = self._joined(block)
        insort(pool.unmapped, block, key=lambda b: b.address)
        if block.prev is None and block.next is None:
            pool.unmapped.remove(block)
            del self._heads[block.address]

    @staticmethod
    def _base(block: Block) -> int:
        while block.prev is not None:
            block = block.prev
        return block.address

    def _joined(self, block: Block) -> Block:
        """The block together with its free neighbours, which leave their lists; it is in no list itself."""
        before, after = block.prev, block.next
        if before is not None and _joins(before, block):
            _absorb(before, block)
            block = before
        if after is not None and _joins(after, block):
            _absorb(block, after)
        return block


def _joins(neighbour: Block, block: Block) -> bool:
    """Takes a neighbour out of its list, if it is free and as mapped as the block is."""
    if neighbour.allocated or neighbour.mapped != block.mapped:
        return False
    if neighbour.mapped:
        neighbour.pool.remove(neighbour)
    else:
        neighbour.pool.unmapped.remove(neighbour)
    return True


def _absorb(one: Block, other: Block) -> None:
    """Adds the block behind `one` to it."""
    one.size += other.size
    one.next = other.next
    if one.next is not None:
        one.next.prev = one


def _chain(block: Block | None) -> Iterator[Block]:
    while block is not None:
        yield block
        block = block.next


def _growable(block: Block) -> int:
    """Bytes of a free block with the addresses behind it."""
    return block.size + (block.next.size if block.next is not None and not block.next.mapped else 0)


def _start(unmapped: Block) -> Block:
    before = unmapped.prev
    return unmapped if before is None or before.allocated else before


def _room(block: Block) -> int:
    """Bytes from a block on that nothing is handed out of."""
    total = 0
    for part in _chain(block):
        if part.allocated:
            break
        total += part.size
    return total
