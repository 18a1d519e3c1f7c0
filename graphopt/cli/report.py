"""A plan's report on the terminal."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.table import Table

from graphopt.cli.device import show_memory
from graphopt.cli.screen import grid, show

if TYPE_CHECKING:
    from graphopt.compiler.plan import Plan
    from graphopt.compiler.report import PassReport


def show_report(plan: "Plan") -> None:
    """Prints figures before and after, then for each pass its regions, what it saved, what was verified, and its diagnostics."""
    from graphopt.cost.figures import common_figures

    report = plan.report
    show(f"{report.name or 'unnamed spec'}  (digest {report.digest}, batch {report.batch})")
    if report.before is not None and report.after is not None:
        table = grid("one training step", "before", "after", "ratio", right=(1, 2, 3))
        for figure, old, new in common_figures(report.before.to_dict(), report.after.to_dict()):
            table.add_row(figure.title, figure.text(old), figure.text(new), f"{new / old:.3f}" if old else "")
        show(table)
        if report.before.cuda is not None and report.after.cuda is not None:
            show()
            show_memory(report.before.cuda, report.after.cuda)
    for number, item in enumerate(report.passes, start=1):
        show()
        _show_pass(number, item)
    for advice in report.advice:
        show(f"\nworth knowing: {advice}")
    if report.no_costs:
        show(f"no costs: {report.no_costs}")
    for path, reason in report.opaque:
        show(f"opaque {path}: {reason}")
    if report.unused:
        show(f"no gradient reaches: {some(report.unused)}")


def _show_pass(number: int, item: "PassReport") -> None:
    report = item.to_dict()
    line = f", line {item.instance.line}" if item.instance.line else ""
    state = "" if item.active else "  not in this phase: its trigger has not fired (see --epoch)"
    show(f"pass {number} {report['use']}{line}{state}")
    if report["regions"]:
        show(f"  regions: {some(report['regions'])}")
    before, after = report["before"], report["after"]
    if item.active and before and after:
        show(_savings(before, after))
    for d in report["diagnostics"]:
        show(f"  {d['severity']} {d['location']}: {d['message']}")
    warned = any(d["severity"] == "warning" for d in report["diagnostics"])
    for advice in item.advice:
        # The warning of the pass names the layers to freeze already.
        if not (warned and "open prefix" in advice.what):
            show(f"  worth knowing: {advice}")
    if report["verified"]:
        names = [f"{entry['property']} ({_difference(entry['difference'])})" for entry in report["verified"]]
        show(f"  verified: {', '.join(names)}")


def _savings(before: dict[str, Any], after: dict[str, Any]) -> Table | str:
    """The figures that a pass changed: before, after, and the fraction it saved."""
    from graphopt.cost.figures import common_figures

    changed = [row for row in common_figures(before, after) if row[1] != row[2]]
    if not changed:
        return "  changes no figure of a training step"
    table = grid("  this pass", "before", "after", "saved", right=(1, 2, 3))
    for figure, old, new in changed:
        table.add_row(f"  {figure.title}", figure.text(old), figure.text(new), f"{1 - new / old:.1%}" if old else "")
    return table


def _difference(value: Any) -> str:
    return "holds" if value is None else "equal" if value == 0 else f"within {value:.1e}"


def some(names: Iterable[object], most: int = 6) -> str:
    """The first few names and the last one, and how many there are."""
    listed = [str(name) for name in names]
    if len(listed) <= most:
        return ", ".join(listed)
    return f"{', '.join(listed[: most - 1])}, ... {listed[-1]} ({len(listed)} in all)"
