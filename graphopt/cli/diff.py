"""`graphopt diff`: what a spec does to its backbone, or how two plans, backbones or files of weights differ; as text or pictures."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import options
from graphopt.cli.networks import Networks
from graphopt.cli.screen import console, show, show_json, show_text
from graphopt.errors import RunError
from graphopt.files import write_atomically

if TYPE_CHECKING:
    from graphopt.diff import Diff
    from graphopt.diff.phases import PhaseDiff
    from graphopt.diff.render.data import Shown

_WHAT = "A spec, a run, a backbone (timm/resnet50), a checkpoint or a weights file."
_SPEC = "Of weights files: the spec or the backbone that they belong to; default: the other argument's."

_EXPLORER = "graphs for Google's Model Explorer, FILE.data.json (colours) and FILE.sync.json (which nodes match)"

#: as a file name: print instead
STDOUT = Path("-")

_PHASE = "A phase, from 0: with one SPEC twice to compare two; with two, of both."


_RANKS = 'Colour local modules by the rank that trains each, of so many (strategy = "modules").'


def _file(flag: str, what: str) -> Any:
    return typer.Option(flag, metavar="FILE", parser=options.expanded, help=f"Write {what}.", rich_help_panel="Pictures")


def diff(
    what: Annotated[str, typer.Argument(metavar="WHAT", help=_WHAT, autocompletion=options.complete_any)],
    other: Annotated[
        str | None, typer.Argument(metavar="[OTHER]", help="The same, to compare with.", autocompletion=options.complete_any)
    ] = None,
    phase: Annotated[list[int], typer.Option("--phase", min=0, help=_PHASE)] = [],  # noqa: B006  # never changed
    epoch: Annotated[int | None, typer.Option("--epoch", min=0, help="The phase that this epoch (from 0) trains in.")] = None,
    html: Annotated[Path | None, _file("--html", "one HTML page, to explore")] = None,
    svg: Annotated[Path | None, _file("--svg", "a picture for a paper or a pull request")] = None,
    png: Annotated[Path | None, _file("--png", "the same as PNG (needs Chromium or CairoSVG)")] = None,
    pdf: Annotated[Path | None, _file("--pdf", "the same as PDF, for LaTeX (needs Chromium or CairoSVG)")] = None,
    mermaid: Annotated[Path | None, _file("--mermaid", "a Mermaid flowchart; - prints")] = None,
    dot: Annotated[Path | None, _file("--dot", "Graphviz DOT; - prints")] = None,
    explorer: Annotated[
        Path | None,
        _file("--model-explorer", _EXPLORER),
    ] = None,
    ranks: Annotated[int | None, typer.Option("--ranks", min=1, help=_RANKS)] = None,
    spec: Annotated[str | None, typer.Option("--spec", metavar="SPEC", help=_SPEC, autocompletion=options.complete_backbone)] = None,
    input: options.InputOption = None,
    unfold: Annotated[bool, typer.Option("--unfold", help="One line for every block, equal neighbours too.")] = False,
    nodes: Annotated[bool, typer.Option("--nodes", help="The operations of the blocks that changed.")] = False,
    batch: options.BatchOption = None,
    costs: options.CostsOption = True,
    set_: options.SetOption = [],  # noqa: B006  # never changed
    trust: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Show, block by block, what a spec changes in its backbone and what that saves; or how any two networks differ.

    Blocks of two different backbones are matched by their structure; two files of weights are compared in numbers, too.

    Examples:

        graphopt diff quickstart

        graphopt diff quickstart --html diff.html --svg diff.svg

        graphopt diff spec.toml other.toml

        graphopt diff runs/quickstart --phase 0 --phase 1

        graphopt diff timm/resnet50 timm/resnet101

        graphopt diff before.safetensors after.safetensors --spec timm/resnet50
    """
    asked = {"html": html, "svg": svg, "png": png, "pdf": pdf, "json": explorer, "mmd": mermaid, "dot": dot}
    targets = {suffix: path for suffix, path in asked.items() if path is not None}
    for suffix, path in targets.items():
        if path != STDOUT:
            options.check_target(path, f"diff.{suffix}")
        if path.suffix != f".{suffix}" and (named := path.suffix.removeprefix(".")) in asked:
            raise RunError(f"{path.name} would hold {suffix.upper()}", where=f"--{suffix}", fix=f"Use --{named}, or another name")

    networks = Networks(shape=options.parse_shape(input), overrides=set_, batch=batch, costs=costs, ranks=ranks, trust=trust)
    networks.read([name for name in (what, other) if name is not None], spec)

    from graphopt.diff.render.data import main_diff

    shown = _shown(networks, what, other, phase, epoch)
    written: list[Path] = []
    for suffix, path in targets.items():
        for name, content in _files(shown, suffix, path, unfold).items():
            if name == STDOUT and isinstance(content, str):
                show_text(content)
            else:
                write_atomically(name, content)
                written.append(name)
    if as_json:
        show_json(main_diff(shown).to_dict())
    elif written:
        show(f"written: {', '.join(map(str, written))}")
    elif not targets:
        _print(shown, unfold=unfold, nodes=nodes)


def _files(shown: "Shown", suffix: str, path: Path, unfold: bool) -> dict[Path, str | bytes]:
    """One of the formats: its files (Model Explorer takes three: graphs, the node data that colours them, and which nodes match)."""
    from graphopt.diff.render.data import main_diff
    from graphopt.diff.render.explorer import to_model_explorer, to_node_data, to_sync_navigation
    from graphopt.diff.render.flowchart import to_dot, to_mermaid
    from graphopt.diff.render.page import to_html
    from graphopt.diff.render.picture import to_pdf, to_png, to_svg

    if suffix == "json":
        parts = {"": to_model_explorer, ".data": to_node_data, ".sync": to_sync_navigation}
        values = {path.with_name(f"{path.stem}{part}{path.suffix}"): make(main_diff(shown)) for part, make in parts.items()}
        return {name: json.dumps(value, indent=1, ensure_ascii=False) + "\n" for name, value in values.items()}
    if suffix in ("mmd", "dot"):
        return {path: (to_dot if suffix == "dot" else to_mermaid)(main_diff(shown), unfold=unfold)}
    if suffix == "html":
        return {path: to_html(shown)}
    svg = to_svg(shown)
    return {path: to_png(svg) if suffix == "png" else to_pdf(svg) if suffix == "pdf" else svg}


def _print(shown: "Shown", *, unfold: bool, nodes: bool) -> None:
    from graphopt.diff import Diff
    from graphopt.diff.render.data import main_diff
    from graphopt.diff.render.text import render

    main, out = main_diff(shown), console()
    if not isinstance(shown, Diff) and len(shown) > 1:
        for number, item in enumerate(shown):
            show(f"phase {number}, from epoch {item.epoch:.4g}: {item.label}{'   (shown)' if item.diff is main else ''}")
    out.print(render(main, unfold=unfold, nodes=nodes, unicode="utf" in (out.encoding or "").lower()))


def _shown(networks: Networks, what: str, other: str | None, phase: list[int], epoch: int | None) -> "Shown":
    """The diff that was asked for, or all phases of one plan."""
    from graphopt.diff import align

    if phase and epoch is not None:
        raise RunError("--phase and --epoch exclude each other", where="--epoch")
    if len(phase) > 2 or (other is not None and len(phase) > 1):
        raise RunError("at most two phases can be compared", where="--phase")
    phases = networks.phases(what, epoch)
    if other is not None:
        found = align(_one(phases, phase, epoch, what).after, _one(networks.phases(other, epoch), phase, epoch, other).after)
        return networks.with_weights(found, what, other)
    if len(phase) == 2:
        before, after = (_one(phases, [number], None, what) for number in phase)
        return align(before.after, after.after)
    return _one(phases, phase, epoch, what) if phase or epoch is not None else phases


def _one(phases: "tuple[PhaseDiff, ...]", phase: list[int], epoch: int | None, name: str) -> "Diff":
    """The diff of the phase that was asked for; by default of the one that changes the most."""
    from graphopt.diff.render.data import main_diff

    if phase and phase[0] >= len(phases):
        raise RunError(f"{name} has phases 0 to {len(phases) - 1}, not {phase[0]}", where="--phase")
    if phase:
        return phases[phase[0]].diff
    return main_diff(phases) if epoch is None else [item for item in phases if item.epoch <= epoch][-1].diff
