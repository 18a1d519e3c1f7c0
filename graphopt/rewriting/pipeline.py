"""The pipeline: every pass selects and checks on the untouched graph; then each rewrites a clone, with one seam between.

The seam is where the compiler looks at what a pass did: structure, declared properties, costs. It is one function for all passes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from graphopt.errors import GraphoptError, PassError
from graphopt.rewriting.passes import Effects, Match, Note, Pass
from graphopt.rewriting.report import PassReport
from graphopt.rewriting.sections import emit
from graphopt.rewriting.triggers import Decision, active_regions
from graphopt.trace import Graph
from graphopt.verify import Checked, check_gradients_arrive, check_keys, check_property, check_structure

Verify = Literal["full", "fast", "off"]
Measure = Callable[[nn.Module, Graph, tuple[Effects, ...]], Any]


@dataclass(frozen=True)
class Checkup:
    """The dry run of one pass: what it would act on, and what it has to say."""

    value: Pass
    match: Match
    active: tuple[str, ...]
    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Rewritten:
    """A graph after its passes, with what each did. `effects` follows the passes' numbers; None for one that has not fired.

    `before` and `after` are the costs of one training step of the whole, where they were measured.
    """

    graph: Graph
    effects: tuple[Effects | None, ...]
    reports: tuple[PassReport, ...]
    before: Any = None
    after: Any = None


def check(base: Graph, passes: Sequence[Pass], decisions: tuple[Decision, ...] = (), where: Sequence[str | None] = ()) -> list[Checkup]:
    """Selects and checks every pass on the untouched graph, and finds conflicts. Changes nothing.

    Args:
        where: of each pass, its place in the spec, for errors.

    Raises:
        SelectError, PassError: a selector names nothing, a pass refuses, or two passes contradict each other.
    """
    found: list[Checkup] = []
    for index, value in enumerate(passes):
        with _Located(value, index, where):
            match = value.match(base)
            names = tuple(r.name for r in match.regions)
            notes = tuple(value.check(base, match))
            refused = [n for n in notes if n.level == "refuse"]
            if refused:
                raise PassError(refused[0].why, where=refused[0].where)
            found.append(Checkup(value, match, active_regions(names, value.when, index, decisions), notes))
    _demand_no_conflict(found, where)
    return found


def rewrite(
    base: Graph,
    passes: Sequence[Pass],
    decisions: tuple[Decision, ...] = (),
    *,
    verify: Verify = "full",
    measure: Measure | None = None,
    where: Sequence[str | None] = (),
    lines: Sequence[int | None] = (),
) -> Rewritten:
    """Applies the passes that are active after `decisions`. `base` stays as it is.

    Args:
        verify: "full" tries every declared property in numbers, "fast" the structure and the keys only, "off" nothing.
        measure: costs of an emitted module, for the report; called around each pass.

    Raises:
        VerifyError: a pass did not keep what it declares; with the pass and its place in the spec.
    """
    checkups = check(base, passes, decisions, where)
    graph = base.clone()
    effects: list[Effects | None] = []
    reports: list[PassReport] = []
    before = emit(graph)
    first = cost = measure(before, graph, ()) if measure else None
    for index, checkup in enumerate(checkups):
        value = checkup.value
        line = lines[index] if index < len(lines) else None
        if not checkup.active:
            effects.append(None)
            reports.append(PassReport(value, False, notes=checkup.notes, line=line))
            continue
        # The seam. "Before" must not see the rewrite, which may put new leaves in containers that emitted modules share: so it is a copy.
        reference = copy.deepcopy(before) if verify == "full" and value.promises() else None
        keys = tuple(before.state_dict())
        with _Located(value, index, where):
            done = value.rewrite(graph, value.match(graph).only(checkup.active))
            graph.refresh()
            effects.append(done)
            after = emit(graph)
            checked: list[Checked] = []
            if verify != "off":
                checked += check_structure(graph, after)
                if "state-dict keys" in value.promises():
                    checked.append(check_keys(keys, after))
                if reference is not None:
                    checked += [check_property(name, reference, after, graph.input) for name in sorted(value.promises())]
        after_cost = measure(after, graph, tuple(e for e in effects if e)) if measure else None
        notes = tuple(dict.fromkeys((*checkup.notes, *done.notes)))
        reports.append(PassReport(value, True, done.regions, notes, tuple(checked), cost, after_cost, line, figures=dict(done.figures)))
        before, cost = after, after_cost
    if verify == "full" and any(e for e in effects):
        last = max(i for i, e in enumerate(effects) if e)
        with _Located(passes[last], last, where):
            targets = any(e.needs.targets for e in effects if e)
            # All of it frozen behind a cut is a matter for the runner's suffix, so the whole module is what is asked here.
            checked_last = check_gradients_arrive(emit(graph), graph.input, targets, graph.unused)
        reports[last] = _with_checked(reports[last], checked_last)
    return Rewritten(graph, tuple(effects), tuple(reports), first, cost)


def _with_checked(report: PassReport, checked: Checked) -> PassReport:
    return replace(report, verified=(*report.verified, checked))


def _demand_no_conflict(checkups: Sequence[Checkup], where: Sequence[str | None]) -> None:
    for i, one in enumerate(checkups):
        for j, other in enumerate(checkups):
            if i == j or other.value.claim is None or other.value.claim not in one.value.excludes:
                continue
            for mine in one.match.regions:
                for theirs in other.match.regions:
                    shared = set(mine.nodes) & set(theirs.nodes)
                    if shared:
                        spot = mine.name if theirs.covers(mine) else theirs.name
                        raise PassError(
                            f"{one.value.use} (pass {i + 1}) and {other.value.use} (pass {j + 1}) both claim {spot}: "
                            f"it cannot be {one.value.claim} and {other.value.claim}",
                            where=where[i] if i < len(where) else None,
                            fix="Narrow one of the two selections (exclude = ...)",
                        )


class _Located:
    """Puts the pass and its place in the spec before any error's own location."""

    def __init__(self, value: Pass, index: int, where: Sequence[str | None]) -> None:
        place = where[index] if index < len(where) else None
        self.place = f"{place} (pass {index + 1}, {value.use})" if place else f"pass {index + 1}, {value.use}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Literal[False]:
        if isinstance(error, GraphoptError):
            error.at(self.place)
            error.args = (error.what, error.where, error.fix)
        return False
