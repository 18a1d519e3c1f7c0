"""The pipeline: every pass decides on the untouched graph; then each rewrites a clone, and is checked before the next one starts.

Between two passes the compiler looks at what a pass did: structure, declared properties, costs. That is one function for all passes.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from graphopt.compiler.emit import emit
from graphopt.compiler.measure import Measure
from graphopt.compiler.pass_base import ActiveMatch, Effects, Match, PassInstance, Severity
from graphopt.compiler.report import PassReport
from graphopt.compiler.runs import Runs
from graphopt.compiler.triggers import Decision, Start, active_regions
from graphopt.compiler.verify import Checked, check_gradients_arrive, check_keys, check_property, check_structure
from graphopt.cost.figures import Cost
from graphopt.errors import GraphoptError, NeedsValuesError, PassError
from graphopt.ir.collector import uncollected
from graphopt.ir.editor import Editor, Edits
from graphopt.ir.graph import Graph
from graphopt.ir.module import TrainingModule
from graphopt.ir.section import Author
from graphopt.ir.shapes import smaller_input

Verify = Literal["full", "fast", "off"]


@dataclass(frozen=True)
class Matched:
    """One pass of a plan with what it decided."""

    instance: PassInstance
    match: Match[Any]

    def active(self, decisions: tuple[Decision, ...]) -> tuple[str, ...]:
        """Names of the regions that the pass is applied to after `decisions`, in execution order."""
        return active_regions(self.match.names, self.instance.value.when, self.instance.index, decisions)


@dataclass(frozen=True)
class Rewritten:
    """A graph after its passes, and the module that is emitted for it.

    With what each pass did (by its number; None for one that has not fired), and costs of a step, where measured. `no_costs` says why they
    were not measured although they were asked for.
    """

    graph: Graph
    module: TrainingModule
    effects: tuple[Effects | None, ...]
    edits: tuple[Edits | None, ...]
    reports: tuple[PassReport, ...]
    before: Cost | None = None
    after: Cost | None = None
    no_costs: str | None = None


@uncollected()
def match_all(graph: Graph, instances: Sequence[PassInstance]) -> tuple[Matched, ...]:
    """Lets every pass decide on the untouched graph, and finds conflicts. Changes nothing.

    Raises SelectError or PassError if a selector matches nothing, a pass refuses, or two passes contradict each other.
    """
    found: list[Matched] = []
    for instance in instances:
        with located(instance):
            match = instance.value.match(graph)
            refused = next((d for d in match.diagnostics if d.severity is Severity.ERROR), None)
            if refused is not None:
                raise PassError(refused.message, where=refused.location, fix=refused.fix)
            instance.value.when.check(match.names)
            found.append(Matched(instance, match))
    for one, other in itertools.permutations(found, 2):
        _check_no_conflict(one, other)
    for one, other in itertools.combinations(found, 2):
        _check_not_twice(one, other)
        _check_order(one, other)
    return tuple(found)


def rewrite(
    untouched: Graph,
    matched: Sequence[Matched],
    decisions: tuple[Decision, ...],
    *,
    verify: Verify,
    measure: Measure | None,
    weights: bool = True,
) -> Rewritten:
    """Applies the passes that are active after `decisions` to a clone; `untouched` stays as it is.

    "full" tries every declared property in numbers, "fast" the structure and the keys only. `measure` is called around each pass, for the
    report. Without `weights`, the result shares the memory of `untouched`'s. Raises VerifyError if a pass did not keep what it declares,
    with the pass and its place in the spec.
    """
    graph = untouched.clone(weights=weights)
    effects: list[Effects | None] = []
    edits: list[Edits | None] = []
    reports: list[PassReport] = []
    # Without costs and runs, nobody looks at the module before the first pass: its keys are the graph's.
    looked_at = verify == "full" or measure or not any(item.active(decisions) for item in matched)
    module = emit(graph) if looked_at else graph.module
    runs = Runs(module, graph.input, smaller_input(graph.nodes, graph.input))
    first = cost = no_costs = None
    try:
        first = cost = measure(module, graph, ()) if measure else None
    except NeedsValuesError as error:
        measure, no_costs = None, error.what
    for item in matched:
        active = item.active(decisions)
        if not active:
            effects.append(None)
            edits.append(None)
            reports.append(PassReport(item.instance, False, diagnostics=tuple(item.match.diagnostics)))
            continue
        with located(item.instance):
            value, match = item.instance.value, item.match
            properties = value.preserved_properties()
            keys = untouched.cached(_keys) if module is graph.module else tuple(module.state_dict())
            before = runs if verify == "full" and properties else None
            if before is not None:
                before.hold()
            editor = Editor(graph, Author(item.instance.index, value.name))
            paths = {r.name: r.paths for r in match.regions if r.name in active}
            with uncollected():
                result = value.rewrite(editor, ActiveMatch(graph, active, match.decision, paths, match.names))
                graph.refresh()
                module = emit(graph)
            runs = Runs(module, graph.input, runs.smaller)
            checked: list[Checked] = []
            if verify != "off":
                checked += check_structure(graph, module)
                checked += [check_keys(keys, module)] if "state-dict keys" in properties else []
            if before is not None:
                # Gradients first: their runs give the outputs, too.
                checked += [check_property(name, before, runs) for name in sorted(properties, reverse=True)]
        effects.append(result)
        edits.append(editor.edits)
        cost_before, cost = cost, measure(module, graph, tuple(e for e in effects if e)) if measure else None
        diagnostics, verified = tuple(dict.fromkeys((*match.diagnostics, *result.diagnostics))), tuple(checked)
        reports.append(PassReport(item.instance, True, result.regions, diagnostics, verified, cost_before, cost, dict(result.figures)))
    if verify == "full":
        _check_gradients(runs, graph, matched, effects, reports)
    return Rewritten(graph, module, tuple(effects), tuple(edits), tuple(reports), first, cost, no_costs)


def _keys(graph: Graph) -> tuple[str, ...]:
    """Those of the state dict; a clone has the same."""
    return tuple(graph.module.state_dict())


def _check_gradients(
    runs: Runs, graph: Graph, matched: Sequence[Matched], effects: list[Effects | None], reports: list[PassReport]
) -> None:
    """After the last pass: every trainable parameter gets a gradient. That goes into the last pass's report."""
    applied = [i for i, effect in enumerate(effects) if effect is not None]
    if not applied:
        return
    with located(matched[applied[-1]].instance):
        targets = any(e.needs.targets for e in effects if e)
        # The whole module is checked: with features cached, the runner trains only what is behind the cut, and checks that itself.
        checked = check_gradients_arrive(runs, targets, graph.unused)
    last = reports[applied[-1]]
    reports[applied[-1]] = replace(last, verified=(*last.verified, checked))


def _check_no_conflict(one: Matched, other: Matched) -> None:
    mine, theirs = one.instance.value, other.instance.value
    if theirs.claim is None or theirs.claim not in mine.conflicts_with:
        return
    if (spot := _shared_spot(one, other)) is not None:
        claims = f"{mine.name} (pass {one.instance.index + 1}) and {theirs.name} (pass {other.instance.index + 1}) both claim {spot}"
        what, fix = f"it cannot be {mine.claim} and {theirs.claim}", "Narrow one of the two selections (exclude = ...)"
        raise PassError(f"{claims}: {what}", where=one.instance.location, fix=fix)


def _check_order(one: Matched, other: Matched) -> None:
    mine, theirs = one.instance.value, other.instance.value
    if mine.claim in theirs.lost_under and mine.when not in (Start(), theirs.when) and (spot := _shared_spot(one, other)) is not None:
        first = f"{mine.name} (pass {one.instance.index + 1})"
        what = f"{first} comes first in the spec and begins at another time: {spot} would lose what it learnt"
        raise PassError(what, where=other.instance.label, fix=f"Put {theirs.name} before {mine.name}")


def _shared_spot(one: Matched, other: Matched) -> str | None:
    """A region of one pass that overlaps one of the other; None if they are apart."""
    owners = {node: rival for rival in reversed(other.match.regions) for node in rival.nodes}
    for region in one.match.regions:
        rival = next((owners[n] for n in region.nodes if n in owners), None)
        if rival is not None:
            return region.name if rival.covers(region) else rival.name
    return None


def _check_not_twice(one: Matched, other: Matched) -> None:
    name = other.instance.value.name
    if type(one.instance.value) is type(other.instance.value) and other.instance.value.exclusive:
        what = f"pass {one.instance.index + 1} is {name}, too, and each decides what the whole backbone trains"
        raise PassError(what, where=other.instance.label, fix="Put both selections into one pass")


@contextmanager
def located(instance: PassInstance) -> Iterator[None]:
    """Puts the pass and its place in the spec before the location of any error that is raised inside."""
    try:
        yield
    except GraphoptError as error:
        error.with_location(instance.label)
        raise
