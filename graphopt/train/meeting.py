"""How the processes of a run find each other, and tell those of this attempt from those that were there before.

torchrun's agents start processes again after a failure, and when machines come or go; its store outlives all of them. How often a process
was started is no help: after a failure that only one agent has seen, agents count differently.
"""

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

from torch import distributed

from graphopt.errors import GraphoptError, RunError, first_line, listed, silenced
from graphopt.hashing import hash_parts

_distributed: Any = distributed  # torch does not declare all of its names
#: seconds between two looks at the store
_PAUSE = 0.02


def elastic() -> bool:
    """Whether torchrun has started this process, and keeps the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def place() -> tuple[int, int]:
    """This process's number, and how many there are, as the environment says; (0, 1) where it names no others.

    Raises RunError for variables that do not fit together.
    """
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if given["WORLD_SIZE"] in ("", "1"):
        return 0, 1
    number, count = (int(value) if value.isdecimal() else -1 for value in given.values())
    if not 0 <= number < count:
        found = " and ".join(f"{name} is {value!r}" if value else f"{name} is not set" for name, value in given.items())
        fix = "Start processes with torchrun or --ranks, which set both; or unset them"
        raise RunError(f"{found}, which name no process of several", where="the environment", fix=fix)
    return number, count


def reports_first() -> bool:
    """Whether this process is the one to report an error that it has found before it meets the others, who may find it too."""
    first = os.environ.get("RANK", "0") == "0"
    if elastic() or not first:
        with suppress(RunError):  # a rank 0 that has the error, too, offers no store
            store = _reached(timedelta(seconds=10), offered=False)
            return bool(store.add(f"graphopt/reported/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1)
    return first


def meet(part: str, number: int, count: int, timeout: float) -> tuple[Any, bool]:
    """The store of the processes that the environment names, when all of this attempt have come; and whether there was an attempt before.

    `part` is of the store. Raises RunError where ranks are missing after `timeout` seconds.
    """
    try:
        store = _reached(timedelta(seconds=timeout), offered=number == 0 and not elastic())
    except RunError as error:
        what = f"rank {number} of {count} does not reach the others: {error.what}"
        raise RunError(what, fix="Check that rank 0 runs, and MASTER_ADDR and MASTER_PORT; or raise train.timeout") from error
    store = _distributed.PrefixStore(part, store)
    attempt = _attempt(store, number, count, timeout)
    again = number == 0 and store.add("attempts", 1) > 1
    return _distributed.PrefixStore(attempt, store), again


def _reached(wait: timedelta, *, offered: bool) -> Any:
    """The store that the environment names; `offered` by this process, or by another one. Raises RunError where there is none."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise RunError(f"{' and '.join(missing)} is not set")
    found: list[Any] = []

    def connect() -> None:
        try:
            where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            # torch's own would wait for all processes, and not say which are missing.
            found.append(_distributed.TCPStore(*where, is_master=offered, wait_for_workers=False, timeout=wait))
        except (RuntimeError, ValueError) as error:
            found.append(error)

    # torch waits for ever for the answer of a process that is no store.
    thread = threading.Thread(target=connect, name="store", daemon=True)
    thread.start()
    thread.join(wait.total_seconds() + 1)
    if not found:
        raise RunError(f"what listens at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} does not answer")
    if isinstance(found[0], Exception):
        raise RunError(first_line(found[0])[:200]) from found[0]
    return found[0]


def _attempt(store: Any, number: int, count: int, timeout: float) -> str:
    """A name that the processes of this attempt have in common, and no other attempt has.

    Each leaves a token that it has just drawn, then the hash of all tokens that it sees. Only processes that have seen this one's token
    leave the hash that this one does.
    """
    token, end = uuid4().hex.encode(), time.monotonic() + timeout
    tokens, hashes = ([f"{kind}/{rank}" for rank in range(count)] for kind in ("token", "hash"))
    store.set(tokens[number], token)
    while time.monotonic() < end:
        seen = _values(store, tokens)
        if seen and seen[number] == token:
            found = hash_parts(*seen)
            store.set(hashes[number], found)
            if _values(store, hashes) == [found.encode()] * count:
                return found
        time.sleep(_PAUSE)
    raise _not_met(store, number, count, timeout)


def _values(store: Any, keys: Sequence[str]) -> list[bytes]:
    """The values of all keys, or none where one is missing."""
    return list(store.multi_get(keys)) if store.check(keys) else []


def _not_met(store: Any, number: int, count: int, timeout: float) -> GraphoptError:
    store.set(f"waits/{number}", "1")
    time.sleep(0.5)  # the others look, too, and where rank 0 has the store, its end ends that
    missing = [str(rank) for rank in range(count) if not store.check([f"token/{rank}"])]
    missing = missing or [str(rank) for rank in range(count) if not store.check([f"waits/{rank}"])]  # tokens may be of an earlier attempt
    what = f"rank {listed(missing)} of {count} did not join within {timeout:.0f} s"
    error = RunError(what, where=f"rank {number}", fix="Look for its own error, or raise train.timeout")
    return silenced(error) if store.add("reported", 1) > 1 else error
