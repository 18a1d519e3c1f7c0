"""Changes specs at random, in their text and in their values, and looks for tracebacks, hangs, and memory that a spec takes.

    python tools/fuzz_specs.py [--count 10000] [--checks 300] [--seed 0] [--out tools/tables/fuzz_specs.md]

Every changed spec is read; one that is accepted must be written, read again and be the same, one that is refused must be so on the command
line, in one message without control characters. Of those accepted, as many as `--checks` that still name the small network go through
`graphopt check`. All of it runs in forked processes with limits on CPU time and memory. Case number i of seed s is the same on any machine
(`--only i` runs it alone). A case that fails is reduced line by line and written to tests/fuzz_cases/specs, where a test replays it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import io
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from machine import heading
from spec_changes import case

from graphopt.cli import main as graphopt
from graphopt.errors import GraphoptError
from graphopt.spec import dumps, from_table, loads
from graphopt.spec.model import Spec

CASES = Path(__file__).parents[1] / "tests" / "fuzz_cases" / "specs"
#: first line of a stored case that failed in `graphopt check`, not while it was read
CHECKED = "# check\n"
READ_SECONDS, CHECK_SECONDS, MEMORY = 5, 60, 12 * 2**30


class Hang(BaseException):
    """A case took more CPU time than its limit."""


# -- running a case --------------------------------------------------------------------------------------------------------
def read(text: str) -> tuple[str, Spec | None]:
    """Reads a spec, and writes and reads it again; what came of it, in words: one of a refusal, "accepted" or a fault."""
    try:
        spec = loads(text, file="s.toml")
    except GraphoptError as error:
        if error.exit_code != 2 or "pydantic" in str(error):
            return f"fault: {type(error).__name__}: {error}"[:200], None
        return "not TOML" if "not TOML" in str(error) else "refused", None
    except Hang:
        return "hang", None
    except Exception as error:
        return f"fault: {_summary(error)}", None
    try:
        written = dumps(spec)
        if loads(written) != spec or from_table(spec.resolved()) != spec or loads(written).digest != spec.digest:
            return "fault: written and read again it is another spec", None
        hash(spec)
    except Hang:
        return "hang", None
    except Exception as error:
        return f"fault: written and read again: {_summary(error)}", None
    return "accepted", spec


def check(text: str) -> str:
    """What `graphopt check` says about a spec: "ok", "refused" or a fault."""
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with tempfile.TemporaryDirectory() as folder, streams[0], streams[1], contextlib.chdir(folder):
        Path("s.toml").write_text(text, encoding="utf-8")
        try:
            status = graphopt(["check", "s.toml"])
        except Hang:
            return "hang"
        except BaseException as error:
            return f"fault: {_summary(error)}"
        left = sorted(set(os.listdir()) - {"s.toml"})
    printed = out.getvalue() + err.getvalue()
    if status not in (0, 2) or "Traceback" in printed:
        return f"fault: exit {status}: {err.getvalue()}"[:300]
    if any(ord(c) < 32 and c not in "\n\t" for c in printed):
        return "fault: control characters on the terminal"
    return f"fault: left {left}" if left else "refused" if status else "ok"


def _summary(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:120]!r} ({Path(frame.filename).name}:{frame.lineno})"


def outcome(text: str, checked: bool) -> str:
    """What comes of a case that is read, or checked."""
    seconds = CHECK_SECONDS if checked else READ_SECONDS

    def stop(*_: object) -> None:
        raise Hang

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        if checked:
            return check(text)
        found = read(text)[0]
        # What is refused goes through the command line too: one message, and nothing in it that a terminal would obey.
        printed = check(text) if found in ("refused", "not TOML") else "refused"
        return found if printed == "refused" else printed
    except Hang:
        return "hang"
    except MemoryError:
        return "fault: memory"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def _child(reader: int, writer: int, texts: list[str], start: int, checked: bool) -> None:
    """Runs cases in a forked process, and ends it."""
    os.close(reader)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, -1))
    for number in range(start, len(texts)):
        before = time.process_time()
        found = outcome(texts[number], checked)
        os.write(writer, json.dumps([number, found, time.process_time() - before]).encode() + b"\n")
        if found.startswith("fault") or found == "hang" or number % (10 if checked else 500) == 9:
            break  # a fresh process for what comes next
    os._exit(0)


def run(texts: list[str], checked: bool) -> Iterator[tuple[int, str, float]]:
    """Outcomes of cases, with their CPU seconds, from forked processes: a fault of one does not reach the next."""
    start = 0
    while start < len(texts):
        reader, writer = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if not child:
            try:
                _child(reader, writer, texts, start, checked)
            finally:
                os._exit(1)  # only after a fault outside a case: whoever forked must not go on twice
        os.close(writer)
        with os.fdopen(reader, "rb") as results:
            while True:
                ready, _, _ = select.select([results], [], [], 20 * (CHECK_SECONDS if checked else READ_SECONDS))
                line = results.readline() if ready else b""
                if not line:
                    break
                number, found, seconds = json.loads(line)
                start = number + 1
                yield number, found, seconds
        with contextlib.suppress(ProcessLookupError):
            if not ready:
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status and start < len(texts):
            yield start, "hang" if not ready else f"fault: the process ended with status {status}", 0.0
            start += 1


def reduced(text: str, checked: bool) -> str:
    """The case with as few lines as still fail in the same way."""

    def fails(candidate: str) -> bool:
        found = next(run([candidate], checked))[1]
        return found.startswith("fault") or found == "hang"

    lines = text.splitlines(keepends=True)
    size = max(1, len(lines) // 2)
    while size:
        at = 0
        while at < len(lines):
            shorter = lines[:at] + lines[at + size :]
            if fails("".join(shorter)):
                lines = shorter
            else:
                at += size
        size //= 2
    return "".join(lines)


def store(text: str, checked: bool) -> Path:
    """Writes a case to where a test replays it."""
    CASES.mkdir(parents=True, exist_ok=True)
    path = CASES / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.toml"
    path.write_text((CHECKED if checked else "") + text, encoding="utf-8")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--checks", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case: print it, and what comes of it")
    parser.add_argument("--out", type=Path, help="also write the table here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()
    numbers = [options.only] if options.only is not None else range(options.count)
    print(f"seed {options.seed}, cases {numbers[0]} to {numbers[-1]}", flush=True)
    texts = [case(options.seed, number) for number in numbers]
    if options.only is not None:
        print(texts[0])
    failed, rows = 0, []
    accepted: list[int] = []
    stored: set[str] = set()
    for checked in (False, True):
        small = [index for index in accepted if '"resnet8"' in texts[index]]
        chosen = small[: options.checks] if checked else list(range(len(texts)))
        counts, slowest = Counter[str](), 0.0
        for position, found, seconds in run([texts[i] for i in chosen], checked):
            index = chosen[position]
            counts[found.partition(":")[0]] += 1
            slowest = max(slowest, seconds)
            if checked and position % 50 == 49:
                print(f"{position + 1} checked", flush=True)
            if found == "accepted":
                accepted.append(index)
            if found.startswith("fault") or found == "hang":
                failed += 1
                print(f"case {numbers[index]} of seed {options.seed}: {found}", flush=True)
                if found not in stored:  # one case of a kind is enough
                    stored.add(found)
                    print(f"  reduced: {store(reduced(texts[index], checked), checked)}", flush=True)
        rows.append((("graphopt check" if checked else "read, written, read"), sum(counts.values()), counts, slowest))
        print(rows[-1], flush=True)
    columns = ("step", "specs", "accepted", "refused with a message", "not TOML", "tracebacks", "hangs", "slowest, CPU s")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for step, total, counts, slowest in rows:
        numbers_found = (counts["accepted"] + counts["ok"], counts["refused"], counts["not TOML"], counts["fault"], counts["hang"])
        lines.append(f"| {step} | {total:,} | " + " | ".join(f"{count:,}" for count in numbers_found) + f" | {slowest:.1f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        limits = f"{READ_SECONDS} s of CPU time to read, {CHECK_SECONDS} s to check, {MEMORY >> 30} GiB"
        about = f"Seed {options.seed}. Limits of a case: {limits}."
        options.out.write_text(f"{heading('Changed specs', __doc__)}\n{about}\n\n{table}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
