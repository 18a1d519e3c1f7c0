"""What a training step costs: the figures, whole and per block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, Protocol

from graphopt.units import show_count, show_size


class Named(Protocol):
    """A region, as far as costs are concerned: a name, and the module paths that make it up."""

    @property
    def name(self) -> str: ...
    @property
    def paths(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class BlockCost:
    """One block's share of a training step. Rows of one `Cost` are disjoint and add up to its totals.

    Attributes:
        path: the block's name; `""` is everything outside the blocks (the loss too).
        parameters, trainable_parameters: elements; a shared one counts for the first of its names.
        forward_flops: contractions run by the block's own modules, once. A stretch that is run again counts under `recomputed_flops`.
        weight_gradient_flops, input_gradient_flops, recomputed_flops: the parts of the backward.
        saved_activation_bytes: storages kept for the backward at the end of the forward, at the block that first saved them.
    """

    path: str
    parameters: int = 0
    trainable_parameters: int = 0
    forward_flops: int = 0
    weight_gradient_flops: int = 0
    input_gradient_flops: int = 0
    recomputed_flops: int = 0
    saved_activation_bytes: int = 0

    @property
    def backward_flops(self) -> int:
        return self.weight_gradient_flops + self.input_gradient_flops + self.recomputed_flops

    def __add__(self, other: BlockCost) -> BlockCost:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "path"}
        return BlockCost(self.path, **sums)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "backward_flops": self.backward_flops}


@dataclass(frozen=True)
class Cost:
    """One training step: forward, loss, backward, optimizer. FLOPs are 2 per multiply-accumulate; sizes are bytes.

    Live bytes are those of unique storages, before any allocator's rounding. What a device's kernels allocate inside one operator
    (workspaces) is not in them.

    Attributes:
        batch: samples in the step.
        parameters, trainable_parameters: elements, shared ones once, those the forward never reads included.
        parameter_bytes, buffer_bytes: the model itself.
        gradient_bytes: all gradients that reach a parameter's `.grad`.
        optimizer_bytes: the optimizer's state between steps.
        input_bytes: the batch and its targets.
        forward_flops, backward_flops: of one step. A backward that runs inside the forward (local supervision) is backward here.
        weight_gradient_flops, input_gradient_flops, recomputed_flops: the backward's parts, which add up to it. Where a weight
            is itself computed (a mix of two), its gradient is a weight gradient.
        saved_activation_bytes: storages that autograd keeps for the backward at the end of forward and loss, parameters and buffers
            aside. The batch counts where something keeps it (an open first convolution does).
        peak_bytes: the most that is live at once over the whole step: parameters, buffers, gradients, optimizer state, batch,
            activations and passing results. The optimizer's state exists from the start, as in every step but the first.
        peak_activation_bytes: the most that is live at once of everything that is *not* parameters, buffers, gradients or the
            optimizer's (its state, its step's passing results): the batch, activations, activations' gradients. Its moment may be another
            than `peak_bytes`'. A gradient counts as one from the moment its storage is allocated, whether autograd brings
            it to `.grad` or `torch.autograd.grad` hands it out for a parameter.
        peak_block_bytes: `peak_bytes` with every storage rounded up to 512 bytes, as CUDA's caching allocator hands it out.
        peak_phase: where the step reaches `peak_bytes`: forward, backward or optimizer.
        peak_parts: bytes by kind at that moment.
        all_reduced_bytes: what data-parallel training adds up over ranks every step: one gradient per trainable parameter.
        kernels, moved_bytes: calls of operators that compute (views are none), and the bytes of all tensors they take and give: what a
            step's time is made of besides FLOPs (`graphopt.cost.rates`). The optimizer's are among them.
        rows: the step by module path, finest attribution.
        blocks: the step by the blocks asked for, in their order, then `""` for the rest.
    """

    batch: int
    parameters: int
    trainable_parameters: int
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    input_bytes: int
    forward_flops: int
    backward_flops: int
    weight_gradient_flops: int
    input_gradient_flops: int
    recomputed_flops: int
    saved_activation_bytes: int
    peak_bytes: int
    peak_activation_bytes: int
    peak_block_bytes: int
    peak_phase: str
    peak_parts: Mapping[str, int]
    all_reduced_bytes: int
    kernels: int
    moved_bytes: int
    rows: tuple[BlockCost, ...] = field(default=(), repr=False)
    blocks: tuple[BlockCost, ...] = field(default=(), repr=False)

    @property
    def flops(self) -> int:
        """Forward and backward of one step."""
        return self.forward_flops + self.backward_flops

    def by(self, blocks: Iterable[str | Named]) -> tuple[BlockCost, ...]:
        """The rows added up by block, in the order given, then `""` for the rest.

        A block is a module path, which takes everything under it, or anything with a `name` and `paths` (a region). Where blocks
        nest, a row counts for the innermost.
        """
        owner: dict[str, str] = {}
        totals: dict[str, BlockCost] = {}
        for block in blocks:
            name, paths = (block, (block,)) if isinstance(block, str) else (block.name, block.paths)
            totals[name] = BlockCost(name)
            owner.update(dict.fromkeys(paths, name))
        rest = totals.pop("", BlockCost(""))
        for row in self.rows:
            name = owner.get(row.path) or next((owner[p] for p in _parents(row.path) if p in owner), "")
            if name:
                totals[name] += row
            else:
                rest += row
        return (*totals.values(), rest)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `blocks` where blocks were asked for, `rows` left out."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rows", "blocks")}
        plain["peak_parts"] = dict(self.peak_parts)
        if self.blocks:
            plain["blocks"] = [block.to_dict() for block in self.blocks]
        return plain


def _parents(path: str) -> Iterable[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


class Figure(NamedTuple):
    """A figure of a training step that reports show: its attribute in `Cost`, its title, its unit, and a word for it where room is short."""

    name: str
    title: str
    unit: Literal["count", "bytes"]
    short: str

    def text(self, value: float) -> str:
        """A value of it, human-readable: `11.2 M`, `374 MiB`."""
        return show_size(value) if self.unit == "bytes" else show_count(value)


#: in the order in which reports show them
FIGURES = (
    Figure("parameters", "parameters", "count", "parameters"),
    Figure("trainable_parameters", "trainable parameters", "count", "trainable"),
    Figure("forward_flops", "forward FLOPs", "count", "forward"),
    Figure("backward_flops", "backward FLOPs", "count", "backward"),
    Figure("saved_activation_bytes", "saved activations", "bytes", "saved"),
    Figure("peak_activation_bytes", "peak activations", "bytes", "activations"),
    Figure("peak_bytes", "peak memory", "bytes", "peak"),
)
#: names of those that single blocks have too
BLOCK_FIGURES = tuple(f.name for f in FIGURES if hasattr(BlockCost, f.name))
