"""The memory of a training step on a CUDA device, forecast without one.

`graphopt.cost.kernels` makes the step allocate the tensors that CUDA's kernels would. This module adds what kernels allocate for
themselves, lines up a few steps as a training loop runs them, and hands that history to the simulated allocator. Every term says how it
is known: "exact" follows from torch's own code, "table" is a published or documented constant, "band" lies between two bounds, because
nobody has measured it here.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from graphopt.cost.devices import Device
from graphopt.cost.history import History
from graphopt.cost.ledger import Kind, Ledger, OperatorCall
from graphopt.cost.memory import Band, DeviceMemory, Term
from graphopt.cost.roofline import operator_seconds

aten = torch.ops.aten
#: steps in a history. The first one makes the optimizer's state, among what is free then; later ones find the memory as it left it
STEPS = 3
_PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward
_EFFICIENT_BACKWARD = aten._scaled_dot_product_efficient_attention_backward
_ATTENTION = (aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention)


class Inside:
    """Records what kernels allocate for themselves and how long they take at least, as a ledger's `inside`.

    Attributes:
        temporaries: (number of events before it, name of its term, bounds), gone when the operator ends.
        products: number of events before the first matrix product, by "forward", "backward".
        kept: bytes that dropout masks and attention keep for the backward, by term.
        seconds: of all operators at the device's peak rates.
    """

    def __init__(self, ledger: Ledger, device: Device) -> None:
        self.ledger, self.device = ledger, device
        self.temporaries: list[tuple[int, str, Band]] = []
        self.products: dict[str, int] = {}
        self.kept = {"dropout masks": 0, "attention": 0}
        self.seconds = 0.0

    def __call__(self, call: OperatorCall) -> None:
        packet, args, outputs = call.function.overloadpacket, call.args, call.outputs
        if not call.function.is_view:
            tensors = [*call.inputs, *outputs]
            self.seconds += self.ledger.times * operator_seconds(self.device, packet, args, call.kwargs, tensors, call.result)
        at = len(self.ledger.events)
        if packet in _PRODUCTS and self.ledger.phases:
            self.products.setdefault(self.ledger.phases[-1][0], at)
        elif packet is aten.native_dropout:
            self.kept["dropout masks"] += outputs[1].nbytes
        elif packet in _ATTENTION:
            self.kept["attention"] += outputs[0].nbytes + outputs[1].nbytes
        elif packet is aten.convolution:
            self._add(at, "cuDNN workspace", 0, sum(t.nbytes for t in (*args[:2], *outputs)))
        elif packet is aten.convolution_backward:
            self._add(at, "cuDNN workspace", 0, sum(t.nbytes for t in args[:3]))
        elif packet is _FLASH_BACKWARD:
            size = _flash_backward(args[1])
            self._add(at, "attention backward", 0 if self.device.capability[0] == 9 else size, size)
        elif packet is _EFFICIENT_BACKWARD:
            query, key, value = args[1:4]
            delta = 4 * prod(query.shape[:3])
            self._add(at, "attention backward", delta, delta + 4 * sum(t.numel() for t in (query, key, value)))

    def _add(self, at: int, name: str, low: int, high: int) -> None:
        self.temporaries.append((at, name, Band(low, high)))

    def of_each(self, bound: Callable[[Band], int]) -> dict[int, list[int]]:
        """Bytes of the temporaries at one of their bounds, by the number of events before them."""
        found: dict[int, list[int]] = {}
        for at, _, band in self.temporaries:
            found.setdefault(at, []).append(bound(band))
        return found

    def most(self, name: str) -> Band:
        """The bounds of the largest temporary of a term."""
        found = [band for _, term, band in self.temporaries if term == name]
        return Band(max((b.low for b in found), default=0), max((b.high for b in found), default=0))


def _flash_backward(query: Tensor) -> int:
    """Bytes of the flash kernel's backward: a float32 gradient of the query and a number per query, rows rounded up to 128, width to 32."""
    batch, heads, rows, width = query.shape
    return 4 * batch * heads * (-(-rows // 128) * 128) * (1 + -(-width // 32) * 32)


def device_memory(ledger: Ledger, inside: Inside) -> DeviceMemory:
    """What the step in a closed ledger needs. It was taken as on CUDA; `inside` is what its kernels allocated besides."""
    blas = inside.device.blas_workspace
    workspaces = sorted(inside.products.values())
    least = _Steps(ledger, dict.fromkeys(workspaces[:1], blas), inside.of_each(lambda band: band.low)).history()
    most = _Steps(ledger, dict.fromkeys(workspaces, blas), inside.of_each(lambda band: band.high)).history()
    return DeviceMemory(inside.device, _terms(ledger, inside, len(workspaces) * blas), least, most)


def _terms(ledger: Ledger, inside: Inside, workspaces: int) -> tuple[Term, ...]:
    blas = inside.device.blas_workspace
    casts = sum(s for s, k, weight in zip(ledger.sizes, ledger.kinds, ledger.weights, strict=True) if weight and k == Kind.ACTIVATION)
    terms = [
        Term("cuBLAS workspace", "table" if workspaces <= blas else "band", Band(min(blas, workspaces), workspaces),
             "a constant per handle and stream; the backward's thread may have a handle of its own"),
        Term("cuDNN workspace", "band", inside.most("cuDNN workspace"),
             "not measured; from none to a copy of a convolution's operands"),
        Term("attention backward", "band" if inside.device.capability[0] == 9 or _uneven(inside) else "table",
             inside.most("attention backward"), "the flash kernel's buffers; the memory-efficient kernel's and cuDNN's are not known"),
        Term("attention", "exact", _both(inside.kept["attention"]), "outputs and log-sum-exps, in the shapes of the kernels"),
        Term("dropout masks", "exact", _both(inside.kept["dropout masks"]), "one byte per element"),
        Term("optimizer's temporary results", "exact", _both(ledger.peak((Kind.SCRATCH,))[0]), "torch's own for-each code"),
        Term("computed weights", "exact", _both(casts), "cast by autocast and cached until the end of the forward, or mixed"),
        Term("gathered parameters, messages", "exact", _both(ledger.peak((Kind.GATHERED,))[0]), "torch's own FSDP code; on one stream"),
    ]  # fmt: skip
    return tuple(term for term in terms if term.bytes.high)


def _both(size: int) -> Band:
    return Band(size, size)


def _uneven(inside: Inside) -> bool:
    band = inside.most("attention backward")
    return band.low != band.high


class _Steps:
    """A few steps in a row, from one recorded step.

    What is there before the step stays; the optimizer's state comes in the first optimizer phase; the batch of each later step is copied to
    the device before the last one's is released.
    """

    def __init__(self, ledger: Ledger, workspaces: dict[int, int], inside: dict[int, list[int]]) -> None:
        self.ledger, self.workspaces, self.inside = ledger, workspaces, inside
        self.start = ledger.phases[0][1]
        self.before = [event for event in ledger.events[: self.start] if event >= 0]
        self.sizes: list[int] = []
        self.events: list[int] = []
        self.now: dict[int, int] = {}

    def history(self) -> History:
        optimizer = next((at for name, at in self.ledger.phases if name == "optimizer"), self.start)
        state = {event: None for event in self.before if self.ledger.kinds[event] == Kind.OPTIMIZER}
        for event in self.before:
            if event not in state:
                self._follow(event)
        self._run(self.start, optimizer, first=True)
        for event in state:
            self._follow(event)
        self._run(optimizer, len(self.ledger.events) + 1, first=True)
        for _ in range(STEPS - 1):
            self._next_batch()
            self._run(self.start, len(self.ledger.events) + 1)
        return History(self.sizes, self.events)

    def _next_batch(self) -> None:
        """Frees what a step left, but keeps its batch until the next one is there."""
        for left in self.now.keys() - set(self.before):
            self._follow(~left)
        for event in self.before:
            if self.ledger.kinds[event] == Kind.INPUT:
                last = self.now.get(event)  # None: an earlier micro-batch, gone within the step
                self._follow(event)
                if last is not None:
                    self.events.append(~last)

    def _run(self, start: int, end: int, *, first: bool = False) -> None:
        """The events from `start` to `end`, with what kernels allocate for themselves; a workspace of cuBLAS is kept."""
        for at in range(start, end):
            if first and at in self.workspaces:
                self._allocate(self.workspaces[at])
            for size in self.inside.get(at, ()):
                self.events.append(~self._allocate(size))
            if at < len(self.ledger.events):
                self._follow(self.ledger.events[at])

    def _follow(self, event: int) -> None:
        """What happened to a storage happens to this step's."""
        if event >= 0:
            self.now[event] = self._allocate(0 if event in self.ledger.host else self.ledger.sizes[event])
        elif ~event in self.now:
            self.events.append(~self.now.pop(~event))

    def _allocate(self, size: int) -> int:
        self.sizes.append(size)
        self.events.append(len(self.sizes) - 1)
        return len(self.sizes) - 1
