"""Which block an operator belongs to: in the forward the node or module that runs it; in the backward the maker of the autograd node.

Autograd numbers its nodes in the order in which they are made. The forward records from which number on a path is current; when the engine
runs a node, the number tells the path. So backward work is attributed without holding a node, which would keep its tensors alive.
"""

import inspect
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from graphopt.ir.paths import is_below
from graphopt.runtime.body import bodies


class _Frame(NamedTuple):
    """What is running, and the path that its operators are attributed to.

    It was entered in an autograd engine's `task`: work of a later task is the engine's, not this frame's. The submodules of `module`,
    which is the name of the one that runs, are attributed to paths below `path`.
    """

    path: str
    task: int
    module: str


class Attribution:
    """Collects FLOPs by path: `totals[path] = [forward, weight gradient, input gradient, recomputed]`."""

    def __init__(self) -> None:
        self.totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        self._frames = [_Frame("", -1, "")]
        self._sequence_starts: list[int] = [0]
        self._sequence_paths: list[str] = [""]
        #: numbers of the autograd nodes whose forward multiplied by a weight
        self._weighted: set[int] = set()

    def push(self, path: str, module: str = "") -> None:
        """Work for `path` starts; if it runs the module of that name, the module's parts are attributed to paths below `path`."""
        self._frames.append(_Frame(path, torch._C._current_graph_task_id(), module))
        self._record(path)

    def push_module(self, name: str) -> None:
        """The module of that name starts to run."""
        outer = self._frames[-1]
        inside = outer.module and is_below(name, (outer.module,))
        self.push(outer.path + name[len(outer.module) :] if inside else name, name)

    def pop(self) -> None:
        """What was pushed last ends."""
        self._frames.pop()
        self._record(self._frames[-1].path)

    def _record(self, path: str) -> None:
        number = torch._C._autograd._get_sequence_nr()
        if self._sequence_starts[-1] == number:
            self._sequence_paths[-1] = path
        elif self._sequence_paths[-1] != path:
            self._sequence_starts.append(number)
            self._sequence_paths.append(path)

    def _current(self) -> tuple[str, int | None, bool]:
        """The path, the number of the autograd node that runs (None in a forward), and whether this is a forward inside a backward."""
        frame, task = self._frames[-1], torch._C._current_graph_task_id()
        if task == frame.task:
            return frame.path, None, task != -1
        node = torch._C._current_autograd_node()
        if task == -1 or node is None:
            return frame.path, None, False
        number = node._sequence_nr()
        path = self._sequence_paths[bisect_right(self._sequence_starts, number) - 1]
        # The engine records nothing unless asked for second derivatives: what is recorded inside a backward is a forward done again.
        return (path, None, True) if torch.is_grad_enabled() else (path, number, False)

    def path(self) -> str:
        """The path that is running now."""
        return self._current()[0]

    def add(self, plain: int, weight: int, *, reads_weight: bool) -> None:
        """Adds an operator's FLOPs; `weight` are those that the operator itself knows to be a weight gradient's."""
        path, number, again = self._current()
        total = self.totals[path]
        if number is None:
            if reads_weight:
                # Autograd makes an operator's node just before it runs it.
                self._weighted.add(torch._C._autograd._get_sequence_nr() - 1)
            total[3 if again else 0] += plain + weight
            return
        total[1] += weight
        # Inside a product's node: gradient times weight gives the input's gradient, gradient times input the weight's.
        total[1 if not reads_weight and number in self._weighted else 2] += plain


@contextmanager
def instrument(module: nn.Module, attribution: Attribution) -> Iterator[None]:
    """Inside, every part of `module` (a private copy) reports to `attribution`: graph modules node by node, others by module path."""
    parts = [*module.named_modules()]
    names = {part: name for name, part in parts}
    parts += [(names.get(holder, ""), body) for holder, body in bodies(module)]
    for name, part in parts:
        if isinstance(part, fx.GraphModule):
            part.forward = _NodeRunner(part, name, attribution)
        elif not isinstance(part, torch.jit.ScriptModule):
            part.forward = _reporting(part.forward, name, attribution)
    try:
        yield
    finally:
        for _, part in parts:
            # What reports holds the part: left there, it would keep the whole copy until the cyclic collector finds it.
            vars(part).pop("forward", None)


def _reporting(forward: Callable[..., Any], name: str, attribution: Attribution) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        attribution.push_module(name)
        try:
            return forward(*args, **kwargs)
        finally:
            attribution.pop()

    return run


class _NodeRunner(fx.Interpreter):
    """Runs a graph module node by node. Values live exactly as long as in the code that fx generates: until their last use."""

    def __init__(self, module: fx.GraphModule, path: str, attribution: Attribution) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.attribution, self.signature = attribution, _signature(module.graph)
        self.paths = {node: _path_of(node, path) for node in module.graph.nodes}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.signature.bind(*args, **kwargs)
        given.apply_defaults()
        try:
            return self.run(*given.args)
        finally:
            # The interpreter would keep the inputs and the output alive.
            self.env, self.args_iter = {}, iter(())

    def run_node(self, n: fx.Node) -> Any:
        """One node; the value of one that nothing uses is released."""
        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        self.attribution.push(self.paths[n], str(n.target) if n.op == "call_module" else "")
        try:
            value = super().run_node(n)
        finally:
            self.attribution.pop()
        return value if n.users else None


def _signature(graph: fx.Graph) -> inspect.Signature:
    """That of the code which fx generates, without generating it."""
    kind, none = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    inputs = graph.find_nodes(op="placeholder")
    return inspect.Signature([inspect.Parameter(str(n.target), kind, default=n.args[0] if n.args else none) for n in inputs])


def _path_of(node: fx.Node, path: str) -> str:
    """What a node of the module at `path` is attributed to."""
    if (origin := node.meta.get("origin")) is not None:
        return str(origin.path)
    if node.op == "call_module":
        return f"{path}.{node.target}" if path else str(node.target)
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else path
