"""What is wrong with a run reaches the user once, with its rank, and leaves nothing half-written."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

import graphopt
from graphopt import GraphoptError, Plan, RunError
from graphopt.cli import main
from graphopt.data.loader import Data
from graphopt.passes.freeze import Freeze
from graphopt.train import preflight, train
from graphopt.train import ranks as rank_errors
from graphopt.train.meeting import meet, place, reports_first
from graphopt.train.ranks import Ranks
from tests.distributed import cases
from tests.support.ranks import run_ranks
from tests.train import small

#: settings (of one rank, where they differ) that are refused, and the message
REFUSED: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "batch": (lambda _: {"batch": 13}, "a batch of 13 does not divide into 2 processes with 1 micro-batches each. Use 12 or 14"),
    "accumulate": (lambda _: {"accumulate": 5}, "a batch of 12 does not divide into 2 processes with 5 micro-batches each. Use 10 or 20"),
    "single": (lambda _: {"strategy": "single"}, 'strategy = "single" is one process, 2 were started'),
    "device": (lambda _: {"device": "cuda:99"}, "torch finds no device cuda:99"),
    "settings": (lambda rank: {"seed": rank}, "its settings: rank 1 differs from rank 0"),
    "optimizer": (lambda _: {"optimizer": {"name": "sgdd"}}, "sgdd"),
}


class _FunctionNorm(nn.BatchNorm2d):
    """A norm with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class _CallsNorm(nn.Module):
    """A norm without a module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, None, None, self.weight, self.bias, True)


def _other_code(rank: int, folder: Path) -> Plan:
    """A network with the same weights on both ranks, and another forward."""
    source = folder / f"code-{rank}" / "a_network.py"
    source.parent.mkdir()
    head = "from tests.support.backbones import Small\nclass Net(Small):\n    def forward(self, x):\n        return super().forward(x)"
    source.write_text(f"{head} * {rank + 1}\n")
    sys.path.insert(0, str(source.parent))
    torch.manual_seed(0)
    net = importlib.import_module("a_network").Net(norm=cases.GROUPS).double()
    return graphopt.compile(net, [], input=small.SHAPE, verify="off", costs=False)


#: networks (of one rank, where they differ) that are refused, settings, and the message
PLANS: dict[str, tuple[Callable[[int, Path], Plan], dict[str, Any], str]] = {
    "spec": (lambda rank, _: cases.plan((Freeze(select=f"blocks.{rank}"),)), {}, "the spec: rank 1 differs from rank 0"),
    "code": (_other_code, {}, "the code of a_network: rank 1 differs from rank 0"),
    "weights": (lambda rank, _: cases.plan(seed=rank), {}, "the initial weights: rank 1 differs from rank 0"),
    "own norm": (lambda *_: cases.plan(norm=_FunctionNorm), {"sync_norm": True}, "is a _FunctionNorm, which cannot be synchronized"),
    "called norm": (
        lambda *_: cases.plan(norm=_CallsNorm),
        {"sync_norm": True},
        "calls batch_norm as a function, which cannot be synchronized",
    ),
}


def _refused(rank: int, folder: Path) -> None:
    for name, (settings, _) in REFUSED.items():
        _refuse(rank, folder, name, cases.plan(), settings(rank))
    for name, (make, settings, _) in PLANS.items():
        _refuse(rank, folder, name, make(rank, folder), settings)
    with mock.patch.object(preflight, "version", lambda name: f"1.{rank}" if name == "timm" else "1"):
        _refuse(rank, folder, "version", cases.plan(), {})
    _refuse(rank, folder, "data", cases.plan(), {}, training=24 + 12 * rank)


def _refuse(rank: int, folder: Path, name: str, plan: Plan, changes: dict[str, Any], training: int = 24) -> None:
    with pytest.raises(GraphoptError) as refused:
        train(plan, folder / name, settings=small.settings(**{"batch": 12, **changes}), data=cases.data(training))
    _tell(folder, name, rank, refused.value)


def _tell(folder: Path, name: str, rank: int, error: GraphoptError) -> None:
    (folder / f"{name}-{rank}.json").write_text(json.dumps([error.silent, error.exit_code, str(error)]))


def _told(folder: Path, name: str, ranks: Sequence[int] = (0, 1)) -> tuple[str, list[int]]:
    """The one message, and the exit codes of all ranks."""
    told = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in ranks]
    (message,) = [text for silent, _, text in told if not silent]
    return message, [code for _, code, _ in told]


def test_what_is_refused_is_said_once(tmp_path: Path) -> None:
    run_ranks(_refused, tmp_path)
    expected = {name: message for name, (*_, message) in (REFUSED | PLANS).items()} | {
        "version": "timm's version: rank 1 differs from rank 0",
        "data": "the data: rank 1 differs from rank 0",
    }
    for name, part in expected.items():
        message, codes = _told(tmp_path, name)
        assert part in message
        assert message.startswith("rank "), message
        assert codes == [2, 2]
        assert not (tmp_path / name).exists()


ENVIRONMENTS = {
    "no rank": ({"WORLD_SIZE": "2"}, "RANK is not set and WORLD_SIZE is '2', which name no process of several"),
    "too high": ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2' and WORLD_SIZE is '2'"),
    "a word": ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two'"),
    "none": ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE is '0'"),
    "alone": ({"RANK": "3"}, ""),
    "one": ({"WORLD_SIZE": "1"}, ""),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_environment_that_names_no_process_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    given, message = ENVIRONMENTS[name]
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    if not message:
        assert place() == (0, 1)
        return
    with pytest.raises(RunError, match=message):
        Ranks.join(1)


def test_an_error_before_the_ranks_meet_is_said_by_the_first_that_has_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    said = []
    for restarts, rank in ((0, 1), (0, 0), (1, 0), (2, 1)):
        for variable, value in {**about, "RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": str(restarts)}.items():
            monkeypatch.setenv(variable, value)
        if restarts == 2:  # without torchrun, rank 0 has the store, if it has come so far
            monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
        assert main(["train", "no_such_spec"]) == 2
        said.append("no_such_spec" in capsys.readouterr().err)
    assert said == [True, False, True, True]
    monkeypatch.setenv("MASTER_PORT", "")
    assert not reports_first(), "rank 0 has the same error, or none of them can be told apart"
    monkeypatch.setenv("RANK", "0")
    assert reports_first()


def test_a_process_that_is_no_store_ends_the_search_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        for number, message in ((1, "rank 1 of 2 does not reach the others: what listens at"), (0, "rank 0 of 2 .*in use")):
            with pytest.raises(RunError, match=message):
                meet("part", number, 2, 0.2)


def test_an_error_of_other_code_is_said_with_its_rank(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    store = distributed.HashStore()

    def failing(*_: Any, **__: Any) -> Any:
        raise Ranks(1, 2, _store=store).reported(ValueError("no such layer"))

    monkeypatch.setattr("graphopt.train.train", failing)
    said = []
    for _ in range(2):
        assert main(["train", "quickstart", "--out", "unused"]) == 1
        said.append(capsys.readouterr().err.partition(". ")[0])
    assert said == ["error: rank 1: ValueError: no such layer", ""]


class _Failing:
    """A transform that does something else than its own work from the `after`-th image on."""

    def __init__(self, transform: Any, after: int, instead: Callable[[], Any]) -> None:
        self.transform, self.left, self.instead = transform, after, instead

    def __call__(self, image: Any) -> Any:
        self.left -= 1
        return self.transform(image) if self.left > 0 else self.instead()


class _Unreadable:
    """Images that cannot be opened."""

    def __getitem__(self, number: int) -> Any:
        raise OSError("truncated file")


def _unreadable(data: Data, _: Path) -> None:
    data.train.images = _Unreadable()


def _not_a_number(data: Data, _: Path) -> None:
    data.train.transform = _Failing(data.train.transform, 20, lambda: torch.full(small.SHAPE, float("nan"), dtype=torch.float64))


def _hanging(data: Data, folder: Path) -> None:
    data.train.transform = _Failing(data.train.transform, 20, lambda: _hang(folder / "hang-0.json"))


def _hang(told: Path) -> None:
    """Does nothing until the other rank has said so."""
    deadline = time.monotonic() + 60
    while not told.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os._exit(3)


def _full_disk(*_: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


#: what goes wrong on one rank only: which, how, the message
FAILURES: dict[str, tuple[int, Callable[[Data, Path], None], str]] = {
    "unreadable": (1, _unreadable, "rank 1: image"),
    "nan": (1, _not_a_number, "the loss became nan at step"),
    "disk": (0, _full_disk, "rank 0: .*last.pt"),
    "hang": (1, _hanging, r"rank 0: rank 1 of 2 does not answer; the others have waited for 1 s"),
}


def _failing(rank: int, folder: Path, name: str) -> None:
    which, spoil, _ = FAILURES[name]
    data, rank_errors.NOTICE = cases.data(training=48), 1.0
    if rank == which:
        spoil(data, folder)
    settings = small.settings(batch=12, timeout=1, log_every=1)
    try:
        train(cases.plan(), folder / name, settings=settings, data=data)
    except GraphoptError as error:
        _tell(folder, name, rank, error)
    os._exit(3)  # as a rank ends: without a word to the others


@pytest.mark.parametrize("name", FAILURES)
def test_a_rank_that_fails_ends_all_with_its_message(tmp_path: Path, name: str) -> None:
    run_ranks(_failing, tmp_path, name, ends=3, group=False)
    message, codes = _told(tmp_path, name, ranks=[0] if name == "hang" else [0, 1])
    assert re.search(FAILURES[name][2], message)
    assert 0 not in codes
    left = {path.name for path in (tmp_path / name).glob("*")} if (tmp_path / name).exists() else set()
    assert left <= {"run.json", "spec.toml", "metrics.jsonl", "ledger.bin"}, left


def _lonely(rank: int, folder: Path) -> None:
    os.environ["WORLD_SIZE"] = "3"
    with pytest.raises(GraphoptError) as refused:
        train(cases.plan(), folder / "late", settings=small.settings(batch=12, timeout=1), data=cases.data())
    _tell(folder, "late", rank, refused.value)
    time.sleep(1)  # rank 0 has the store


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    run_ranks(_lonely, tmp_path, group=False)
    message, codes = _told(tmp_path, "late")
    assert "rank 2 of 3 did not join within 1 s" in message
    assert codes == [2, 2]
    assert not (tmp_path / "late").exists()


def _join(rank: int, port: int, attempt: int) -> None:
    """Meets the other ranks at a store that outlives all, and dies without a farewell. Not all agents have counted the failure."""
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt * rank)}
    os.environ.update({**agent, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    ranks = Ranks.join(20).connected(torch.device("cpu"))
    known = ranks.gather((rank, ranks.again))
    os._exit(9 if known == [(number, not number and attempt > 0) for number in range(ranks.count)] else 1)


def test_ranks_that_are_started_again_do_not_meet_those_before_them() -> None:
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt, ranks in enumerate((3, 2, 1)):
        run_ranks(_join, store.port, attempt, ranks=ranks, ends=9, group=False)
