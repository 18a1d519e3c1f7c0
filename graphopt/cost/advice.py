"""Warnings about wasted memory or compute: rewrites that save nothing, and the part of a step that holds its memory.

They are derived from the costs of one training step before and after a rewrite, by block; nothing here knows a pass.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.cost.figures import BlockCost, Cost
from graphopt.units import show_count, show_size

#: differences under this share do not count
NEGLIGIBLE = 0.01
#: a frozen block that saves more than this share of what it saved before has gained nothing
STILL_SAVED = 0.9
#: a part with more than this share of all saved activations holds most of the memory
MOST = 0.5


@dataclass(frozen=True)
class Advice:
    """One warning.

    Attributes:
        where: the block, or "the step". what: the fact and what to do about it.
        worth: how many bytes of memory, or FLOPs, of one step it is about.
    """

    where: str
    what: str
    worth: int

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def advise(before: Cost, after: Cost) -> tuple[Advice, ...]:
    """Warnings about one rewrite, or about a whole plan. Both costs must have the same blocks (`per_block`)."""
    return (*_open_prefix(before, after), *_no_saving(before, after), *_more_expensive(before, after))


def where_memory_is(cost: Cost) -> tuple[Advice, ...]:
    """The part of a step that holds most of its memory, where a cut or a freeze helps most; or that this is not its activations."""
    constant = cost.parameter_bytes + cost.buffer_bytes + cost.gradient_bytes + cost.optimizer_bytes
    if constant > MOST * cost.peak_bytes:
        what = (
            f"{_percent(constant, cost.peak_bytes)} of the peak is parameters, gradients and optimizer state ({show_size(constant)}): at "
            "this batch, passes that save activations gain little. Freeze or share parameters, choose an optimizer with less state, "
            "or use a larger batch"
        )
        return (Advice("the step", what, constant),)
    total = cost.saved_activation_bytes
    what = "{} of the saved activations ({}) are here: cut inside it, or checkpoint it"
    largest = [(name, saved) for name, saved in _outer_parts(cost.blocks) if saved > MOST * total]
    return tuple(Advice(name, what.format(_percent(saved, total), show_size(saved)), saved) for name, saved in largest)


def _outer_parts(blocks: Sequence[BlockCost]) -> list[tuple[str, int]]:
    """Saved bytes of the outermost modules that are more than three in number, the largest first."""
    rows = [(b.path.split("."), b.saved_activation_bytes) for b in blocks if b.path]
    for depth in range(1, 1 + max((len(path) for path, _ in rows), default=1)):
        sums: Counter[str] = Counter()
        for path, saved in rows:
            sums[".".join(path[:depth])] += saved
        if len(sums) > 3:
            break
    return sums.most_common()


def _open_prefix(before: Cost, after: Cost) -> list[Advice]:
    """Frozen blocks that save as much as before, because something before them is trainable."""
    old = {b.path: b for b in before.blocks}
    frozen = [b for b in after.blocks if b.path and b.parameters and not b.trainable_parameters and old.get(b.path, b).trainable_parameters]
    unchanged = [b for b in frozen if b.saved_activation_bytes > STILL_SAVED * max(old[b.path].saved_activation_bytes, 1)]
    first = after.blocks.index(unchanged[0]) if unchanged else 0
    trainable = [b.path for b in after.blocks[:first] if b.path and b.trainable_parameters]
    if not trainable:
        return []
    saved = sum(b.saved_activation_bytes for b in unchanged)
    them, verb = _listed(trainable), "trains" if len(trainable) == 1 else "train"
    what = f"frozen but open prefix: still saves {show_size(saved)}, because {them} before it {verb}. Freeze {them} too"
    return [Advice(_listed([b.path for b in unchanged]), what, saved)]


def _no_saving(before: Cost, after: Cost) -> list[Advice]:
    if _less(before.peak_bytes, after.peak_bytes) or _less(before.saved_activation_bytes, after.saved_activation_bytes):
        return []
    figures = (("FLOPs", before.flops, after.flops), ("trainable parameters", before.trainable_parameters, after.trainable_parameters))
    gains = [f"{show_count(old - new)} {name}" for name, old, new in figures if _less(old, new)]
    what = "this saves no memory at this batch" + (f"; what it saves is {' and '.join(gains)}" if gains else ", and no FLOPs either")
    return [Advice("the step", what, 0)]


def _more_expensive(before: Cost, after: Cost) -> list[Advice]:
    found = []
    if (more := after.peak_bytes - before.peak_bytes) > NEGLIGIBLE * before.peak_bytes:
        added = after.parameters - before.parameters
        why = f" (it adds {show_count(added)} parameters, with gradients and optimizer state)" if added > 0 else ""
        found.append(Advice("the step", f"this costs {show_size(more)} more at the peak than it saves{why}", more))
    if (more := after.flops - before.flops) > NEGLIGIBLE * before.flops:
        why = ", run again in the backward" if after.recomputed_flops else ""
        found.append(Advice("the step", f"this costs {_percent(more, before.flops)} more FLOPs a step{why}", more))
    return found


def _less(before: int, after: int) -> bool:
    return after < before * (1 - NEGLIGIBLE)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "all"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} ... {names[-1]}"
