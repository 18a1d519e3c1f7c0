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
import math
import os
import random
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tomli
import torch

sys.path.insert(0, str(Path(__file__).parent))
from machine import heading

from graphopt.cli import main as graphopt
from graphopt.compiler.registry import passes
from graphopt.errors import GraphoptError
from graphopt.spec import dumps, from_table, installed, loads
from graphopt.spec.model import Spec
from graphopt.spec.writing import dumps_table

CASES = Path(__file__).parents[1] / "tests" / "fuzz_cases" / "specs"
#: first line of a stored case that failed in `graphopt check`, not while it was read
CHECKED = "# check\n"
READ_SECONDS, CHECK_SECONDS, MEMORY = 5, 60, 12 * 2**30

BACKBONE = '[backbone]\nsource = "cifar"\nname = "resnet8"\narguments = { in_chans = 1 }\ninput = [1, 8, 8]\n'
REST = """
[data]
train_limit = 40
eval_limit = 20
mean = [0.3]
std = [0.4]
[data.augment]
crop = "pad"
scale = [0.5, 1.0]
auto_augment = "rand-m9-n2"
[train]
epochs = 4
batch = 20
seed = 1
clip = 1.0
[train.optimizer]
name = "adamw"
lr = 0.01
arguments = { betas = [0.9, 0.95] }
[train.scheduler]
name = "step"
decay_epochs = 2.0
warmup_epochs = 1
"""
PASSES = (
    'use = "freeze"\nselect = ["conv1", "bn1"]\nwhen = { epoch = 1, until = 3 }',
    'use = "freeze"\nselect = { path = "layer*.0", exclude = "layer3.0" }\nwhen = { schedule = "freezeout", t0 = 0.5 }',
    'use = "freeze"\nselect = { blocks = true, first = 2 }\nwhen = { score = ["change", "slope"], below = [0.1, 0.2], most = 0.5, by = 2 }',
    'use = "share"\nselect = "layer2.0"\nparts = "all"\ninit = [0.5, 0.5]',
    'use = "share"\nevery = 1\nboundary = "nearest"\nmode = "surrogate"',
    'use = "drop"\nupto = "layer1"\ncache = "disk"\nlimit = "8 MiB"\nwhen = { epoch = 2 }',
    'use = "drop"\nmode = "bypass"\nselect = { blocks = true }\nprobability = 0.5\nwhen = { schedule = "progressive", keep = 0.5 }',
    'use = "supervise"\nmodules = 2\nbalance = "memory"\nweights = { reconstruct = [1.0, 0.5], classify = [0.5, 1.0] }',
    'use = "supervise"\ncuts = ["layer1"]\ndecoder = "image"\nfraction = 0.5\nhead = "contrast"\ntemperature = 0.1',
    'use = "checkpoint"\nsegments = 2',
    'use = "checkpoint"\nselect = ["layer1", "layer2"]\nwhen = [{ epoch = 1, upto = "layer1" }, { epoch = 2, upto = "layer2" }]',
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 100, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(2**70)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e-9, 1e30, 1e308, math.inf, -math.inf, math.nan),
)
TEXTS = (
    *("", "x", "*", "**", "re:", "re:(", "re:.*", "re:(.+)+!", "layer1", "layer1.0", "layer9", "fc", "conv1", "start", "inf", "nan"),
    *("é", "\0", "\x1b]0;x\x07\x1b[31m", "\u202eabc", "a" * 5000, "../x", "/", "/dev/zero", "~", "~nobody/x", "[red]x[/red]", "%s{0}"),
    *("cifar", "timm", "python", "resnet20", "resnet6000002", "os:system", "x.py:Y", "hf-hub:a/b", "8 GiB", "-1", "1e999", "a.b.c"),
    *("adamw", "lars", "rand-m9-n1000000", "folder", "freeze"),
)
KEYS = {"use", "input", "name", "arguments", "upto", "epoch", "path", "type"}
WORDS = tuple(sorted(KEYS | {key for cls in passes().values() for key in cls.model_fields}))


class Hang(BaseException):
    """A case took more CPU time than its limit."""


def bases() -> list[str]:
    """The specs that are changed: small ones with each pass, pairs of passes, and the installed ones."""
    single = [f"{BACKBONE}[[pass]]\n{text}\n{REST}" for text in PASSES]
    pairs = [f"{BACKBONE}[[pass]]\n{a}\n[[pass]]\n{b}\n{REST}" for a, b in zip(PASSES, PASSES[3:] + PASSES[:3], strict=True)]
    return [BACKBONE, *single, *single, *pairs, *(path.read_text() for path in installed().values())]


BASES = bases()


def case(seed: int, number: int) -> str:
    """The text of a case."""
    draw = random.Random(f"{seed}/{number}")
    text = draw.choice(BASES)
    if draw.random() < 0.5:
        for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
            text = draw.choice(TEXT_CHANGES)(draw, text)
        return text
    table = tomli.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 5))):
        change_value(draw, table)
    try:
        return dumps_table(table)
    except (TypeError, AttributeError):  # what no table of TOML can hold at its top
        return text


# -- changes of the text ---------------------------------------------------------------------------------------------------
def _lines(change: Callable[[random.Random, list[str]], None]) -> Callable[[random.Random, str], str]:
    def changed(draw: random.Random, text: str) -> str:
        lines = text.splitlines(keepends=True) or ["\n"]
        change(draw, lines)
        return "".join(lines)

    return changed


def _swap(draw: random.Random, lines: list[str]) -> None:
    a, b = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]


def _flip(draw: random.Random, text: str) -> str:
    at = draw.randrange(max(1, len(text)))
    return text[:at] + draw.choice("[]{}=,.\"'#\\\n\t \0\x1béx0-+_") + text[at + draw.choice((0, 1)) :]


def _literal(draw: random.Random) -> str:
    more = ("true", "1979-05-27", "07:32:00", "1_000", "0x1F", "1" + 5000 * "0", "[]", "{}", "[[1]]", "{ a = { b = 1 } }")
    return draw.choice((*more, 60 * "[" + 60 * "]", "'''\n'''", repr(draw.choice(NUMBERS)), json.dumps(draw.choice(TEXTS))))


def _replace_value(draw: random.Random, text: str) -> str:
    found = list(re.finditer(r'"[^"\n]*"|[-+]?\d[\d._]*|true|false', text))
    if not found:
        return text
    at = draw.choice(found)
    return text[: at.start()] + _literal(draw) + text[at.end() :]


TEXT_CHANGES: tuple[Callable[[random.Random, str], str], ...] = (
    _lines(lambda draw, lines: lines.pop(draw.randrange(len(lines)))),
    _lines(lambda draw, lines: lines.insert(draw.randrange(len(lines)), draw.choice(lines))),
    _lines(_swap),
    _lines(lambda draw, lines: lines.insert(draw.randrange(len(lines)), f"{draw.choice(WORDS)} = {_literal(draw)}\n")),
    _flip,
    _replace_value,
    _replace_value,
    _replace_value,
    lambda draw, text: text[: draw.randrange(len(text) + 1)],
    lambda draw, text: text.replace(draw.choice(WORDS), draw.choice(WORDS)),
)


# -- changes of the values -------------------------------------------------------------------------------------------------
def change_value(draw: random.Random, table: dict[str, Any]) -> None:
    """Replaces, removes, adds or copies one value anywhere in a table."""
    places = list(_places(table))
    if not places:
        return
    holder, key = draw.choice(places)
    kind = draw.random()
    if kind < 0.6:
        holder[key] = value(draw)
    elif kind < 0.7:
        del holder[key]
    elif kind < 0.85:
        target = holder[key] if isinstance(holder[key], dict) else holder
        if isinstance(target, dict):
            target[draw.choice(WORDS)] = value(draw)
        else:
            target.append(value(draw))
    else:
        other, name = draw.choice(places)
        holder[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else other[name], default=str))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def value(draw: random.Random, depth: int = 0) -> Any:
    """A value of TOML, often one that is out of reason."""
    kind = draw.randrange(10 if depth < 2 else 7)
    if kind < 3:
        return draw.choice(NUMBERS)
    if kind < 6:
        return draw.choice(TEXTS)
    if kind == 6:
        return draw.random() < 0.5
    if kind < 9:
        return [value(draw, depth + 1) for _ in range(draw.choice((0, 1, 1, 2, 3)))]
    return {draw.choice(WORDS): value(draw, depth + 1) for _ in range(draw.choice((0, 1, 2)))}


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
        found = (counts["accepted"] + counts["ok"], counts["refused"], counts["not TOML"], counts["fault"], counts["hang"])
        lines.append(f"| {step} | {total:,} | " + " | ".join(f"{count:,}" for count in found) + f" | {slowest:.1f} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        limits = f"{READ_SECONDS} s of CPU time to read, {CHECK_SECONDS} s to check, {MEMORY >> 30} GiB"
        about = f"Seed {options.seed}. Limits of a case: {limits}."
        options.out.write_text(f"{heading('Changed specs', __doc__)}\n{about}\n\n{table}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
