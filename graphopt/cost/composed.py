"""Steps of networks that differ in few parts, each put together from the recordings of its parts.

The phases of a run are such networks: a region is frozen now, and the one behind it gets an input without a gradient. What the ledger of a
step records is the forward of each part in order, the backward of each in reverse order, and the optimizer's step. Two parts meet in the
tensor at the cut point between them alone: whichever lets go of it last frees it. So a step that is put together is, event by event, the
one that `forecast` runs, and gives the same `Cost`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from graphopt.cost.attribution import Attribution
from graphopt.cost.figures import Cost
from graphopt.cost.ledger import Kind, Ledger
from graphopt.cost.loss import Loss, criterion
from graphopt.cost.parts import Part, parts_of
from graphopt.cost.ranks import collectives
from graphopt.cost.recording import Backward, Forward, Layout, PartRun, Recording, Update, layout_of, record_update
from graphopt.cost.step import StepOptions, arranged, cost_of, forecast
from graphopt.ir.collector import uncollected
from graphopt.ir.fakes import FakeMode, as_fake, unlogged
from graphopt.ir.grad_mode import recording
from graphopt.ir.inputs import Input, dtype_of, samples
from graphopt.ir.shapes import uncached

#: options that reach across the borders of parts, with the value at which they do nothing
_ACROSS = {"targets": False, "amp": None, "accumulate": 1, "parallel": None, "inputs": None, "device": None}


class Forecasts:
    """Forecasts of training steps that remember the parts of the networks. All are of one batch, with the same options.

    Args:
        compose: put steps together from parts; without, each is run as a whole, which takes less for one or two.

    Attributes:
        composed: how many steps were put together. ran: how many parts were run for them, forward and backward each.
    """

    def __init__(self, batch: int, *, compose: bool = True, **options: Unpack[StepOptions]) -> None:
        self.batch, self.compose, self.options = batch, compose, options
        self.composed = 0
        self._forwards: dict[Any, Forward] = {}
        self._backwards: dict[Any, Backward] = {}
        self._updates: dict[Any, Update | None] = {}

    @property
    def ran(self) -> int:
        return len(self._forwards) + len(self._backwards)

    @recording()
    def of(self, module: nn.Module, input: Input, *, targets: bool = False) -> Cost:
        """What `forecast` gives and raises for the module with these options; `targets` as there."""
        whole: StepOptions = {**self.options, "targets": targets}
        alone = self.compose and all(whole.get(name, usual) == usual for name, usual in _ACROSS.items())
        if alone and (parts := parts_of(module)) is not None:
            with suppress(Exception):  # what a part raises, the whole step raises, too, and says why
                if (cost := self._composed(module, input, parts)) is not None:
                    self.composed += 1
                    return cost
        return forecast(module, input, self.batch, **whole)

    def _composed(self, module: nn.Module, input: Input, parts: Sequence[Part]) -> Cost | None:
        """None for a step that trains nothing, or in which a gradient ends on its way back to what trains."""
        mode, arrange = FakeMode(), arranged(self.options)
        with ExitStack() as stack:
            for context in (uncollected(), uncached(module), mode, unlogged()):
                stack.enter_context(context)
            (batch,) = samples(input, self.batch, partial(torch.rand, dtype=dtype_of(module), device="cpu"))
            batch, labels = arrange(batch), torch.zeros(self.batch, dtype=torch.long, device="cpu")
            loss = criterion(self.options.get("loss", "cross_entropy"))
            steps = [_Step(part, partial(PartRun, part, mode, arrange)) for part in parts]
            entering, recorded, gradient = layout_of(batch), False, None
            for step in steps:
                step.key = (step.part.key, entering, recorded)
                if step.key not in self._forwards:
                    self._forwards[step.key] = step.run_forward(loss, labels)
                step.forward = self._forwards[step.key]
                entering, recorded = step.forward.layout or entering, step.forward.recorded
            trained = [step for step in steps if step.forward.recorded]
            for step in reversed(trained):
                if gradient is None and not step.part.last:
                    return None
                key = (step.key, gradient)
                if key not in self._backwards:
                    self._backwards[key] = step.run_backward(gradient, loss, labels)
                step.backward = self._backwards[key]
                gradient = step.backward.layout
            return self._sum(module, steps, (batch, labels), mode) if trained else None

    def _sum(self, module: nn.Module, steps: Sequence["_Step"], batch: Sequence[Tensor], mode: FakeMode) -> Cost:
        """The cost of the whole step."""
        whole, arrange = _Whole(), arranged(self.options) if self.options.get("channels_last") else None
        parameters, buffers = tuple(module.parameters()), tuple(module.buffers())
        layouts = {id(t): _layout(t, mode, arrange) for t in (*parameters, *buffers, *batch)}
        for kind, tensors in ((Kind.PARAMETER, parameters), (Kind.BUFFER, buffers), (Kind.INPUT, batch)):
            for tensor in tensors:
                whole.place[id(tensor)] = whole.add(_bytes(layouts[id(tensor)]), kind)
        got = {id(step.part.tensors[n]) for step in steps if step.backward is not None for n in step.backward.gradients}
        trained = [p for p in parameters if p.requires_grad]
        updates = self._updating([(layouts[id(p)], id(p) in got) for p in trained], mode)
        states = [[whole.add(size, Kind.OPTIMIZER) for size in update.state] for update in updates]
        saved, gradients = whole.forward_and_backward(steps, batch)
        gradient_bytes = sum(whole.ledger.sizes[number] for number in set(gradients.values()))
        if updates:
            whole.ledger.start_phase("optimizer")
            each = [[p] for p in trained] if len(updates) == len(trained) else [trained]
            for update, own, state in zip(updates, each, states, strict=True):
                held = [gradients[id(p)] for p in own if id(p) in got]
                whole.record(update.did, [*(whole.place[id(p)] for p in own), *held, *state])
        whole.ledger.close()
        cost = cost_of(module, whole.ledger, saved, gradient_bytes, self.batch)
        return replace(cost, collectives=collectives(()))

    def _updating(self, tensors: Sequence[tuple[Layout, bool]], mode: FakeMode) -> list[Update]:
        """The optimizer's step of these parameters: of one after the other where it takes them so."""
        found: list[Update] = []
        for tensor in tensors:
            one = self._update((tensor,), mode)
            if one is None:
                return []
            if not one.apart:
                together = self._update(tuple(tensors), mode)
                return [] if together is None else [together]
            found.append(one)
        return found

    def _update(self, tensors: tuple[tuple[Layout, bool], ...], mode: FakeMode) -> Update | None:
        if tensors not in self._updates:
            optimizer, options = self.options.get("optimizer", "sgd"), self.options.get("optimizer_options")
            self._updates[tensors] = record_update(tensors, optimizer, options, mode)
        return self._updates[tensors]


class _Step:
    """A part in one step: its recordings, and the numbers that their storages have in the step.

    Attributes:
        key: what the recording of its forward follows from: the part, the layout of what enters, and whether that has a gradient.
    """

    key: tuple[Any, Layout, bool]
    forward: Forward

    def __init__(self, part: Part, begin: Callable[[], PartRun]) -> None:
        self.part, self.begin = part, begin
        self.run: PartRun | None = None
        self.backward: Backward | None = None
        self.place: list[int] = []

    def run_forward(self, loss: Loss, labels: Tensor) -> Forward:
        """Runs it."""
        self.run = self.begin()
        return self.run.forward(*self.key[1:], loss, labels)

    def run_backward(self, gradient: Layout | None, loss: Loss, labels: Tensor) -> Backward:
        """Runs it; its forward, too, if that has been recorded in another step."""
        if self.run is None:
            self.run_forward(loss, labels)
        assert self.run is not None
        return self.run.backward(gradient)


class _Whole:
    """The ledger of a step, filled from recordings.

    Attributes:
        place: the storage of each tensor of the network, by the tensor's identity.
    """

    def __init__(self) -> None:
        self.ledger = Ledger(Attribution())
        self.place: dict[int, int] = {}

    def add(self, size: int, kind: Kind) -> int:
        """A storage that is there before the step; its number."""
        number = len(self.ledger.sizes)
        self.ledger.sizes.append(size)
        self.ledger.kinds.append(kind)
        self.ledger.events.append(number)
        return number

    def record(self, did: Recording, place: list[int], path: Callable[[str], str] = str) -> None:
        """Goes on with a recording; `place` are the numbers of the storages before it here, and gets those of its own."""
        ledger = self.ledger
        place += range(len(ledger.sizes), len(ledger.sizes) + len(did.sizes) - did.before)
        ledger.sizes += did.sizes[did.before :]
        ledger.kinds += did.kinds[did.before :]
        ledger.events += [place[event] if event >= 0 else ~place[~event] for event in did.events]
        ledger.kernels += did.kernels
        ledger.moved += did.moved
        ledger.products += did.products
        for where, figures in did.totals.items():
            total = ledger.attribution.totals[path(where)]
            for column, figure in enumerate(figures):
                total[column] += figure

    def forward_and_backward(self, steps: Sequence[_Step], batch: Sequence[Tensor]) -> tuple[dict[str, int], dict[int, int]]:
        """Bytes that autograd saved, by path; and the storages of the gradients, by the identity of their parameters."""
        ledger, entering = self.ledger, self.place[id(batch[0])]
        saved, counted, gradients, kept = dict[str, int](), set[int](), dict[int, int](), set[int]()
        ledger.start_phase("forward")
        for step in steps:
            tensors = (*step.part.tensors, *batch[1:]) if step.part.last else step.part.tensors
            step.place = [entering, *(self.place[id(tensor)] for tensor in tensors)]
            self.record(step.forward.did, step.place, step.part.path)
            entering = entering if step.forward.leaving is None else step.place[step.forward.leaving]
            for number, where in step.forward.saved:
                if (storage := step.place[number]) not in counted:
                    counted.add(storage)
                    path = step.part.path(where)
                    saved[path] = saved.get(path, 0) + ledger.sizes[storage]
        ledger.start_phase("backward")
        for step in reversed(steps):
            if step.backward is None:
                break
            step.place += [] if step.part.last else [entering]
            self.record(step.backward.did, step.place, step.part.path)
            gradients |= {id(step.part.tensors[number]): step.place[storage] for number, storage in step.backward.gradients.items()}
            kept.update(step.place[number] for number in step.backward.kept)
            entering = entering if step.backward.leaving is None else step.place[step.backward.leaving]
        last = steps[-1]
        ledger.events += [~last.place[number] for number in (last.backward.ending if last.backward is not None else ())]
        for storage in gradients.values():
            if ledger.kinds[storage] == Kind.ACTIVATION:
                ledger.kinds[storage] = Kind.GRADIENT
        self._free_once(kept)
        return saved, gradients

    def _free_once(self, kept: set[int]) -> None:
        """Of two parts that hold a storage, the one that lets go of it last frees it; what is `kept` is not freed."""
        ledger, seen = self.ledger, set(kept)
        (_, forward), (_, backward) = ledger.phases
        for begin, end in ((backward, len(ledger.events)), (forward, backward)):
            left = list[int]()
            for event in reversed(ledger.events[begin:end]):
                if event >= 0 or ~event not in seen:
                    left.append(event)
                if event < 0:
                    seen.add(~event)
            ledger.events[begin:end] = reversed(left)
            # What is before the backward shrinks after it did: its start moves.
            if begin == forward:
                ledger.phases[1] = "backward", forward + len(left)


def _layout(tensor: Tensor, mode: FakeMode, arrange: Callable[[Any], Any] | None) -> Layout:
    """Of a tensor in the step's memory format."""
    return layout_of(tensor if arrange is None else arrange(as_fake(tensor, mode)))


def _bytes(layout: Layout) -> int:
    """Of the storage of a tensor alone in it."""
    shape, strides, dtype = layout
    return dtype.itemsize * (1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))) if prod(shape) else 0
