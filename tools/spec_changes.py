"""Specs changed at random, in their text and in their values: case number i of seed s is the same on any machine."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tomli

sys.path.insert(0, str(Path(__file__).parent))

from graphopt.compiler.registry import passes
from graphopt.spec import installed
from graphopt.spec.writing import dumps_table

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
    'use = "checkpoint"\nbudget = "2 MiB"\ndevice = "L4"\nfraction = 0.8',
    'use = "adapt"\nselect = "layer*.0"\nrank = 2\nscale = 0.5\ntrain = ["fc", "layer3.0"]',
    'use = "factorize"\nselect = { type = "Conv2d", last = 4 }\nrank = 0.25\nwhen = { epoch = 1, until = 3 }',
    'use = "resize"\nsize = [6, 4]\nhow = "low-frequency"\naugment = { hflip = 0.5 }\nwhen = { epoch = 0, until = 2 }',
    'use = "ghost_norm"\nselect = "layer1.*"\nsamples = 4',
    'use = "blurpool"\nselect = ["layer2.0", "layer3.0"]\nsize = 3\nconvolutions = true',
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
def _lines(change: Callable[[random.Random, list[str]], object]) -> Callable[[random.Random, str], str]:
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
