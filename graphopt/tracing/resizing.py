"""The graph of a backbone at another size of its input, with the same parameters.

A fully convolutional backbone only has to be traced again. One that is built for a size is set to another by the function that its library
has for that, on a copy that shares its parameters; what depends on the size without being trained (window masks, indices) is made anew.
Position embeddings are parameters that do depend on it: the graph reads them at their own size and resamples them, as timm does when it
loads a checkpoint, so that they are trained, averaged and exported at one size only. Everything else that has another shape is refused.
"""

import copy
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import TraceError
from graphopt.ir.editor import Editor
from graphopt.ir.graph import Graph
from graphopt.ir.section import BACKBONE
from graphopt.tracing import trace
from graphopt.tracing.equivalence import compare_modes

Grid = tuple[int, int]


def trace_at(backbone: nn.Module, input: tuple[int, int, int], *, compare: bool = True) -> Graph:
    """The graph of a backbone for images (C, H, W) of another size; it shares the backbone's parameters, with their names and shapes.

    With `compare`, the graph is run beside the backbone that its library has set to that size, as in `graphopt.trace`.

    Raises TraceError if the backbone cannot take that size, with the reason.
    """
    shape = f"{input[1]}x{input[2]}"
    resized = copy.deepcopy(backbone, {id(t): t for t in (*backbone.parameters(), *backbone.buffers())})
    try:
        with torch.no_grad():
            _set_size(resized, (input[1], input[2]))
        graph = trace(resized, input, compare=compare)
    except TraceError as error:
        raise TraceError(f"at {shape}: {error.what}", where=error.where, fix="Leave resize out, or choose another size") from error
    except Exception as error:  # the library's own checks
        raise TraceError(
            f"its library cannot set it to {shape}: {error}", fix="Choose a size that its patches and windows divide"
        ) from error
    if (grid := _grid(resized)) is not None and (patch := _patch(resized)) and (grid[0] * patch[0], grid[1] * patch[1]) != input[1:]:
        what = f"its patches of {patch[0]}x{patch[1]} do not divide {shape}"
        raise TraceError(what, fix=f"Choose multiples, such as {grid[0] * patch[0]}x{grid[1] * patch[1]}")
    theirs = dict(backbone.named_parameters())
    own = dict(resized.named_parameters())
    for name in [n for n, p in own.items() if p is not theirs.get(n)]:
        _resample(graph, name, theirs[name], own[name], (_grid(backbone), _grid(resized)), shape)
    graph.refresh()
    if compare and (differing := compare_modes(resized, graph)) is not None:
        raise TraceError(f"resampled to {shape}, it computes something else in {differing[1]} mode", where=differing[0])
    return graph


def _set_size(model: Any, size: Grid) -> None:
    """Sets a backbone to another image size, in place, where its library has something for that."""
    if hasattr(model, "set_input_size"):  # timm
        options: dict[str, Any] = {}
        known = inspect.signature(model.set_input_size).parameters
        if "always_partition" in known:
            # Windows keep their size, so that a table of relative positions means the same in every phase; the last stages are padded.
            windows = [tuple(block.window_size) for block in _first_blocks(model)]
            options = {"window_size": windows, "always_partition": True} if windows else {}
        model.set_input_size(img_size=size, **options)
    elif isinstance(getattr(model, "encoder", None), nn.Module) and hasattr(model, "image_size"):  # torchvision's ViT
        from timm.layers.pos_embed import resample_abs_pos_embed

        if size[0] != size[1]:
            raise ValueError("torchvision's ViT takes square images only")
        embedding, before = model.encoder.pos_embedding, _grid(model)
        model.image_size = size[0]
        after = _grid(model)
        if before is None or after is None:
            raise ValueError("its patches do not divide the image")
        resampled = resample_abs_pos_embed(embedding, list(after), list(before), num_prefix_tokens=1)
        model.encoder.pos_embedding = nn.Parameter(resampled.clone(), embedding.requires_grad)
        model.seq_length = math.prod(after) + 1


def _first_blocks(model: Any) -> Iterator[Any]:
    """The first block of each stage that has windows."""
    for stage in model.children():
        for part in stage if isinstance(stage, nn.Sequential) else (stage,):
            block = next(iter(getattr(part, "blocks", ())), None)
            if hasattr(block, "window_size"):
                yield block


def _grid(model: Any) -> Grid | None:
    """How many patches an image has in each direction, if the backbone makes patches."""
    if (embed := getattr(model, "patch_embed", None)) is not None and getattr(embed, "grid_size", None) is not None:
        height, width = embed.grid_size
        return int(height), int(width)
    if hasattr(model, "image_size") and hasattr(model, "patch_size") and isinstance(model.patch_size, int):
        return model.image_size // model.patch_size, model.image_size // model.patch_size
    return None


def _patch(model: Any) -> Grid | None:
    """The size of a patch."""
    size = getattr(getattr(model, "patch_embed", model), "patch_size", None)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])) if isinstance(size, tuple) else None


def _resample(graph: Graph, name: str, full: nn.Parameter, small: Tensor, grids: tuple[Grid | None, Grid | None], shape: str) -> None:
    """Lets the graph read a position embedding at its own size, and resample it."""
    from timm.layers.pos_embed import resample_abs_pos_embed, resample_abs_pos_embed_nhwc

    before, after = grids
    reads = graph.fx.find_nodes(op="get_attr", target=name)
    if before is None or after is None or not reads or full.shape[0] != 1 or full.shape[-1] != small.shape[-1]:
        what = f"it has the shape {tuple(small.shape)} at {shape} and {tuple(full.shape)} at its own size, and is no position embedding"
        raise TraceError(what, where=name, fix="This backbone cannot be resized: leave resize out")
    holder = graph.module.get_submodule(name.rpartition(".")[0])
    holder.register_parameter(name.rpartition(".")[2], full)
    edit = Editor(graph, BACKBONE)
    for old in reads:
        read = edit.read(name, before=old)
        if full.ndim == 4:
            resampled = edit.call(resample_abs_pos_embed_nhwc, (read,), {"new_size": list(after)}, before=old)
        else:
            prefix = full.shape[1] - math.prod(before)
            options = {"new_size": list(after), "old_size": list(before), "num_prefix_tokens": prefix}
            resampled = edit.call(resample_abs_pos_embed, (read,), options, before=old)
        edit.redirect(old, resampled)
        edit.erase([old])
        for node in (read, resampled):
            del node.meta["pass"]
