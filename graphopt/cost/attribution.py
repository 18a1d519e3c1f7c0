"""Which block an operator works for: by the node or module that runs it in the forward, by the autograd node's birth in the backward.

Autograd numbers its nodes in the order they are made. The forward notes which path is current from which number on; when the engine runs
a node, its number says which path made it. So backward work is attributed without holding a node (which would keep its tensors alive).
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from graphopt.cost.stand_in import bodies


class Attribution:
    """Collects FLOPs by path: `totals[path] = [forward, weight gradient, input gradient, recomputed]`."""

    def __init__(self) -> None:
        self.totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        # (path, the graph task it was entered in, (module name, path it goes by)): work of a later task is the engine's, not the frame's.
        self._frames: list[tuple[str, int, tuple[str, str]]] = [("", -1, ("", ""))]
        self._births: list[int] = [0]
        self._birth_paths: list[str] = [""]
        #: numbers of the autograd nodes whose forward multiplied by a weight.
        self._weighted: set[int] = set()

    def enter(self, path: str, leaf: str = "") -> None:
        """Work for `path` starts; where it runs the module named `leaf`, that one's parts go by `path` too."""
        self._frames.append((path, torch._C._current_graph_task_id(), (leaf, path)))
        self._note(path)

    def enter_module(self, name: str) -> None:
        leaf, path = self._frames[-1][2]
        inside = leaf and (name == leaf or name.startswith(f"{leaf}."))
        called = path + name[len(leaf) :] if inside else name
        self._frames.append((called, torch._C._current_graph_task_id(), (name, called)))
        self._note(called)

    def leave(self) -> None:
        self._frames.pop()
        self._note(self._frames[-1][0])

    def _note(self, path: str) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if self._births[-1] == number:
            self._birth_paths[-1] = path
        elif self._birth_paths[-1] != path:
            self._births.append(number)
            self._birth_paths.append(path)

    def _at_work(self) -> tuple[str, int | None, bool]:
        """(path, number of the autograd node the engine runs or None in a forward, whether this forward happens inside a backward)."""
        path, entered, _ = self._frames[-1]
        task = torch._C._current_graph_task_id()
        if task == entered:
            return path, None, task != -1
        node = torch._C._current_autograd_node()
        if task == -1 or node is None:
            return path, None, False
        number = node._sequence_nr()
        path = self._birth_paths[bisect_right(self._births, number) - 1]
        # The engine records nothing unless asked for second derivatives: what is recorded inside a backward is a forward done again.
        return (path, None, True) if torch.is_grad_enabled() else (path, number, False)

    def path(self) -> str:
        """The path at work now."""
        return self._at_work()[0]

    def contraction(self, plain: int, weight: int, *, touches_weight: bool) -> None:
        """Adds an operator's FLOPs; `weight` is what the operator itself says is a weight gradient."""
        path, number, again = self._at_work()
        total = self.totals[path]
        if number is None:
            if touches_weight:
                # Autograd makes an operator's node just before it runs it.
                self._weighted.add(torch._C._autograd._get_sequence_nr() - 1)
            total[3 if again else 0] += plain + weight
            return
        total[1] += weight
        # Inside a product's node: gradient times weight gives the input's gradient, gradient times input the weight's.
        total[1 if not touches_weight and number in self._weighted else 2] += plain


def follow(module: nn.Module, attribution: Attribution) -> None:
    """Makes every part of `module` (a copy of our own) report to `attribution`: graph modules node by node, others by module path."""
    parts = [(name, part) for name, part in module.named_modules()]
    names = {id(part): name for name, part in parts}
    parts += [(names.get(id(holder), ""), body) for holder, body in bodies(module)]
    for name, part in parts:
        if isinstance(part, fx.GraphModule):
            part.forward = _Nodes(part, name, attribution)
        elif not isinstance(part, torch.jit.ScriptModule):
            part.forward = _entering(part.forward, name, attribution)  # type: ignore[method-assign]


def _entering(forward: Callable[..., Any], path: str, attribution: Attribution) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        attribution.enter_module(path)
        try:
            return forward(*args, **kwargs)
        finally:
            attribution.leave()

    return run


class _Nodes:
    """Runs a graph module node by node. Values live exactly as long as in the code that fx generates: until their last use."""

    def __init__(self, module: fx.GraphModule, path: str, attribution: Attribution) -> None:
        self.module, self.path, self.attribution = module, path, attribution
        self.nodes = list(module.graph.nodes)
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.last: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        seen: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.last[node].append(node)
            for used in node.all_input_nodes:
                if used not in seen:
                    seen.add(used)
                    self.last[node].append(used)
        self.paths = {node: self._path(node) for node in self.nodes}

    def _path(self, node: fx.Node) -> str:
        origin = node.meta.get("origin")
        if origin is not None:
            return str(origin.path)
        if node.op == "call_module":
            return f"{self.path}.{node.target}" if self.path else str(node.target)
        stack = node.meta.get("nn_module_stack")
        return str(next(reversed(stack.values()))[0]) if stack else self.path

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        values: dict[fx.Node, Any] = {}
        rest = iter(inputs)
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = self._input(node, rest, named)
            elif node.op == "output":
                return map_arg(node.args[0], values.__getitem__)
            else:
                values[node] = self._run(node, values)
                for dead in self.last[node]:
                    del values[dead]
        return None

    @staticmethod
    def _input(node: fx.Node, rest: Any, named: dict[str, Any]) -> Any:
        if str(node.target) in named:
            return named[str(node.target)]
        default = node.args[0] if node.args else inspect.Parameter.empty
        value = next(rest, default)
        if value is inspect.Parameter.empty:
            raise TypeError(f"missing input {node.target!r}")
        return value

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return attrgetter(str(node.target))(self.module)
        args = map_arg(node.args, values.__getitem__)
        kwargs = map_arg(node.kwargs, values.__getitem__)
        self.attribution.enter(self.paths[node], str(node.target) if node.op == "call_module" else "")
        try:
            if node.op == "call_module":
                return self.module.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
        finally:
            self.attribution.leave()
