"""Several ranks on this machine's loopback, forked from one process that has loaded torch: that takes longer than most tests."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
from torch import distributed

from graphopt.cost import rates


def run_ranks(function: Callable[..., None], *arguments: Any, ranks: int = 2, ends: int = 0, group: bool = True) -> None:
    """Calls `function(rank, *arguments)` in `ranks` processes of one gloo group; unless all end with status `ends`, the test fails.

    Without `group` they have to join by themselves, as those that torchrun starts.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.cases", "pytest", "graphopt.train"])
    started = [context.Process(target=_rank, args=(function, rank, ranks, port, group, arguments), daemon=True) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in started] == [ends] * ranks


def _rank(function: Callable[..., None], rank: int, ranks: int, port: int, group: bool, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    rates.measure_rates = lambda device, amp=None: rates.Rates(1e-11, 1e-10, 1e-5, 0.0, device)  # it would take most of a test's time
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    if group:
        distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        function(rank, *arguments)
    finally:
        if group:
            distributed.destroy_process_group()
