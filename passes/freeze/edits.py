"""How far freezing reaches in a graph, and its edits: eval semantics for norms, lean operators, a prefix without gradients."""

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx import Node

from graphopt import Editor, Graph, Region
from graphopt.ir.flow import ancestors, descendants
from graphopt.ir.nodes import Memory, activations, can_leave_its_input, leaf, parameters_of, parameters_read, trainable, writes_in_place
from graphopt.ir.paths import containers, is_below
from graphopt.passes.freeze import activations as lean_activations
from graphopt.passes.freeze.lean import FUNCTIONS, METHODS, NORM_FUNCTIONS, frozen_form, original_class
from graphopt.runtime.body import NoGrad
from graphopt.runtime.by_mode import ByMode

PREFIX = "frozen_prefix"
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Scope:
    """What freezing regions comes to.

    Attributes:
        parameters: state-dict names of the parameters to freeze, every alias of a tied one.
        tied: (name inside, alias outside) of parameters that are selected under one name and not under another.
        borrowed: (region, name) of parameters that a region reads and that another part of the backbone owns and trains.
        prefix: nodes without anything trainable at or before them, in execution order: the backward never comes here.
        behind: frozen nodes with something trainable before them, and parameter-free ones that only follow such.
        passed: the frozen regions with something trainable before them: the backward passes through them.
        blockers: the paths of what is trainable before the first of those.
    """

    parameters: tuple[str, ...]
    tied: Pairs
    borrowed: Pairs
    prefix: tuple[fx.Node, ...]
    behind: tuple[fx.Node, ...]
    passed: tuple[str, ...]
    blockers: tuple[str, ...]

    def covers(self, region: Region) -> bool:
        """Whether anything of a region is frozen: what its nodes read, or what is registered there and never read."""
        return not set(region.parameters).isdisjoint(self.parameters) or any(is_below(n, region.paths) for n in self.parameters)

    def warnings(self, lean: bool) -> Iterator[tuple[str, str]]:
        """What the user should know, as (region, message): parameters that still train, and a backward pass that goes on."""
        for region, name in self.borrowed:
            yield region, f"it reads {name}, which another part owns and trains: {name} is not frozen"
        if self.passed:
            first, *more = self.passed
            named, verb = _listed(self.blockers), "train" if len(self.blockers) > 1 else "trains"
            also = f"; so for {len(more)} more of its regions" if more else ""
            cost = "what its input gradient takes is still saved" if lean else "its activations are still saved"
            passes = f"the backward passes through and {cost}{also}"
            yield first, f"frozen, but {named} before it {verb}: {passes}. Freeze {named} too to cut it off"


def freeze_scope(graph: Graph, regions: Sequence[Region]) -> Scope:
    """What freezing `regions` would come to. Changes nothing."""
    selected = {n for r in regions for n in r.nodes}
    names, tied, borrowed = _parameters(graph, regions, selected)
    frozen = {id(graph.module.get_parameter(n)) for n in names}
    active = activations(graph)
    trainable = {n for n in graph.nodes if any(p.requires_grad and id(p) not in frozen for _, p in parameters_read(graph.module, n))}
    recorded = descendants(trainable)
    behind: dict[fx.Node, None] = {}
    for node in graph.nodes:
        follows = [i for i in node.all_input_nodes if i in active]
        free = not parameters_of(graph, [node]) and follows and all(i in behind for i in follows)
        if node in recorded and node in active and node not in trainable and (node in selected or free):
            behind[node] = None
    passed, blockers = _passed(graph, regions, recorded, trainable)
    paths = tuple(dict.fromkeys(_owner(graph, n, frozen) for n in graph.nodes if n in blockers))
    return Scope(names, tied, borrowed, _prefix(graph, recorded), tuple(behind), passed, paths)


def _passed(
    graph: Graph, regions: Sequence[Region], recorded: set[fx.Node], trainable: set[fx.Node]
) -> tuple[tuple[str, ...], set[fx.Node]]:
    """The regions that a gradient leaves, and what trains before the first. What trains inside (what it reads of other parts) is none."""
    active, found = activations(graph), list[Region]()
    for region in regions:
        inside = set(region.nodes)
        inputs = {i for n in region.nodes if n in active for i in n.all_input_nodes}
        if any(i in recorded and i not in inside for i in inputs):
            found.append(region)
    for number, region in enumerate(found):
        if before := trainable & ancestors(region.nodes) - set(region.nodes):
            return tuple(r.name for r in found[number:]), before
    return (), set()


def uses_parameters(graph: Graph, nodes: Iterable[fx.Node]) -> bool:
    """Whether any node reads parameters, by itself or as an input."""
    return bool(parameters_of(graph, (source for n in nodes for source in (n, *n.all_input_nodes))))


def _parameters(graph: Graph, regions: Sequence[Region], selected: set[fx.Node]) -> tuple[tuple[str, ...], Pairs, Pairs]:
    """Names to freeze, ties that leave the selection, and what is borrowed from parts that train."""
    paths = frozenset(p for r in regions for p in r.paths)
    aliases, readers = defaultdict[int, list[str]](list), defaultdict[int, set[fx.Node]](set)
    for name, parameter in graph.module.named_parameters(remove_duplicate=False):
        aliases[id(parameter)].append(name)
    for node in graph.nodes:
        for _, parameter in parameters_read(graph.module, node):
            readers[id(parameter)].add(node)
    names, tied, borrowed = list[str](), list[tuple[str, str]](), list[tuple[str, str]]()
    for key, known in aliases.items():
        inside = [n for n in known if is_below(n, paths)]
        if inside:
            names += known
            # A module that is registered under two names is whole under either.
            tied += [(inside[0], n) for n in known if n not in inside and not readers[key] <= selected]
        elif readers[key] & selected:
            # Owned elsewhere (a class token, a table at the root): it goes along when nothing else reads it.
            if readers[key] <= selected:
                names += known
            else:
                borrowed += [(r.name, known[0]) for r in regions if not readers[key].isdisjoint(r.nodes)]
    return tuple(names), tuple(tied), tuple(borrowed)


def _prefix(graph: Graph, recorded: set[fx.Node]) -> tuple[fx.Node, ...]:
    inside = {n for n in activations(graph) if n not in recorded and n.op != "placeholder"}
    if not uses_parameters(graph, inside):
        return ()
    # Shape arithmetic and tensors made of parameters alone belong to it where it uses them.
    for node in reversed(graph.nodes):
        if node not in recorded and node.op not in ("placeholder", "output") and any(u in inside for u in node.users):
            inside.add(node)
    return tuple(n for n in graph.nodes if n in inside)


def _owner(graph: Graph, node: fx.Node, frozen: set[int]) -> str:
    """The outermost path around a trainable node of which nothing is frozen: what a user would name to freeze it."""
    for outer in containers(str(node.target)):
        if not any(id(p) in frozen or not p.requires_grad for p in graph.module.get_submodule(outer).parameters()):
            return outer
    return str(node.target)


def _listed(paths: tuple[str, ...]) -> str:
    shown = [*paths[:3], f"{len(paths) - 3} more"] if len(paths) > 3 else list(paths)
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def freeze_norms(edit: Editor, nodes: Iterable[Node], lean: set[Node]) -> int:
    """Gives every norm among `nodes` that has running statistics eval semantics. Returns how many.

    Args:
        lean: nodes where a norm that is a function call becomes its lean form at once (modules: see `use_lean_operators`).
    """
    count = 0
    for node in nodes:
        module = leaf(edit.graph, node)
        if isinstance(module, ByMode) and module.function in NORM_FUNCTIONS:
            # It was traced with `training=self.training`: the call of eval mode serves both modes.
            count += _freeze_norm_call(edit, node, module.function, *module.arguments(node.args, training=False), node in lean)
        elif module is not None and (form := frozen_form(module, lean=False)) is not None:
            edit.replace_leaf(node, form)
            count += sum(1 for m in form.modules() if getattr(m, "running_mean", None) is not None)
        elif node.op == "call_function" and node.target in NORM_FUNCTIONS:
            count += _freeze_norm_call(edit, node, node.target, node.args, node.kwargs, node in lean)
    return count


def _freeze_norm_call(edit: Editor, node: Node, norm: Any, args: Any, kwargs: Any, lean: bool) -> bool:
    flag, lean_form = NORM_FUNCTIONS[norm]
    bound = inspect.signature(norm).bind(*args, **kwargs)
    if bound.arguments.get("running_mean") is None:
        return False
    bound.arguments[flag] = False
    if lean:
        bound.apply_defaults()
    edit.set_call(node, lean_form if lean else norm, tuple(bound.args), dict(bound.kwargs))
    return True


def use_lean_operators(edit: Editor, nodes: Sequence[Node]) -> dict[str, int]:
    """Puts lean operators in place of stock ones at `nodes`, all frozen. Returns how many nodes of each kind changed."""
    graph, done, members, seen = edit.graph, Counter[str](), set(nodes), set[Node]()
    order = dict(graph.order)
    memory = Memory(order)
    for node in nodes:
        if node in seen:
            continue
        # A leaf may be called more than once (ResNet's `relu`): its calls change together or not at all.
        calls = edit.calls(str(node.target)) if node.op == "call_module" else (node,)
        seen.update(calls)
        if not members.issuperset(calls) or (_is_relu(graph, node) and all(_saved_by_a_user(graph, c) for c in calls)):
            continue
        # A function or method without a lean form stays, in place or not.
        if (node.op == "call_module" or _lean_function(node)) and writes_in_place(graph.module, node):
            if not all(can_leave_its_input(c, order, memory) for c in calls):
                continue
            for call in calls:
                source = call.all_input_nodes[0]
                edit.redirect(source, call, [u for u in source.users if order[u] > order[call]])
        if kind := _replace(edit, node):
            done[kind] += len(calls)
    return dict(sorted(done.items()))


def _replace(edit: Editor, node: Node) -> str | None:
    """Puts the lean form of an operator in place, for all its calls. Returns its kind, or None where the stock one is as lean."""
    if (stock := leaf(edit.graph, node)) is not None:
        form = frozen_form(stock, lean=True)
        if form is None:
            return None
        edit.replace_leaf(node, form)
        return original_class(stock).__name__
    lean = _lean_function(node)
    if lean is None:
        return None
    edit.set_call(node, lean)
    return lean.__name__


def _lean_function(node: Node) -> Callable[..., Any] | None:
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)
    return METHODS.get(str(node.target)) if node.op == "call_method" else None


def _is_relu(graph: Graph, node: Node) -> bool:
    return isinstance(leaf(graph, node), nn.ReLU) or _lean_function(node) is lean_activations.relu


def _saved_by_a_user(graph: Graph, node: Node) -> bool:
    """Whether a layer that trains saves this output anyway: a stock ReLU then saves the same tensor, and a mask would come on top."""
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return any(isinstance(leaf(graph, u), layers) and trainable(graph, u) for u in node.users)


def cut_prefix(edit: Editor, prefix: Sequence[Node]) -> None:
    """Runs the frozen prefix without gradients, in the place of the shorter one that an earlier freeze has declared."""
    edit.remove_sections(lambda s: s.wrap is NoGrad and s.name.startswith(PREFIX))
    edit.outline(prefix, NoGrad, PREFIX, only=lambda piece: uses_parameters(edit.graph, piece))
