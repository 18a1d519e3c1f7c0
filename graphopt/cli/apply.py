"""`graphopt apply`: rewrite, verify, and report what that costs and saves."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.device import DeviceOption, gpu
from graphopt.cli.options import (
    BatchOption,
    JsonOption,
    SetOption,
    SpecArgument,
    TrustOption,
    check_choice,
    check_epoch,
    out_option,
    seeded_plan,
    titled,
)
from graphopt.cli.screen import show, show_json
from graphopt.errors import RunError
from graphopt.files import read_json, read_text, reason, write_folder

if TYPE_CHECKING:
    from graphopt.compiler.plan import Plan
    from graphopt.spec import Spec

#: the files that `apply` writes; a folder that holds anything else is left alone
FILES = frozenset({"spec.toml", "report.json", "graph.txt", "diff.html", "diff.svg"})
_EPOCH = "Show the phase that this epoch (from 0) trains in; default: the first."


def apply(
    spec: SpecArgument,
    out: Annotated[Path | None, out_option("Write spec, report, graph and diff there.", "DIR")] = None,
    epoch: Annotated[int | None, typer.Option("--epoch", min=0, help=_EPOCH)] = None,
    batch: BatchOption = None,
    device: DeviceOption = "A100",
    verify: Annotated[str | None, typer.Option("--verify", help="full, fast or off; default: the spec's.")] = None,
    set_: SetOption = [],  # noqa: B006  # never changed
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a backbone as SPEC says, verify every promise, and report what a training step costs before and after.

    Nothing trains. Examples:

        graphopt apply quickstart

        graphopt apply spec.toml -o plan --epoch 10 --device H100

        graphopt apply spec.toml --json --set backbone.arguments.num_classes=100
    """
    from graphopt.spec import dumps, load

    if out is not None:
        _check_folder(out)
    if verify is not None:
        check_choice("--verify", verify, ("full", "fast", "off"))
    loaded = load(spec, trust=trust, overrides=set_)
    check_epoch(loaded, epoch)
    card = gpu(device)

    from graphopt.cli.report import show_report
    from graphopt.diff import Diff
    from graphopt.diff.phases import phase_diffs
    from graphopt.diff.render.page import to_html
    from graphopt.diff.render.picture import to_svg
    from graphopt.ir.printing import graph_text
    from graphopt.planning.device import with_memory

    plan = with_memory(_plan_at(titled(loaded, spec), epoch, trust=trust, verify=verify or loaded.verify or "full", batch=batch), card)
    report = plan.report.to_dict()
    if out is not None:
        text = json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n"
        shown = phase_diffs(plan) if epoch is None else Diff.of(plan)  # all phases, or this one alone
        files = {"spec.toml": dumps(loaded), "report.json": text, "graph.txt": graph_text(plan.graph)}
        _check_folder(out)  # others may have written there meanwhile
        write_folder(out, {**files, "diff.html": to_html(shown), "diff.svg": to_svg(shown)}, FILES)
    if as_json:
        show_json(report)
        return
    show_report(plan)
    if out is not None:
        show(f"\nwritten: {out}/spec.toml, report.json, graph.txt, diff.html, diff.svg")


def _check_folder(path: Path) -> None:
    """Refuses an output folder that is not new, empty, or written by `apply`."""
    try:
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    except OSError as error:
        raise RunError(f"cannot be an output folder: {reason(error)}", where=str(path), fix="Choose another folder") from error
    try:
        report = read_json(read_text(path / "report.json"))
    except (OSError, ValueError):
        report = None
    if names and (names - FILES or not (isinstance(report, dict) and {"digest", "passes"} <= report.keys())):
        other = min(names - FILES or names)
        raise RunError(f"exists and was not written by apply (it holds {other!r})", where=str(path), fix="Choose a new or an empty folder")


def _plan_at(spec: "Spec", epoch: int | None, *, trust: bool, verify: Any, batch: int | None) -> "Plan":
    """The plan of a spec in the phase that `epoch` trains in (None: the first). Triggers that wait for measurements do not fire."""
    if epoch is None:
        return seeded_plan(spec, trust=trust, verify=verify, batch=batch)
    plan = seeded_plan(spec, trust=trust, batch=batch, costs=False)
    return plan.phase_at(epoch, spec.train.epochs, verify=verify, costs=True)
