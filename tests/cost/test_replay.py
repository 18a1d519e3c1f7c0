"""Replays of recordings. These are not from a GPU: they are written by hand, in the form of `torch.cuda.memory._snapshot`."""

import copy
import os
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.cost import CostError
from graphopt.cost.allocator import MIB
from graphopt.cost.replay import read_snapshot, replay

BIG, SMALL, OTHER = 0x7F0000000000, 0x7F0008000000, 0x7F0010000000
USED, FREE = "active_allocated", "inactive"


def entry(action, addr, size, stream=0):
    return {"action": action, "addr": addr, "size": size, "stream": stream, "frames": [], "time_us": 1}


def segment(address, kind, *parts):
    """A segment of blocks (size, state), one behind the other."""
    blocks, at = [], address
    for size, state in parts:
        blocks.append({"address": at, "size": size, "requested_size": size, "state": state, "frames": []})
        at += size
    sums = {"total_size": at - address, "allocated_size": sum(size for size, state in parts if state == USED), "active_size": 0}
    place = {"device": 0, "address": address, "stream": 0, "segment_type": kind, "segment_pool_id": (0, 0), "is_expandable": False}
    return {**place, **sums, "blocks": blocks, "frames": []}


#: 4 MiB, 5 MiB and 1000 bytes; the first is freed; 29 MiB come, and their segment goes back to the driver; 2 MiB take the first one's place
RECORDING = {
    "segments": [
        segment(BIG, "large", (2 * MIB, USED), (2 * MIB, FREE), (5 * MIB, USED), (11 * MIB, FREE)),
        segment(SMALL, "small", (1024, USED), (2 * MIB - 1024, FREE)),
    ],
    "device_traces": [
        [
            entry("segment_alloc", BIG, 20 * MIB),
            entry("alloc", BIG, 4 * MIB),
            entry("alloc", BIG + 4 * MIB, 5 * MIB),
            entry("segment_alloc", SMALL, 2 * MIB),
            entry("alloc", SMALL, 1000),
            entry("free_requested", BIG, 4 * MIB),
            entry("free_completed", BIG, 4 * MIB),
            entry("segment_alloc", OTHER, 30 * MIB),
            entry("alloc", OTHER, 29 * MIB),
            entry("free_requested", OTHER, 29 * MIB),
            entry("free_completed", OTHER, 29 * MIB),
            entry("segment_free", OTHER, 30 * MIB),
            entry("alloc", BIG, 2 * MIB),
            entry("snapshot", 0, 0),
        ]
    ],
}
#: the 29 MiB count as 30: 1 MiB is left of their segment, which is not split
PEAK = 35 * MIB + 1024


def changed(number, **fields):
    """The recording with fields of one entry replaced."""
    recording = copy.deepcopy(RECORDING)
    recording["device_traces"][0][number].update(fields)
    return recording


def test_a_recording_is_replayed_to_the_same_segments_addresses_and_peaks():
    found = replay(RECORDING, peak_allocated=PEAK)
    assert found.differences == ()
    assert found.reserved == found.simulated.reserved == 52 * MIB
    assert found.simulated.allocated == PEAK


def test_a_block_that_another_stream_still_uses_is_not_handed_out_again():
    # The release is asked for, and completed after the next request: that one lies behind.
    trace = [
        entry("segment_alloc", BIG, 20 * MIB),
        entry("alloc", BIG, 4 * MIB),
        entry("free_requested", BIG, 4 * MIB),
        entry("alloc", BIG + 4 * MIB, 4 * MIB),
        entry("free_completed", BIG, 4 * MIB),
    ]
    end = segment(BIG, "large", (4 * MIB, FREE), (4 * MIB, USED), (12 * MIB, FREE))
    found = replay({"segments": [end], "device_traces": [trace]}, peak_allocated=4 * MIB)
    assert found.differences == ()


def test_segments_that_grow_are_replayed():
    trace = [
        entry("segment_map", BIG, 20 * MIB),
        entry("alloc", BIG, 11 * MIB),
        entry("segment_map", BIG + 20 * MIB, 20 * MIB),
        entry("alloc", BIG + 11 * MIB, 11 * MIB),
        entry("free_requested", BIG + 11 * MIB, 11 * MIB),
        entry("free_completed", BIG + 11 * MIB, 11 * MIB),
        entry("segment_unmap", BIG + 20 * MIB, 20 * MIB),
    ]
    end = segment(BIG, "large", (11 * MIB, USED), (9 * MIB, FREE))
    assert replay({"segments": [end], "device_traces": [trace]}, peak_allocated=22 * MIB).differences == ()


@pytest.mark.parametrize(
    ("recording", "says"),
    [
        (changed(2, addr=BIG + 5 * MIB), "entry 2: 5,242,880 bytes lie at 0x7f0000500000, simulated at 0x7f0000400000"),
        (changed(7, size=32 * MIB), "entry 8: for 30,408,704 bytes the driver gave 32.0 MiB, simulated 30.0 MiB"),
        (changed(11, size=20 * MIB), "entry 12: 20.0 MiB went back to the driver, simulated 30.0 MiB"),
        (
            {**RECORDING, "segments": RECORDING["segments"][:1]},
            "at the end, segment 0x7f0008000000: none, simulated 2.00 MiB of the small pool, stream 0, blocks 1,024, 2,096,128 free",
        ),
    ],
)
def test_what_differs_is_said(recording, says):
    assert says in replay(recording).differences


def test_another_peak_is_a_difference():
    assert replay(RECORDING, peak_allocated=PEAK + 512).differences == (f"peak allocated: {PEAK + 512:,} bytes, simulated {PEAK:,}",)


def test_a_recording_that_began_in_the_middle_is_refused():
    late = {**RECORDING, "device_traces": [RECORDING["device_traces"][0][5:]]}
    with pytest.raises(CostError, match=r"frees 0x7f0000000000 \(entry 0\), which it never allocated. Record from the start"):
        replay(late)


@pytest.mark.parametrize(
    "damaged", [changed(1, size="4 MiB"), {"segments": [], "device_traces": []}, {"segments": [], "device_traces": [[{}]]}]
)
def test_another_form_is_refused(damaged):
    with pytest.raises(CostError, match="not of torch's form"):
        replay(damaged)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(RECORDING))
    assert read_snapshot(path) == RECORDING


class Runs:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def test_a_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps({**RECORDING, "more": Runs()}))
    with pytest.raises(CostError, match=r"it asks for posix\.mkdir, and a recording holds plain values alone"):
        read_snapshot(path)
    assert not (tmp_path / "it-ran").exists()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_damaged_file_is_an_error(tmp_path_factory, data):
    whole = pickle.dumps(RECORDING)
    path = tmp_path_factory.getbasetemp() / "damaged.pickle"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))] + data.draw(st.binary(max_size=3)))
    try:
        replay(read_snapshot(path))
    except CostError:
        return
    assert path.read_bytes()[: len(whole)] == whole
