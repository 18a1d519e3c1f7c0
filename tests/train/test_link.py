"""What travels over a link, by either transport, and how far a sender runs ahead."""

from __future__ import annotations

import pickle
import threading
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from graphopt import RunError
from graphopt.train.link import DEPTH, SMALL, Inlet, Message, Outlet, Wire, pack, unpack
from graphopt.train.modules import Modular
from graphopt.train.ranks import Ranks
from graphopt.train.strategy import Strategy
from graphopt.train.transport import Transport
from tests.support.ranks import run_ranks

DRAW = torch.Generator().manual_seed(0)  # the same on both ranks
VALUES = {
    "channels last": (torch.randn(64, 8, 5, 5, generator=DRAW).to(memory_format=torch.channels_last), True),
    "transposed": (torch.randn(40, 50, generator=DRAW).t(), True),
    "with gaps": (torch.randn(30, 1, 100, generator=DRAW)[:, :, ::2], False),
    "bfloat16": (torch.randn(4000, generator=DRAW).to(torch.bfloat16), True),
    "part of a larger one": (torch.randn(9, 1500, generator=DRAW)[3], True),
    "scalar": (torch.tensor(True), True),
    "empty": (torch.zeros(0, 3), True),
    "repeated": (torch.ones(1).expand(5000), False),
    "complex": (torch.randn(3, 7, dtype=torch.complex64, generator=DRAW), True),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_tensor_travels_as_its_bytes(name: str) -> None:
    value, dense = VALUES[name]
    layouts, small, large = pack([3, torch.tensor([7]), value])
    taken = iter(large)
    three, seven, found = unpack(pickle.loads(pickle.dumps(layouts)), small.clone(), lambda _: next(taken))
    assert (three, seven.tolist(), found.dtype) == (3, [7], value.dtype)
    assert torch.equal(found, value)
    assert dense is (found.stride() == value.stride())
    assert bool(large) is (value.numel() * value.element_size() > SMALL)


def test_plain_values_travel_as_they_are() -> None:
    layouts, small, large = pack((None, 7, 2.5))
    assert unpack(layouts, small, torch.empty) == [None, 7, 2.5]
    assert not small.numel()
    assert not large


def patience() -> timedelta:
    return timedelta(seconds=20)


def ends(rank: int, apart: bool) -> tuple[Wire, Wire]:
    """The wires of one end of a link between two ranks, with or without a group for tensors."""
    group, tensors = distributed.new_group(), distributed.new_group()
    heads = Wire(group, 1 - rank, patience)
    return heads, Wire(tensors, 1 - rank, patience) if apart else heads


def exchange(rank: int) -> None:
    values = [value for value, _ in VALUES.values()]
    for apart in (False, True):
        wires = ends(rank, apart)
        if not rank:
            outlet = Outlet(*wires)
            for number in range(5):
                outlet.send(Message((number, *values), stop=number, last=number == 4))
            outlet.flush()
            heads, tensors = (wire.bytes for wire in wires)
            # All elements are in the second wire, where there is one.
            total = 5 * sum(v.numel() * v.element_size() for v in values)
            assert tensors > total
            assert not apart or heads < total / 10
        else:
            found = list(Inlet(*wires, torch.device("cpu")).messages())
            assert [(m.values[0], m.stop, m.last) for m in found] == [(n, n, n == 4) for n in range(5)]
            for message in found:
                assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(message.values[1:], values, strict=True))


def run_ahead(rank: int) -> None:
    wires = ends(rank, True)
    if not rank:
        outlet = Outlet(*wires)
        sent = []

        def send() -> None:
            for number in range(10):
                outlet.send(Message((torch.full((SMALL,), float(number)),), last=number == 9))
                sent.append(number)
            outlet.flush()

        thread = threading.Thread(target=send)
        thread.start()
        distributed.barrier()  # the receiver has the first message, and does not go on
        time.sleep(0.2)
        assert len(sent) <= 1 + 2 * DEPTH
        distributed.barrier()
        thread.join(20)
        assert len(sent) == 10
    else:
        messages = Inlet(*wires, torch.device("cpu")).messages()
        next(messages)
        distributed.barrier()
        distributed.barrier()
        assert [m.values[0][0].item() for m in messages] == list(range(1, 10))


@pytest.mark.parametrize("function", [exchange, run_ahead])
def test_messages_arrive_in_order_and_a_sender_waits_for_its_receiver(function: Any) -> None:
    run_ranks(function)


@pytest.mark.parametrize(("identities", "expected"), [("ab", "activations by nccl"), ("aba", "ranks 0 and 2 share one device, which NCCL")])
def test_the_transport_is_chosen_by_the_devices(monkeypatch: pytest.MonkeyPatch, identities: str, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=identities[0]))
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(Ranks, "gather", lambda ranks, own: list(identities))
    found = Transport.of(torch.device("cuda", 0), Ranks(0, len(identities)))
    assert expected in found.describe()
    assert found.device.type == ("cpu" if found.why else "cuda")
    assert Transport.of(torch.device("cpu"), Ranks(0, 2)) == Transport()


def test_only_a_chain_shares_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    ranks = Ranks(1, 2, local=1)
    assert Modular(torch.device("cuda")).device_of(ranks) == torch.device("cuda", 0)
    for local in (0, 1):  # each of them, so that none waits for the other
        with pytest.raises(RunError, match=r"2 processes on this machine, which has 1 CUDA devices.*Start 1"):
            Strategy(torch.device("cuda")).device_of(Ranks(local, 2, local=local))
