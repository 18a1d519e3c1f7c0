"""`graphopt inspect`: a backbone's blocks, cut points and shapes, before writing a spec for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.cli.options import JsonOption, SetOption, TrustOption, backbone_of, load_spec, parse_shape
from graphopt.ir.blocks import find_blocks
from graphopt.ir.flow import cut_points
from graphopt.ir.regions import region_at


def inspect(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="source/name (timm/resnet50, torchvision/..., cifar/...), or a SPEC.")],
    input: Annotated[str | None, typer.Option("--input", metavar="C,H,W", help="One sample's shape; default: the model's.")] = None,
    set_: SetOption = [],  # noqa: B006
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show a backbone's tree: per block its parameters, output shape, closed or not, cut point or not.

    Examples:

        graphopt inspect timm/resnet50

        graphopt inspect torchvision/swin_t --json

        graphopt inspect python/mypackage.models:small --input 3,64,64 --trust
    """
    from graphopt.cli.screen import show_json
    from graphopt.driver import build_backbone as build
    from graphopt.models.catalog import SOURCES
    from graphopt.spec import BackboneSpec, installed, resolve
    from graphopt.tracing import trace

    shape = parse_shape(input)
    source = what.partition("/")[0]
    if not Path(what).exists() and what not in installed() and "/" in what and (source in SOURCES or not what.endswith(".toml")):
        backbone = resolve(what, input=shape)
        graph = trace(build(backbone, trust=trust), backbone.input)
    else:
        loaded = load_spec(what, set_, trust)
        backbone = loaded.backbone if shape is None else BackboneSpec(**{**loaded.backbone.model_dump(), "input": shape})
        with backbone_of(loaded):
            graph = trace(build(backbone, trust=trust), backbone.input)
    told = _table(backbone, graph)
    if as_json:
        show_json(told)
    else:
        _show(told)


def _table(backbone: Any, graph: Any) -> dict[str, Any]:
    sizes = {name: parameter.numel() for name, parameter in graph.module.named_parameters()}
    cuts = cut_points(graph)
    rows = [_row(graph, region, sizes, set(cuts), level, block) for region, level, block in tree(graph)]
    return {
        "backbone": f"{backbone.source}/{backbone.name}",
        "input": list(backbone.input),
        "parameters": sum(sizes.values()),
        "blocks": [row["name"] for row in rows if row["block"]],
        "tree": rows,
        "cut_points": [{"node": node.name, "path": node.meta["origin"].path, "shape": _shape(node)} for node in cuts],
        "opaque": [{"path": path, "reason": reason} for path, reason in graph.opaque],
        "unused_parameters": list(graph.unused),
    }


def _row(graph: Any, region: Any, sizes: dict[str, int], cuts: set[Any], level: int, block: bool) -> dict[str, Any]:
    out = region.exits[0] if len(region.exits) == 1 else None
    return {
        "name": region.name,
        "kind": region.kind,
        "level": level,
        "block": block,
        "parameters": sum(sizes.get(name, 0) for name in region.parameters),
        "output": _shape(out) if out is not None else None,
        "closed": region.closed,
        "cut_point": out in cuts,
    }


def tree(graph: Any) -> Iterator[tuple[Any, int, bool]]:
    """Blocks, what contains them, and what stands beside them, in execution order: (region, depth, is a block)."""
    blocks = find_blocks(graph)
    first = {block.paths[0]: block for block in blocks}
    inside = {path for block in blocks for path in block.paths}
    above = {".".join(path.split(".")[:depth]) for path in inside for depth in range(1, path.count(".") + 1)}
    for path in graph.paths:
        parent = path.rpartition(".")[0]
        if path in first:
            yield first[path], path.count("."), True
        elif path in inside or (parent and parent not in above):
            continue  # a later member of a block's run, or the inside of something shown already
        else:
            region = region_at(graph, path)
            if region.nodes:
                yield region, path.count("."), False


def _shape(node: Any) -> list[Any] | None:
    value = node.meta.get("val")
    return ["N", *value.shape[1:]] if hasattr(value, "shape") and len(value.shape) else None


def _show(told: dict[str, Any]) -> None:
    from graphopt.cli.screen import grid, show
    from graphopt.units import show_count

    shape = ", ".join(str(size) for size in told["input"])
    cuts = len(told["cut_points"])
    show(f"{told['backbone']}  input (N, {shape}), {told['parameters']:,} parameters, {len(told['blocks'])} blocks, {cuts} cut points")
    table = grid("path", "kind", "parameters", "output", "closed", "cut point", right=(2,))
    for row in told["tree"]:
        output = f"({', '.join(str(size) for size in row['output'])})" if row["output"] else "several" if not row["closed"] else ""
        name = "  " * row["level"] + row["name"] + (" *" if row["block"] else "")
        marks = ("yes" if row["closed"] else "no", "yes" if row["cut_point"] else "")
        table.add_row(name, row["kind"], show_count(row["parameters"]) if row["parameters"] else "", output, *marks)
    show(table)
    show("* a block: what `blocks = true`, every and first/last count in a selector")
    for entry in told["opaque"]:
        show(f"opaque {entry['path']}: {entry['reason']}")
    if told["unused_parameters"]:
        show(f"never read by the forward: {', '.join(told['unused_parameters'])}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("inspect")(inspect)
