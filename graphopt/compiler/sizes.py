"""The backbone at each size of its input that a phase asks for, with what the passes decide on it there."""

from torch import nn

from graphopt.compiler.pipeline import Matched, located, match_all
from graphopt.compiler.triggers import Decision
from graphopt.errors import PassError
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import Input, image_of, show
from graphopt.tracing.resizing import trace_at


class Sizes:
    """Graphs of one backbone by the input that they take; each is traced once, when a phase first needs it.

    Attributes:
        full: the input that the backbone was built for.
    """

    def __init__(self, backbone: nn.Module, graph: Graph, matched: tuple[Matched, ...], *, compare: bool) -> None:
        self.full, self._backbone, self._compare = graph.input, backbone, compare
        self._known: dict[Input, tuple[Graph, tuple[Matched, ...]]] = {graph.input: (graph, matched)}

    def with_passes(self, matched: tuple[Matched, ...]) -> "Sizes":
        """The same backbone with other passes, matched at its own size."""
        return Sizes(self._backbone, self.whole, matched, compare=self._compare)

    @property
    def whole(self) -> Graph:
        """The graph at the backbone's own size."""
        return self._known[self.full][0]

    def after(self, decisions: tuple[Decision, ...]) -> tuple[Graph, tuple[Matched, ...]]:
        """The graph that is rewritten after `decisions`, with what the passes decide on it.

        Raises TraceError if the backbone cannot take that size, PassError if a pass does something else there, or if two ask for a size;
        with the pass.
        """
        wanted, asked = self.full, self.asked(decisions)
        if asked is None:
            return self._known[self.full]
        with located(asked.instance):
            wanted = asked.instance.value.input(self.full)
            if wanted not in self._known:
                image = image_of(wanted)
                assert image is not None, "a pass can ask for another size of an image only"
                graph = trace_at(self._backbone, image, compare=self._compare)
                self._known[wanted] = graph, self._match(graph)
        return self._known[wanted]

    def asked(self, decisions: tuple[Decision, ...]) -> Matched | None:
        """The pass that asks for another input after `decisions`. Raises PassError if two do, with the later one."""
        found: Matched | None = None
        for item in self._known[self.full][1]:
            if not item.active(decisions):
                continue
            with located(item.instance):
                if item.instance.value.input(self.full) == self.full:
                    continue
                if found is not None:
                    what = f"pass {found.instance.index + 1} sets the size of the same epochs"
                    raise PassError(what, fix="Let one end where the other begins: when = { epoch = 0, until = 5 }")
            found = item
        return found

    def _match(self, graph: Graph) -> tuple[Matched, ...]:
        matched = self._known[self.full][1]
        found = match_all(graph, [item.instance for item in matched])
        for here, full in zip(found, matched, strict=True):
            if here.match.names != full.match.names:
                what = f"with an input of {show(graph.input)} it would act on other regions than at the backbone's own size"
                raise PassError(what, where=here.instance.label, fix="Name its regions, or the cuts between them")
        return found
