"""Starts the processes of a run on this machine, with torchrun's own launcher."""

import ctypes
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any
from uuid import uuid4

from graphopt.errors import GraphoptError, RunError, silenced

#: seconds that ranks have after a stop signal to finish their step and write a checkpoint
STOP_TIMEOUT = 300
#: statuses of ranks that have said why they end, or that were terminated
_SAID = (1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGTERM)
_CONTINUE = "The run continues from the last checkpoint with --resume"


def launch(ranks: int, arguments: Sequence[str]) -> None:
    """Runs `graphopt ARGUMENTS` in `ranks` processes. Raises a silent RunError with the exit status of the first that failed.

    The ranks print their own errors. Ctrl-C and SIGTERM reach all of them: they stop after a step, with a checkpoint, and the status is
    130 or 143; a second signal ends them at once. A rank that is killed ends the run (RunError names it); `torchrun --max-restarts` would
    start all ranks again.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the ranks say what has happened
    known = {field.name for field in fields(LaunchConfig)}
    newer: dict[str, Any] = {name: value for name, value in {"shutdown_timeout": STOP_TIMEOUT}.items() if name in known}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        **newer,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "graphopt", *arguments)
    except SignalException as stopped:
        status = 128 + int(stopped.sigval)
        if not any(isinstance(earlier, SignalException) for earlier in _contexts(stopped)):
            raise _ended(status) from None
        error = RunError("interrupted", fix=_CONTINUE)  # a second time, before the ranks have come to their stop
        error.exit_code = status
        raise error from None
    except ChildFailedError as failed:
        # The launcher itself terminates the others.
        killed = {rank: -f.exitcode for rank, f in failed.failures.items() if f.exitcode < 0 and -f.exitcode != signal.SIGTERM}
        if killed:
            which = " and ".join(f"rank {rank} was ended by signal {number}" for rank, number in killed.items())
            raise RunError(which, fix=_CONTINUE) from None
        rank, first = failed.get_first_failure()
        if first.exitcode not in _SAID:
            raise RunError(f"rank {rank} ended by itself, with status {first.exitcode}", fix=_CONTINUE) from None
        raise _ended(first.exitcode) from None


def _contexts(error: BaseException) -> Iterator[BaseException]:
    """The exceptions that were being handled when an exception was raised, the last one first."""
    while error.__context__ is not None:
        error = error.__context__
        yield error


def end_with_launcher() -> None:
    """From now on this process gets SIGTERM when the one that started it ends, so that no rank outlives a launcher that is killed.

    On Linux only (`man 2 prctl`): elsewhere, a rank then trains to its end.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_ENDS, signal.SIGTERM)


#: PR_SET_PDEATHSIG
_PARENT_ENDS = 1


def _ended(exit_code: int) -> GraphoptError:
    """The ranks have said why; this process only ends with their status."""
    return silenced(RunError(f"the ranks ended with status {exit_code}"), exit_code)
