"""freeze: parts of the backbone stop training, and the graph stops paying for them.

A frozen region's parameters leave the optimizer (`requires_grad` False, no gradient). Its norms use their running statistics whatever
`module.train()` says, by rewrite and not by flag: setting `requires_grad` alone lets the statistics drift, and the network's function
with them. What remains depends on where the region lies:

- The frozen *prefix*, everything with nothing trainable before it, runs under `no_grad`: no backward, nothing saved.
- A frozen region *behind* something that trains must still pass the gradient of its input on. Stock PyTorch saves a convolution's input
  for that although only the weight is needed, and a norm's and a ReLU's; the rewrite puts lean operators there, which save the weight, the
  statistics, and one bit per element (`functions.py` and `gates.py` have the table). ResNet-50 with its front half frozen
  behind a trainable stem: `tools/freeze_bench.py` prints what it comes to.

Attention, softmax, GELU and SiLU need what they save for their input's gradient: blocks made of them gain by the missing weight gradients
only, which stock PyTorch already gives.

Triggers: from the start; at an epoch, and thawed at another (`when = { epoch = 5, until = 20 }`); by score or schedule.

    [[pass]]
    use = "freeze"
    select = ["conv1", "bn1", "layer1", "layer2"]
    when = { epoch = 10 }
"""

from __future__ import annotations

from typing import ClassVar

from graphopt.errors import PassError
from graphopt.passes.freeze.extent import Extent, below, extent
from graphopt.passes.freeze.rewriting import cut_prefix, freeze_norms, make_lean
from graphopt.regions import Region
from graphopt.rewriting import Effects, Mark, Match, Note, Pass
from graphopt.rewriting.passes import Property
from graphopt.select import Selector, select
from graphopt.trace import Graph


class Freeze(Pass):
    """Takes regions out of training.

    Attributes:
        select: the regions, see selectors. A parameter that the graph reads itself can be named too (`cls_token`, `pos_embed`).
        lean: replace the operators of frozen regions that lie behind trainable ones by forms that save less. Off, such a region keeps
            stock operators (norms with running statistics aside), and saves what they save.
        when: from which epoch, until which.

    Preserves: eval output (bit-equal), state-dict keys, and the gradients of everything that still trains.
    Refuses: selections without parameters; freezing everything; a parameter that is tied to one outside the selection.
    """

    use: ClassVar[str] = "freeze"
    preserves: ClassVar[frozenset[Property]] = frozenset({"eval output", "state-dict keys", "gradients of the rest"})
    claim: ClassVar[str | None] = "frozen"

    select: Selector
    lean: bool = True

    def match(self, graph: Graph) -> Match:
        return Match(select(self.select, graph))

    def check(self, graph: Graph, match: Match) -> list[Note]:
        found = extent(graph, match.regions)
        notes = [Note("skip", r.name, "it has no parameters: nothing to freeze") for r in match.regions if not _holds_parameters(r, found)]
        if not found.parameters:
            return [Note("refuse", match.regions[0].name, "nothing that is selected has parameters. Select the layers themselves")]
        rest = [n for n, p in graph.module.named_parameters() if p.requires_grad and n not in found.parameters and n not in graph.unused]
        if not rest:
            notes.append(
                Note("refuse", "the backbone", "no trainable parameter would be left. Exclude at least the head from the selection")
            )
        for inside, outside in found.tied:
            why = f"it is one tensor with {outside}, which is not selected: it cannot be frozen and train. Select both, or exclude it"
            notes.append(Note("refuse", inside, why))
        return [*notes, *_notes(found, self.lean)]

    def rewrite(self, graph: Graph, match: Match) -> Effects:
        found = extent(graph, match.regions)
        if found.tied or not found.parameters:
            raise PassError("the selection cannot be frozen alone", where=match.regions[0].name if match.regions else None)
        for name in found.parameters:
            graph.module.get_parameter(name).requires_grad_(False)
        chosen = [n for r in match.regions for n in r.nodes]
        norms = freeze_norms(graph, chosen, set(found.behind) if self.lean else set(), by=self.use)
        lean = make_lean(graph, found.behind, by=self.use) if self.lean else {}
        cut_prefix(graph, found.prefix, by=self.use)
        frozen = tuple(r.name for r in match.regions if _holds_parameters(r, found))
        prefix = set(found.prefix)
        marks = {}
        for region in match.regions:
            if region.name in frozen:
                cut = all(n in prefix for n in region.nodes if n.op == "call_module")
                marks[region.name] = Mark("frozen", detail={"backward": "cut off" if cut else "lean" if self.lean else "stock"})
        figures = {"frozen_parameters": len(found.parameters), "prefix_nodes": len(found.prefix), "norms": norms, "lean": lean}
        return Effects(frozen, tuple(_notes(found, self.lean)), figures=figures, marks=marks)


def _holds_parameters(region: Region, found: Extent) -> bool:
    """Whether anything of the region is frozen: what its nodes read, or what is registered there and never read."""
    return not set(region.parameters).isdisjoint(found.parameters) or any(below(n, region.paths) for n in found.parameters)


def _notes(found: Extent, lean: bool) -> list[Note]:
    notes = [
        Note("warn", region, f"it reads {name}, which another part owns and trains: {name} is not frozen")
        for region, name in found.borrowed
    ]
    if found.blockers:
        first, *more = found.blockers
        paths = found.blockers[first]
        named = _listed(paths)
        also = f"; so for {len(more)} more of its regions" if more else ""
        cost = " and what its input gradient takes is still saved" if lean else " and its activations are still saved"
        verb = "train" if len(paths) > 1 else "trains"
        why = f"frozen, but {named} before it {verb}: the backward passes through{cost}{also}. Freeze {named} too to cut it off"
        notes.append(Note("warn", first, why))
    return notes


def _listed(paths: tuple[str, ...]) -> str:
    shown = [*paths[:3], f"{len(paths) - 3} more"] if len(paths) > 3 else list(paths)
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
