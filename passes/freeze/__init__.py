"""freeze: parts of the backbone stop training, and the graph stops paying for them.

A frozen region's parameters leave the optimizer (`requires_grad` False, no gradient). Its norms use their running statistics whatever
`module.train()` says, by rewrite and not by flag: setting `requires_grad` alone lets the statistics drift, and the network's function
with them. What remains depends on where the region lies:

- The frozen *prefix*, everything with nothing trainable before it, runs under `no_grad`: no backward, nothing saved.
- A frozen region *behind* something that trains must still pass the gradient of its input on. Stock PyTorch saves a convolution's input
  for that although only the weight is needed, and a norm's and a ReLU's; the rewrite puts lean operators there, which save the weight, the
  statistics, and one bit per element. `graphopt diff` shows what that comes to in a backbone.

Attention, softmax, GELU and SiLU need what they save for their input's gradient: blocks made of them gain by the missing weight gradients
only, which stock PyTorch already gives.

Triggers: from the start; at an epoch, and thawed at another (`when = { epoch = 5, until = 20 }`); by score or schedule. FreezeOut
(`when = { schedule = "freezeout" }`) also lowers each region's learning rate to zero at the step at which it is frozen.

    [[pass]]
    use = "freeze"
    select = ["conv1", "bn1", "layer1", "layer2"]
    when = { epoch = 10 }
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import StrictBool

from graphopt import ActiveMatch, Effects, Match, Pass, PassError, Selector, Status
from graphopt.compiler.pass_base import Candidate, Property
from graphopt.compiler.triggers import LearningRate

if TYPE_CHECKING:
    from graphopt import Editor, Graph


class Freeze(Pass):
    """Stops training the selected regions, and stops paying for them.

    Attributes:
        select: the regions, see selectors. A parameter that the graph reads itself can be named too (`cls_token`, `pos_embed`).
        lean: replace the operators of frozen regions that lie behind trainable ones by forms that save less. Off, such a region keeps
            stock operators (norms with running statistics aside), and saves what they save.
        when: from which epoch, until which.

    Preserves: eval output (bit-equal), state-dict keys, and the gradients of everything that still trains.
    Refuses: selections without parameters; freezing everything; a parameter that is tied to one outside the selection.
    """

    name: ClassVar[str] = "freeze"
    preserves: ClassVar[frozenset[Property]] = frozenset({"eval output", "state-dict keys", "gradients of unselected parameters"})
    claim: ClassVar[str | None] = "frozen"

    select: Selector
    lean: StrictBool = True

    def match(self, graph: Graph) -> Match[None]:
        from graphopt.ir.select import select
        from graphopt.passes.freeze.edits import freeze_scope

        match: Match[None] = Match(select(self.select, graph))
        scope = freeze_scope(graph, match.regions)
        if not scope.parameters:
            match.refuse(match.regions[0].name, "nothing that is selected has parameters", fix="Select the layers themselves")
        for region in match.regions:
            if not scope.covers(region):
                match.skip(region.name, "it has no parameters: nothing to freeze")
        trainable = {n for n, p in graph.module.named_parameters() if p.requires_grad}
        if trainable <= {*scope.parameters, *graph.unused}:
            match.refuse("the backbone", "no trainable parameter would be left", fix="Exclude at least the head from the selection")
        for inside, outside in scope.tied:
            what = f"it shares its tensor with {outside}, which is not selected, so it cannot be frozen"
            match.refuse(inside, what, fix="Select both, or exclude it")
        for location, message in scope.warnings(self.lean):
            match.warn(location, message)
        return match

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        from graphopt.passes.freeze.edits import cut_prefix, freeze_norms, freeze_scope, use_lean_operators

        scope = freeze_scope(edit.graph, match.regions)
        if scope.tied or not scope.parameters:
            raise PassError("the selection cannot be frozen alone", where=next(iter(match.names), None))
        edit.freeze(scope.parameters)
        norms = freeze_norms(edit, [n for r in match.regions for n in r.nodes], set(scope.behind) if self.lean else set())
        lean = use_lean_operators(edit, scope.behind) if self.lean else {}
        edit.keep_buffers(n for r in match.regions for n in r.nodes)
        cut_prefix(edit, scope.prefix)
        counts = {"frozen_parameters": len(scope.parameters), "prefix_nodes": len(scope.prefix)}
        effects = Effects(figures={**counts, "norms": norms, "lean": lean})
        prefix = set(scope.prefix)
        for region in match.regions:
            if scope.covers(region):
                cut = all(n in prefix for n in region.nodes if n.op == "call_module")
                effects.mark(region.name, Status.FROZEN, backward="cut off" if cut else "lean" if self.lean else "stock")
        for location, message in scope.warnings(self.lean):
            effects.warn(location, message)
        return effects

    def learning_rates(self, names: tuple[str, ...]) -> Mapping[str, LearningRate]:
        return self.when.learning_rates(names)

    @classmethod
    def candidates(cls, graph: Graph, current: Pass | None) -> Iterable[Candidate]:
        from graphopt.ir.blocks import disjoint_parts

        names = [r.name for r in disjoint_parts(graph) if r.parameters]
        for share in (0.25, 0.5, 0.75):
            prefix = tuple(names[: max(1, round(share * len(names)))])
            if len(prefix) < len(names):
                yield Candidate(f"freeze up to {prefix[-1]}", cls(select=prefix))

    @classmethod
    def schedules(cls, graph: Graph, epochs: int) -> Iterable[Candidate]:
        from graphopt.compiler.triggers import rising_steps
        from graphopt.ir.blocks import disjoint_parts

        names = [r.name for r in disjoint_parts(graph) if r.parameters]
        for when in rising_steps(names[:-1], epochs):
            last = when.steps[-1].upto
            selected = tuple(names[: names.index(last) + 1])
            yield Candidate(f"freeze up to {last} from epoch {when.steps[0].epoch} on", cls(select=selected, when=when))
