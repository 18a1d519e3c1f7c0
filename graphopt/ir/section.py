"""Sections: nodes of the flat graph that run as one unit in the emitted module."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx, nn


@dataclass(frozen=True)
class Author:
    """The pass instance that made an edit: its number in the spec (from 0) and the name of the pass."""

    index: int
    name: str

    def __str__(self) -> str:
        return f"pass {self.index + 1} ({self.name})" if self.index >= 0 else self.name


#: the author of what a backbone brings itself
BACKBONE = Author(-1, "the backbone")


@dataclass(frozen=True)
class Section:
    """Nodes of the flat graph that run as one unit in the emitted module.

    Sections nest or are disjoint. One with a local loss (`target`) is never inside one without: see `Editor.outline`.

    Attributes:
        name: unique; the wrapper becomes `sections.<name>`.
        nodes: in any order; a convex set (no path leaves it and comes back).
        wrap: makes the module that runs it from its body. The wrapper's forward takes the body's inputs and returns the body's
            output: a tensor, or a tuple where several leave. With `target` it takes the target before those, and
            returns `(output, local_loss)`; the loss is None in eval mode.
        author: the pass instance that declared it.
        target: whether the wrapper takes the training target and gives a local loss.
        image: whether it takes the network's input too, right after the target.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    wrap: Callable[[fx.GraphModule], nn.Module]
    author: Author
    target: bool = False
    image: bool = False
