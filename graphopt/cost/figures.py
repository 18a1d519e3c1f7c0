"""The figures of a training step's cost, whole and per block."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Protocol, Self

from graphopt.cost.memory import DeviceMemory
from graphopt.cost.ranks import Collective
from graphopt.ir.paths import lineage
from graphopt.units import show_count, show_size


class Named(Protocol):
    """What costs need to know of a region: its name, and the module paths that make it up."""

    @property
    def name(self) -> str: ...
    @property
    def paths(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Work:
    """What the time of a part of a step depends on: FLOPs, bytes read and written, kernel calls, FLOPs of products (see `Cost`)."""

    flops: int = 0
    moved_bytes: int = 0
    kernels: int = 0
    product_flops: int = 0

    def __add__(self, other: Self) -> Self:
        return replace(self, **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: Self) -> Self:
        return replace(self, **{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class BlockCost:
    """One block's share of a training step. Rows of one `Cost` are disjoint and add up to its totals.

    Attributes:
        path: the block's name; `""` is everything outside the blocks (the loss too).
        parameters, trainable_parameters: elements; a shared one counts under the first of its names.
        forward_flops: contractions that the block's own modules run, once. A checkpointed segment's second run is in `recomputed_flops`.
        weight_gradient_flops, input_gradient_flops, recomputed_flops: the parts of the backward.
        saved_activation_bytes: storages saved for the backward at the end of the forward, at the block that first saved them.
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
        """All parts of the backward."""
        return self.weight_gradient_flops + self.input_gradient_flops + self.recomputed_flops

    def __add__(self, other: Self) -> Self:
        return replace(self, **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "path"})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "backward_flops": self.backward_flops}


@dataclass(frozen=True)
class Cost:
    """One training step: forward, loss, backward, optimizer. FLOPs are 2 per multiply-accumulate; sizes are bytes.

    Live bytes are those of unique storages, before any rounding by an allocator. What kernels allocate inside one operator
    (workspaces) is not included.

    Attributes:
        batch: samples in the step, of all its micro-batches.
        parameters, trainable_parameters: elements; shared ones count once, and those that the forward never reads are included.
        parameter_bytes, buffer_bytes, input_bytes: the model itself; the batch and its targets.
        gradient_bytes, optimizer_bytes: all gradients that reach a parameter's `.grad`; the optimizer's state between steps.
        forward_flops, backward_flops: of one step. A backward that runs inside the forward (local supervision) is backward here.
        weight_gradient_flops, input_gradient_flops, recomputed_flops: the backward's parts, which add up to it. The gradient of a
            weight that is itself computed (a mix of two) is a weight gradient.
        saved_activation_bytes: storages that autograd saves for the backward, at the end of forward and loss; parameters and buffers
            left out. The input batch is included if autograd saves it (it does if the first convolution is trainable).
        peak_bytes: the most that is live at once over the whole step: parameters, buffers, gradients, optimizer state, batch,
            activations and temporary results. The optimizer's state exists from the start, as in every step but the first.
        peak_activation_bytes: the most that is live at once of the batch, activations and their gradients; parameters, buffers,
            parameter gradients, and the optimizer's state and temporary results are left out. It may be reached at another moment than
            `peak_bytes`. A parameter gradient counts as one from the allocation of its storage, whether autograd writes it
            to `.grad` or `torch.autograd.grad` returns it.
        peak_block_bytes: `peak_bytes` with every storage rounded up to 512 bytes, as CUDA's caching allocator does at least; see `cuda`.
        peak_phase: the part of the step that reaches `peak_bytes`: forward, backward or optimizer.
        peak_parts: bytes by kind at that moment.
        all_reduced_bytes: what data-parallel training sums over ranks in every step: one gradient per trainable parameter.
        kernels, moved_bytes: operator calls that compute (views do not), and the bytes of all tensors that they read and write, the
            optimizer's included: what a step's time depends on besides FLOPs (see `graphopt.cost.rates`).
        product_flops: of the FLOPs, those of matrix products and attention; the others are of convolutions.
        collectives: what a rank of several exchanges with the others in a step; none alone.
        cuda: what the step needs of a GPU, where the forecast was for one.
        roofline_seconds: the least that it takes there, at the GPU's peak rates (see `graphopt.cost.roofline`).
        rows: the step by module path, the finest attribution.
        blocks: the step by the blocks asked for, in their order, then `""` for everything else.
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
    peak_parts: dict[str, int]
    all_reduced_bytes: int
    kernels: int
    moved_bytes: int
    product_flops: int = 0
    collectives: tuple[Collective, ...] = ()
    cuda: DeviceMemory | None = field(default=None, repr=False, compare=False)
    roofline_seconds: float | None = field(default=None, repr=False, compare=False)
    rows: tuple[BlockCost, ...] = field(default=(), repr=False)
    blocks: tuple[BlockCost, ...] = field(default=(), repr=False)

    @property
    def flops(self) -> int:
        """Forward and backward of one step."""
        return self.forward_flops + self.backward_flops

    def by(self, blocks: Iterable[str | Named]) -> tuple[BlockCost, ...]:
        """The rows added up by block, in the order given, then `""` for everything else.

        A block is a module path, with everything below it, or a region. Where blocks nest, a row counts for the innermost.
        """
        owner: dict[str, str] = {}
        totals = {"": BlockCost("")}
        for block in blocks:
            name, paths = (block, (block,)) if isinstance(block, str) else (block.name, block.paths)
            totals[name] = BlockCost(name)
            owner.update(dict.fromkeys(paths, name))
        for row in self.rows:
            name = next((owner[p] for p in reversed([*lineage(row.path)][1:]) if p in owner), "")
            totals[name] += row
        outside = totals.pop("")
        return (*totals.values(), outside)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; with `blocks` if blocks were asked for, without `rows`."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _APART}
        plain |= {"roofline_seconds": self.roofline_seconds, **self.cuda.to_dict()} if self.cuda is not None else {}
        return plain | ({"blocks": [block.to_dict() for block in self.blocks]} if self.blocks else {})


#: fields of `Cost` that its plain values do not hold as they are
_APART = ("rows", "blocks", "collectives", "cuda", "roofline_seconds")


class Figure(NamedTuple):
    """A figure of a training step: its attribute in `Cost`, its title, its unit, and a word for it where room is short."""

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


def common_figures(before: Mapping[str, int] | None, after: Mapping[str, int] | None) -> list[tuple[Figure, int, int]]:
    """Every figure that both have, with its two values."""
    return [(f, before[f.name], after[f.name]) for f in FIGURES if before and after and f.name in before and f.name in after]
