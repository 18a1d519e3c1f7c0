"""Several ranks on this machine's loopback, forked from one process that has loaded torch: that takes longer than most tests."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
from torch import distributed


def run_ranks(function: Callable[..., None], *arguments: Any, ranks: int = 2) -> None:
    """Calls `function(rank, *arguments)` in `ranks` processes of one gloo group; a rank that fails fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("forkserver")
    context.set_forkserver_preload(["graphopt.driver", "graphopt.passes.share", "graphopt.passes.supervise", "timm", "torchvision"])
    started = [context.Process(target=_rank, args=(function, rank, ranks, port, arguments), daemon=True) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * ranks


def _rank(function: Callable[..., None], rank: int, ranks: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        function(rank, *arguments)
    finally:
        distributed.destroy_process_group()
