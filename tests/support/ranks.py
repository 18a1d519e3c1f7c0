"""Processes of tests, forked from one that has loaded torch, which takes longer than most tests; several ranks on one machine."""

import os
import socket
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
from torch import distributed

from graphopt.cost import rates

#: what processes of tests use: loaded once, in the process that they are forked from
PRELOADED = ["pytest", "tests.distributed.cases", "torch.distributed.checkpoint", "tests.support.warm"]


def loaded() -> ForkServerContext:
    """The context of processes that begin with torch and graphopt imported, and with nothing else of this process."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def serve() -> None:
    """Starts that process now: for tests of code that would start one of its own, in which less is loaded."""
    loaded()
    forkserver.ensure_running()


def run_process(function: Callable[..., None], *arguments: Any, timeout: float | None = 120) -> int:
    """Calls `function` in a process of its own, and gives its exit status: minus the number of the signal that killed it."""
    process = loaded().Process(target=_alone, args=(function, arguments), daemon=False)
    process.start()
    process.join(timeout)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _alone(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(*arguments)


def run_ranks(
    function: Callable[..., None], *arguments: Any, ranks: int = 2, ends: int = 0, group: bool = True, forked: bool = False
) -> None:
    """Calls `function(rank, *arguments)` in `ranks` processes of one gloo group; unless all end with status `ends`, the test fails.

    Without `group` they have to join by themselves, as those that torchrun starts. `forked` takes them from this process, with what it has
    compiled; it must not have computed gradients.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context: Any = get_context("fork") if forked else loaded()
    started = [context.Process(target=_rank, args=(function, rank, ranks, port, group, arguments), daemon=True) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    codes = [process.exitcode for process in started]
    assert codes == [ends] * ranks, codes


def _rank(function: Callable[..., None], rank: int, ranks: int, port: int, group: bool, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    rates.measure_rates = _rates  # it would take most of a test's time
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    if group:
        distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        function(rank, *arguments)
    finally:
        if group:
            distributed.destroy_process_group()


def first_holds(found: Callable[[], bool], times: int = 3) -> bool:
    """Whether `found` is true on rank 0, of so many times that all ranks call it: until it is.

    For figures of memory: a thread of gloo may hold a message a moment longer than it is needed.
    """
    for _ in range(times):
        holds = torch.tensor(found())
        distributed.broadcast(holds, 0)
        if holds:
            return True
    return False


def _rates(device: str = "cpu", *, amp: str | None = None, channels_last: bool = False) -> rates.Rates:
    return rates.Rates(1e-11, 1e-10, 1e-5, 0.0, device)
