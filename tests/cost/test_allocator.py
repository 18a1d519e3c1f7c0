"""The simulated caching allocator: its rules one by one, and what must hold after any sequence of allocations and releases."""

import gc
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.cost.allocator import GRANULE, MIB, Allocator, Block, OutOfMemory, rounded, segment_size
from graphopt.cost.history import History, play, smallest_capacity, usage

KIB = 1024


@pytest.mark.parametrize(("asked", "block"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_requests_are_rounded_up_to_512_bytes(asked, block):
    assert rounded(asked) == block


@pytest.mark.parametrize(
    ("block", "segment"),
    [(512, 2), (MIB, 2), (MIB + 512, 20), (10 * MIB - 512, 20), (10 * MIB, 10), (10 * MIB + 512, 12), (31 * MIB, 32)],
)
def test_sizes_of_segments(block, segment):
    assert segment_size(block) == segment * MIB


@pytest.mark.parametrize(
    ("asked", "counted", "reserved"),
    [
        (700 * KIB, 700 * KIB, 2 * MIB),  # the small pool splits
        (3 * MIB, 3 * MIB, 20 * MIB),  # what is left is above 1 MiB
        (11 * MIB + 300 * KIB, 12 * MIB, 12 * MIB),  # 724 KiB are left: not split
        (11 * MIB, 12 * MIB, 12 * MIB),  # exactly 1 MiB is left: not split either
        (19 * MIB - 512, 19 * MIB - 512, 20 * MIB),
    ],
)
def test_a_large_block_is_handed_out_whole_unless_more_than_1_mib_is_left(asked, counted, reserved):
    allocator = Allocator()
    allocator.malloc(asked)
    assert (allocator.requested, allocator.allocated, allocator.reserved) == (asked, counted, reserved)


def test_expandable_segments_split_down_to_512_bytes_and_grow_by_pages():
    allocator = Allocator(expandable=True)
    allocator.malloc(11 * MIB)
    assert (allocator.allocated, allocator.reserved) == (11 * MIB, 20 * MIB)
    allocator.malloc(11 * MIB)
    assert (allocator.allocated, allocator.reserved) == (22 * MIB, 40 * MIB)
    assert [s.size for s in allocator.segments()] == [40 * MIB]


def test_the_smallest_block_that_fits_is_taken():
    allocator = Allocator()
    blocks = [allocator.malloc(size * MIB) for size in (30, 14, 22)]
    for block in blocks:
        allocator.free(block)
    assert allocator.malloc(14 * MIB).address == blocks[1].address
    assert allocator.malloc(15 * MIB).address == blocks[2].address
    assert allocator.reserved == 66 * MIB


def test_neighbours_are_joined_when_they_are_free():
    allocator = Allocator()
    first, second, third = (allocator.malloc(5 * MIB) for _ in range(3))
    assert [s.blocks for s in allocator.segments()] == [tuple((5 * MIB, used) for used in (True, True, True, False))]
    allocator.free(first)
    allocator.free(third)
    assert allocator.segments()[0].blocks == ((5 * MIB, False), (5 * MIB, True), (10 * MIB, False))
    allocator.free(second)
    assert allocator.segments()[0].blocks == ((20 * MIB, False),)


def test_streams_and_size_classes_have_pools_of_their_own():
    allocator = Allocator()
    allocator.free(allocator.malloc(3 * MIB))
    allocator.malloc(3 * MIB, stream=7)
    allocator.malloc(KIB)
    assert sorted((s.stream, s.small, s.size // MIB) for s in allocator.segments()) == [(0, False, 20), (0, True, 2), (7, False, 20)]


def test_free_segments_go_back_before_it_is_out_of_memory():
    allocator = Allocator(capacity=40 * MIB)
    allocator.free(allocator.malloc(15 * MIB))
    allocator.malloc(30 * MIB)
    assert (allocator.retries, allocator.reserved) == (1, 30 * MIB)
    with pytest.raises(OutOfMemory, match=r"12\.0 MiB more do not fit in 40\.0 MiB: 30\.0 MiB are reserved"):
        allocator.malloc(11 * MIB)


def test_a_segment_that_is_in_use_anywhere_stays():
    allocator = Allocator(capacity=40 * MIB)
    first, _ = allocator.malloc(9 * MIB), allocator.malloc(9 * MIB)
    allocator.free(first)
    with pytest.raises(OutOfMemory):
        allocator.malloc(25 * MIB)


def test_whole_pages_of_an_expandable_segment_go_back():
    allocator = Allocator(capacity=60 * MIB, expandable=True)
    first, _ = allocator.malloc(25 * MIB), allocator.malloc(9 * MIB)
    allocator.free(first)
    allocator.malloc(35 * MIB)
    # 20 of the first 25 MiB are whole pages; what follows the last block is mapped next.
    assert (allocator.retries, allocator.reserved) == (1, 60 * MIB)


def test_a_block_is_freed_once():
    allocator = Allocator()
    block = allocator.malloc(1)
    allocator.free(block)
    with pytest.raises(ValueError, match="not handed out"):
        allocator.free(block)


def test_a_smaller_device_may_do_where_a_larger_one_does_not():
    # With 46 MiB the 11 MiB take the free 20 MiB segment, which is then in use when the last small one is asked for. With 44 MiB that
    # segment must go back earlier, and 12 MiB take its place.
    history = History([3 * MIB, 25 * MIB, 11 * MIB, MIB], [0, ~0, 1, 2, 3])
    assert smallest_capacity(history) == usage(history).reserved == 48 * MIB
    assert usage(history, 44 * MIB).reserved == 40 * MIB
    with pytest.raises(OutOfMemory):
        usage(history, 46 * MIB)


SIZES = st.one_of(st.integers(1, 5000), st.integers(1, 60).map(lambda n: n * 300 * KIB), st.integers(1, 30).map(lambda n: n * MIB))


@st.composite
def histories(draw):
    """Allocations and releases in any order on two streams; half of them end with everything freed."""
    sizes, events, streams, live = [], [], {}, []
    for freed in draw(st.lists(st.booleans(), min_size=1, max_size=40)):
        if freed and live:
            events.append(~live.pop(draw(st.integers(0, len(live) - 1))))
        else:
            streams[len(sizes)] = draw(st.sampled_from([0, 0, 0, 1]))
            live.append(len(sizes))
            events.append(len(sizes))
            sizes.append(draw(SIZES))
    if draw(st.booleans()):
        events += [~i for i in live]
    return History(sizes, events, streams)


def check(allocator, live):
    """What must hold at any moment; `live` are the blocks that are handed out."""
    segments = allocator.segments()
    assert allocator.requested <= allocator.allocated <= allocator.reserved <= (allocator.capacity or allocator.reserved)
    assert allocator.reserved == sum(s.size for s in segments)
    assert allocator.allocated == sum(size for s in segments for size, used in s.blocks if used)
    spans = sorted((b.address, b.address + b.size) for b in live)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "two blocks overlap"
    inside = {(s.address, s.address + s.size) for s in segments}
    assert all(any(a <= start and end <= b for a, b in inside) for start, end in spans)
    for segment in segments:
        flags = [used for _, used in segment.blocks]
        assert all(a or b for a, b in itertools.pairwise(flags)), "two free neighbours are not joined"
        assert segment.size % GRANULE == 0


@settings(max_examples=60, deadline=None)
@given(histories(), st.booleans(), st.none() | st.integers(1, 100))
def test_invariants(history, expandable, capacity):
    allocator = Allocator(capacity and capacity * GRANULE, expandable=expandable)
    held = {}
    try:
        for event in history.events:
            if event < 0:
                allocator.free(held.pop(~event))
            else:
                held[event] = allocator.malloc(history.sizes[event], history.streams[event])
                assert held[event].size >= history.sizes[event]
            check(allocator, held.values())
    except OutOfMemory:
        check(allocator, held.values())
        return
    for block in held.values():
        allocator.free(block)
    assert allocator.allocated == allocator.requested == 0
    allocator.release_cached()
    assert allocator.reserved == 0
    assert allocator.segments() == ()


@settings(max_examples=60, deadline=None)
@given(histories(), st.booleans())
def test_the_smallest_capacity_suffices_and_so_does_every_larger_one(history, expandable):
    need = smallest_capacity(history, expandable=expandable)
    free = usage(history, expandable=expandable)
    assert free.allocated <= need <= free.reserved
    assert free.retries == 0
    for capacity in range(need, free.reserved + 1, GRANULE):
        assert usage(history, capacity, expandable=expandable).reserved <= capacity
    with pytest.raises(OutOfMemory):
        usage(history, need - GRANULE, expandable=expandable)


@settings(max_examples=40, deadline=None)
@given(histories())
def test_a_history_again_needs_as_much_once_segments_are_given_back(history):
    # With its own segments still there, blocks may settle in others of them, and it may need more.
    allocator = Allocator()
    everything = History(history.sizes, [*history.events, *(~i for i in range(len(history.sizes)))], history.streams)
    play(everything, allocator)
    peak = allocator.peak_reserved
    allocator.release_cached()
    assert allocator.reserved == allocator.allocated == 0
    play(everything, allocator)
    assert allocator.peak_reserved == peak


def test_what_a_simulation_allocates_goes_without_the_cyclic_collector():
    gc.collect()
    gc.disable()
    try:
        usage(History([MIB] * 40, [*range(40), *(~i for i in range(0, 40, 2))]))
        assert not [one for one in gc.get_objects() if type(one) is Block]
    finally:
        gc.enable()
