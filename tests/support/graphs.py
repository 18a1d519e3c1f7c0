"""Small graphs: from a function, and random ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from graphopt import Graph, trace


class Forward(nn.Module):
    """A module whose forward is `function(self, x)`; `parts` are its modules and parameters."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def graph_of(function: Callable[[Any, Tensor], Any], *input: int, **parts: nn.Module | nn.Parameter) -> Graph:
    return trace(Forward(function, **parts), input or (4,), compare=False)


def node(graph: Graph, name: str) -> Node:
    return next(n for n in graph.nodes if n.name == name)


class Dag(nn.Module):
    """Every node sums the tanh of some earlier ones, the first of which it scales by a parameter; sinks are summed up."""

    def __init__(self, sources: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.sources = sources
        self.scale = nn.Parameter(torch.full((4,), 0.9))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for earlier in self.sources:
            total = values[earlier[0]] * self.scale
            for i in earlier[1:]:
                total = total + torch.tanh(values[i])
            values.append(total)
        read = {i for earlier in self.sources for i in earlier}
        return sum((v for i, v in enumerate(values) if i not in read), start=torch.zeros(4))


@st.composite
def dags(draw: st.DrawFn, most: int = 6) -> Graph:
    count = draw(st.integers(1, most))
    sources = [draw(st.lists(st.integers(max(0, i - 3), i), min_size=1, max_size=3, unique=True)) for i in range(count)]
    return trace(Dag(sources), (4,), compare=False)
