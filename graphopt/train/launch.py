"""Starts the processes of a run on this machine, with torchrun's own launcher."""

import sys
from collections.abc import Sequence
from uuid import uuid4

from graphopt.errors import RunError


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Runs `graphopt ARGUMENTS` in `ranks` processes, and returns the exit status: 0, or that of the first rank that failed.

    The ranks print their own errors. A rank that is killed ends the run; `torchrun --max-restarts` starts all ranks again.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "graphopt", *arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            raise RunError(f"rank {rank} was ended by signal {-failure.exitcode}", fix="Continue with --resume") from None
        return failure.exitcode
    return 0
