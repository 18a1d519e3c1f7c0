"""Warnings worth money: where a plan pays for nothing, and where the memory is.

All of it is read off two costs of one training step, before and after a rewrite, by block; nothing here knows a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.cost.figures import BlockCost, Cost
from graphopt.units import show_count, show_size

#: a saving under this share is none
NOTHING = 0.01
#: a block that keeps more than this share of what it saved has not been freed of it
KEPT = 0.9
#: a part with more than this share of all saved activations holds most of the memory
MOST = 0.5


@dataclass(frozen=True)
class Advice:
    """One warning.

    Attributes:
        where: block, or "the step".
        what: the fact and what to do about it, in a sentence.
        worth: bytes of memory, or FLOPs, that are at stake in one step.
    """

    where: str
    what: str
    worth: int

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def advise(before: Cost, after: Cost) -> tuple[Advice, ...]:
    """What one rewrite (or a whole plan) should have its user know. Both costs must carry the same blocks (`per_block`)."""
    return (*_open_prefix(before, after), *_no_saving(before, after), *_dearer(before, after))


def where_memory_is(cost: Cost) -> tuple[Advice, ...]:
    """Which part of a step holds its memory, so that a cut or a freeze goes there; or that activations are not what fills it."""
    found: list[Advice] = []
    standing = cost.parameter_bytes + cost.buffer_bytes + cost.gradient_bytes + cost.optimizer_bytes
    if standing > MOST * cost.peak_bytes:
        share = _percent(standing, cost.peak_bytes)
        what = (
            f"{share} of the peak is parameters, gradients and optimizer state ({show_size(standing)}): at this batch, passes that save "
            "activations gain little. Freeze or share parameters, choose a lighter optimizer, or use the room for a larger batch"
        )
        found.append(Advice("the step", what, standing))
        return tuple(found)
    total = cost.saved_activation_bytes
    for name, saved in _parts(cost.blocks):
        if name and total and saved > MOST * total:
            what = f"{_percent(saved, total)} of the saved activations ({show_size(saved)}) are here: cut inside it, or checkpoint it"
            found.append(Advice(name, what, saved))
    return tuple(found)


def _parts(blocks: Sequence[BlockCost]) -> list[tuple[str, int]]:
    """Saved bytes of the outermost parts; a part that holds everything is taken apart."""
    rows = [(b.path.split("."), b.saved_activation_bytes) for b in blocks if b.path]
    depth = 1
    while True:
        sums: dict[str, int] = {}
        for path, saved in rows:
            name = ".".join(path[:depth])
            sums[name] = sums.get(name, 0) + saved
        if len(sums) > 3 or depth >= max((len(p) for p, _ in rows), default=1):
            return sorted(sums.items(), key=lambda item: -item[1])
        depth += 1


def _open_prefix(before: Cost, after: Cost) -> list[Advice]:
    """Frozen blocks that still save what they saved, because something before them trains."""
    old = {b.path: b for b in before.blocks}
    frozen = [b for b in after.blocks if b.path and b.parameters and not b.trainable_parameters and old.get(b.path, b).trainable_parameters]
    stuck = [b for b in frozen if b.saved_activation_bytes > KEPT * max(old[b.path].saved_activation_bytes, 1)]
    if not stuck:
        return []
    paths = [b.path for b in after.blocks]
    first = paths.index(stuck[0].path)
    open_ = [b.path for b in after.blocks[:first] if b.path and b.trainable_parameters]
    if not open_:
        return []
    kept = sum(b.saved_activation_bytes for b in stuck)
    names, them = _some([b.path for b in stuck]), _some(open_)
    what = f"frozen but open prefix: still saves {show_size(kept)}, because {them} before it {_trains(open_)}. Freeze {them} too"
    return [Advice(names, what, kept)]


def _no_saving(before: Cost, after: Cost) -> list[Advice]:
    if _less(before.peak_bytes, after.peak_bytes) or _less(before.saved_activation_bytes, after.saved_activation_bytes):
        return []
    gains = []
    if _less(before.flops, after.flops):
        gains.append(f"{show_count(before.flops - after.flops)} FLOPs")
    if _less(before.trainable_parameters, after.trainable_parameters):
        gains.append(f"{show_count(before.trainable_parameters - after.trainable_parameters)} trainable parameters")
    what = "this saves no memory at this batch" + (f"; what it saves is {' and '.join(gains)}" if gains else ", and no FLOPs either")
    return [Advice("the step", what, 0)]


def _dearer(before: Cost, after: Cost) -> list[Advice]:
    found = []
    if after.peak_bytes > before.peak_bytes * (1 + NOTHING):
        more = after.peak_bytes - before.peak_bytes
        added = after.parameters - before.parameters
        why = f" (it adds {show_count(added)} parameters, with gradients and optimizer state)" if added > 0 else ""
        found.append(Advice("the step", f"this costs {show_size(more)} more at the peak than it saves{why}", more))
    if after.flops > before.flops * (1 + NOTHING):
        more = after.flops - before.flops
        text = f"this costs {_percent(more, before.flops)} more FLOPs a step"
        found.append(Advice("the step", text + (", run again in the backward" if after.recomputed_flops else ""), more))
    return found


def _less(before: int, after: int) -> bool:
    return after < before * (1 - NOTHING)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "all"


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} ... {names[-1]}"


def _trains(names: list[str]) -> str:
    return "trains" if len(names) == 1 else "train"
