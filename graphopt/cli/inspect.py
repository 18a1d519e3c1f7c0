"""`graphopt inspect`: a backbone's blocks, cut points and shapes, before writing a spec for it."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.networks import is_backbone
from graphopt.cli.options import InputOption, JsonOption, SetOption, TrustOption, complete_backbone, parse_shape
from graphopt.cli.screen import grid, show, show_json

if TYPE_CHECKING:
    from torch import nn
    from torch.fx import Node

    from graphopt.compiler.pass_base import Pass
    from graphopt.ir.graph import Graph
    from graphopt.ir.regions import Region


_WHAT = "source/name (timm/resnet50, torchvision/..., cifar/...), or a SPEC."
#: parameters outside of units, by what becomes of them
_KINDS = {
    "root": "gathered for the whole step",
    "replicated": "whole on every rank, averaged by name",
    "unused": "whole on every rank, never read by a step",
}


def inspect(
    what: Annotated[str, typer.Argument(metavar="WHAT", help=_WHAT, autocompletion=complete_backbone)],
    input: InputOption = None,
    set_: SetOption = [],  # noqa: B006  # never changed
    units: Annotated[bool, typer.Option("--units", help="Also what fsdp gathers together: of a SPEC's first phase.")] = False,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show a backbone's tree: per block its parameters, output shape, closed or not, cut point or not.

    Examples:

        graphopt inspect timm/resnet50

        graphopt inspect torchvision/swin_t --json

        graphopt inspect python/mypackage.models:small --input 3,64,64 --trust
    """
    from graphopt.spec import load, resolve

    shape = parse_shape(input)
    loaded = None
    if is_backbone(what):
        backbone = resolve(what, input=shape)
    else:
        loaded = load(what, trust=trust, overrides=set_)
        backbone = loaded.backbone

    from graphopt.driver import build_backbone, trace_backbone
    from graphopt.tracing import trace

    if loaded is None:
        model = build_backbone(backbone, trust=trust)
        graph = trace(model, backbone.input)
    else:
        model, graph = trace_backbone(loaded, input=shape, trust=trust)
    table = _table(f"{backbone.source}/{backbone.name}", graph)
    if units:
        table["units"] = _units(model, loaded.passes if loaded else (), shape or backbone.input)
    if as_json:
        show_json(table)
    else:
        _show(table)


def _units(model: "nn.Module", passes: "Sequence[Pass]", shape: tuple[int, ...]) -> dict[str, Any]:
    """What a strategy that shards parameters gathers together in the first phase, as plain values."""
    from graphopt.compiler.units import units_of
    from graphopt.driver import compile
    from graphopt.ir.blocks import find_blocks

    plan = compile(model, list(passes), input=shape, verify="off", costs=False)
    return units_of(plan.module, [block.paths for block in find_blocks(plan.graph)]).to_dict()


def _table(backbone: str, graph: "Graph") -> dict[str, Any]:
    from graphopt.ir.flow import cut_points

    sizes = {name: parameter.numel() for name, parameter in graph.module.named_parameters()}
    cuts = cut_points(graph)

    def row(region: "Region", level: int, block: bool) -> dict[str, Any]:
        out = region.exits[0] if len(region.exits) == 1 else None
        output, parameters = None if out is None else _shape(out), sum(sizes.get(name, 0) for name in region.parameters)
        head = {"name": region.name, "kind": region.kind, "level": level, "block": block, "parameters": parameters}
        return {**head, "output": output, "closed": region.closed, "cut_point": out in cuts}

    rows = [row(*entry) for entry in _tree(graph)]
    head = {"backbone": backbone, "input": list(graph.input), "parameters": sum(sizes.values())}
    shown = {"blocks": [row["name"] for row in rows if row["block"]], "tree": rows}
    cut_rows = [{"node": node.name, "path": node.meta["origin"].path, "shape": _shape(node)} for node in cuts]
    opaque = [{"path": path, "reason": reason} for path, reason in graph.opaque]
    return {**head, **shown, "cut_points": cut_rows, "opaque": opaque, "unused_parameters": list(graph.unused)}


def _tree(graph: "Graph") -> "Iterator[tuple[Region, int, bool]]":
    """Blocks, the modules that contain them, and the modules next to them, in execution order: (region, depth, is a block)."""
    from graphopt.ir.blocks import find_blocks
    from graphopt.ir.paths import containers, owner
    from graphopt.ir.regions import region_of

    blocks = find_blocks(graph)
    first = {block.paths[0]: block for block in blocks}
    inside = {path for block in blocks for path in block.paths}
    above = {"", *(container for path in inside for container in containers(path))}
    for path in graph.paths:
        if path in first:
            yield first[path], path.count("."), True
        elif path not in inside and owner(path) in above:  # not a later part of a block, nor a part of a module that is shown
            region = region_of(graph, (path,))
            if region.nodes:
                yield region, path.count("."), False


def _shape(node: "Node") -> list[Any] | None:
    shape = getattr(node.meta.get("val"), "shape", ())
    return ["N", *shape[1:]] if len(shape) else None


def _show(table: dict[str, Any]) -> None:
    from graphopt.units import show_count

    shape = ", ".join(map(str, table["input"]))
    cuts = len(table["cut_points"])
    show(f"{table['backbone']}  input (N, {shape}), {table['parameters']:,} parameters, {len(table['blocks'])} blocks, {cuts} cut points")
    rows = grid("path", "kind", "parameters", "output", "closed", "cut point", right=(2,))
    for row in table["tree"]:
        output = f"({', '.join(map(str, row['output']))})" if row["output"] else "" if row["closed"] else "several"
        name = "  " * row["level"] + row["name"] + (" *" if row["block"] else "")
        flags = ("yes" if row["closed"] else "no", "yes" if row["cut_point"] else "")
        rows.add_row(name, row["kind"], show_count(row["parameters"]) if row["parameters"] else "", output, *flags)
    show(rows)
    show("* a block: what `blocks = true`, every and first/last count in a selector")
    for number, leaves in enumerate(table.get("units", {}).get("blocks", [])):
        show(f"unit {number}: {', '.join(leaves)}")
    for path, leaves in table.get("units", {}).get("sections", {}).items():
        show(f"unit {path}, with its own backward: {', '.join(leaves)}")
    for kind, meaning in _KINDS.items():
        if names := table.get("units", {}).get(kind):
            show(f"{meaning}: {', '.join(names)}")
    for entry in table["opaque"]:
        show(f"opaque {entry['path']}: {entry['reason']}")
    if table["unused_parameters"]:
        show(f"never read by the forward: {', '.join(table['unused_parameters'])}")
