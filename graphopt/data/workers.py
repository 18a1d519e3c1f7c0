"""The processes of a loader: they outlive neither the run nor the signal that stops it."""

import signal
import weakref
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader

#: sent to the whole process group by terminals and schedulers; the training process stops on them, and ends its loader processes itself
_STOP = (signal.SIGINT, signal.SIGTERM)


def ignore_stop(_: int) -> None:
    """What a loader process begins with: it goes on through the signals that stop the run."""
    for number in _STOP:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)


def begin(loader: DataLoader[Any]) -> Any:
    """An iterator over a loader. Its processes are born with stop signals blocked, so that none dies before it ignores them."""
    if not loader.num_workers or not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    try:
        iterator: Any = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if iterator not in _iterators:
        _iterators.add(iterator)
        for worker in iterator._workers:
            worker._popen.terminate = worker._popen.kill  # torch and the interpreter terminate what hangs, and wait for it
        # What nobody has ended by then ends before the interpreter's own exit, which would wait for it.
        Finalize(None, lambda known: end(known()), (weakref.ref(iterator),), exitpriority=1)
    return iterator


_iterators: weakref.WeakSet[Any] = weakref.WeakSet()


def end(iterator: Any) -> None:
    """Ends the processes of an iterator; left to the interpreter's exit, they end with a traceback. One that hangs is killed."""
    workers = getattr(iterator, "_workers", ())
    if workers:
        iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()
