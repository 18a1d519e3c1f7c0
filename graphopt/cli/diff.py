"""`graphopt diff`: what a spec does to its backbone, or how two plans differ; on the terminal or as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.cli.options import BatchOption, JsonOption, SetOption, SpecArgument, TrustOption, as_path, backbone_of, load_spec
from graphopt.errors import RunError

_PHASE = "A phase, from 0: with one SPEC twice to compare two; with two, of both."


def _file(flag: str, what: str) -> Any:
    return typer.Option(flag, metavar="FILE", help=f"Write {what}.", rich_help_panel="Pictures")


def diff(
    spec: SpecArgument,
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="A second spec or run to compare with.")] = None,
    phase: Annotated[list[int], typer.Option("--phase", min=0, help=_PHASE)] = [],  # noqa: B006
    epoch: Annotated[int | None, typer.Option("--epoch", min=0, help="The phase that this epoch (from 0) trains in.")] = None,
    html: Annotated[str | None, _file("--html", "one HTML page, to explore")] = None,
    svg: Annotated[str | None, _file("--svg", "a picture for a paper or a pull request")] = None,
    png: Annotated[str | None, _file("--png", "the same as PNG (needs Chromium or CairoSVG)")] = None,
    mermaid: Annotated[str | None, _file("--mermaid", "a Mermaid flowchart; - prints")] = None,
    dot: Annotated[str | None, _file("--dot", "Graphviz DOT; - prints")] = None,
    explorer: Annotated[str | None, _file("--model-explorer", "a graph for Google's Model Explorer, and FILE.data.json")] = None,
    unfold: Annotated[bool, typer.Option("--unfold", help="One line for every block, equal neighbours too.")] = False,
    nodes: Annotated[bool, typer.Option("--nodes", help="The operations of the blocks that changed.")] = False,
    batch: BatchOption = None,
    costs: Annotated[bool, typer.Option("--costs/--no-costs", help="Forecast a training step before and after.")] = True,
    set_: SetOption = [],  # noqa: B006
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show, block by block, what SPEC changes in its backbone and what that saves; or how two specs, runs or phases differ.

    Examples:

        graphopt diff quickstart

        graphopt diff quickstart --html diff.html --svg diff.svg

        graphopt diff spec.toml other.toml

        graphopt diff runs/quickstart --phase 0 --phase 1
    """
    from graphopt.cli.screen import console, show, show_json, show_text
    from graphopt.diff import Diff
    from graphopt.diff.render import files
    from graphopt.diff.render.data import main_diff
    from graphopt.diff.render.dot import to_dot
    from graphopt.diff.render.mermaid import to_mermaid
    from graphopt.diff.render.text import render

    asked = {"html": html, "svg": svg, "png": png, "model-explorer": explorer}
    targets = {name: _target(name, path) for name, path in asked.items() if path}
    shown = _shown(spec, other, phase, epoch, batch, costs, set_, trust)
    main = main_diff(shown)
    written: list[Path] = []
    writers: dict[str, Any] = {"html": files.write_html, "svg": files.write_svg, "png": files.write_png}
    for name, path in targets.items():
        if name == "model-explorer":
            written += files.write_model_explorer(shown, path)
        else:
            writers[name](shown, path)
            written.append(path)
    texts = [(mermaid, lambda: to_mermaid(main, unfold=unfold)), (dot, lambda: to_dot(main, unfold=unfold))]
    for target, text in texts:
        if target == "-":
            show_text(text())
        elif target:
            files.write(_target("", target), text())
            written.append(Path(target).expanduser())
    if as_json:
        show_json(main.to_dict())
    elif not written and "-" not in (mermaid, dot):
        out = console()
        if not isinstance(shown, Diff) and len(shown) > 1:
            for number, phase_diff in enumerate(shown):
                show(f"phase {number}, from epoch {phase_diff.epoch}: {phase_diff.label}{'   (shown)' if phase_diff.diff is main else ''}")
        out.print(render(main, unfold=unfold, nodes=nodes, unicode="utf" in (out.encoding or "").lower()))
    elif written:
        show(f"written: {', '.join(map(str, written))}")


def _target(name: str, path: str) -> Path:
    """Where a picture goes; known before any work to be a place that can be written to."""
    target = as_path(path)
    assert target is not None
    if target.is_dir():
        raise RunError("is a folder", where=str(target), fix=f"Name a file in it: {target / ('diff.' + (name or 'txt'))}")
    if not target.parent.is_dir():
        raise RunError("its folder does not exist", where=str(target), fix="Make the folder first")
    return target


def _shown(
    spec: str, other: str | None, phase: list[int], epoch: int | None, batch: int | None, costs: bool, set_: list[str], trust: bool
) -> Any:
    """The diff asked for, or the phases of one plan."""
    from graphopt.diff import align
    from graphopt.diff.phases import phase_diffs

    if phase and epoch is not None:
        raise RunError("say --phase or --epoch, not both", where="--epoch")
    if len(phase) > 2 or (other is not None and len(phase) > 1):
        raise RunError("two phases can be compared, no more", where="--phase")
    plan, decisions = _plan(spec, batch, costs, set_, trust)
    phases = phase_diffs(plan, decisions, costs=costs)
    if other is not None:
        second, later = _plan(other, batch, costs, set_, trust)
        others = phase_diffs(second, later, costs=costs)
        a, b = _at(phases, phase[:1], epoch, spec), _at(others, phase[:1], epoch, other)
        return align(a.after, b.after)
    if len(phase) == 2:
        a, b = (_at(phases, [number], None, spec) for number in phase)
        return align(a.after, b.after)
    if phase or epoch is not None:
        return _at(phases, phase, epoch, spec)
    return phases


def _plan(argument: str, batch: int | None, costs: bool, set_: list[str], trust: bool) -> tuple[Any, Any]:
    """The plan of a spec in its first phase; of a run also what it decided."""
    import torch

    import graphopt
    from graphopt.diff.run import is_run, read_run
    from graphopt.driver import build_backbone as build

    path = as_path(argument)
    assert path is not None
    decisions = read_run(path).decisions if is_run(path) else None
    loaded = load_spec(argument, set_, trust)
    torch.manual_seed(loaded.train.seed)
    with backbone_of(loaded):
        module = build(loaded.backbone, trust=trust)
        return graphopt.compile(module, loaded, batch=batch, verify="off", costs=costs), decisions


def _at(phases: Any, phase: list[int], epoch: int | None, name: str) -> Any:
    from graphopt.diff.render.data import most_changed

    if phase:
        if phase[0] >= len(phases):
            raise RunError(f"{name} has phases 0 to {len(phases) - 1}, not {phase[0]}", where="--phase")
        return phases[phase[0]].diff
    if epoch is not None:
        return [f for f in phases if f.epoch <= epoch][-1].diff
    return phases[most_changed(phases)].diff


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("diff")(diff)
