"""Every rank trains some of the gradient-isolated modules of a plan, and hands on to the next rank what its modules compute.

No gradient crosses a cut between two modules (`graphopt.compiler.parts`), so messages flow one way only: while a rank computes its
modules' losses and gradients, the next rank already has their output, and the rank before sends the next batch. No rank waits for another
one's backward, and all weights are those of the same step: the result is that of one process, bit for bit.

The ranks form a chain of stages. Rank 0 has the last one: it knows the loss and the accuracy, and writes the run's folder as in every
strategy. The rank with the highest number has the first stage and reads the data. A stop is a flag that travels with the batches, so that
every rank ends after the same step.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from graphopt.compiler.parts import Part, isolated_modules, singly, split
from graphopt.compiler.plan import Plan
from graphopt.data.loader import Batch
from graphopt.errors import RunError
from graphopt.runtime.randomness import begin_stream
from graphopt.spec import OptimizerSpec, TrainSpec
from graphopt.train.assignment import one_chain, runs_of
from graphopt.train.following import FollowedWeights, followed_weights
from graphopt.train.link import Inlet, Message, Outlet, Wire
from graphopt.train.optimizer import build_optimizer
from graphopt.train.owned import Owned
from graphopt.train.ranks import ALONE, SLOW, Agreement, Ranks
from graphopt.train.strategy import Strategy, replicated
from graphopt.train.transport import Transport

#: seconds between two looks for a stop signal that another rank has got
LOOK = 0.5


@dataclass
class Modular(Strategy):
    """A chain of ranks, each with consecutive gradient-isolated modules."""

    shares_devices: ClassVar[bool] = True
    spec: TrainSpec = field(default_factory=TrainSpec)
    runs: tuple[range, ...] = field(default=(), init=False)  # the modules of each stage in this phase
    _inlet: Inlet | None = field(default=None, init=False, repr=False)
    _outlet: Outlet | None = field(default=None, init=False, repr=False)
    _transport: Transport = field(default=Transport(), init=False, repr=False)
    _own: Part | None = field(default=None, init=False, repr=False)  # of the whole network
    _followed: FollowedWeights | None = field(default=None, init=False, repr=False)  # in this phase
    _back: Any = field(default=None, init=False, repr=False)  # the group in which they travel
    _trained: Part | None = field(default=None, init=False, repr=False)  # of what is left to train
    _slow: bool = field(default=True, init=False, repr=False)
    _left: int = field(default=0, init=False, repr=False)  # messages of this epoch that the first stage has not sent yet
    _training: bool = field(default=False, init=False, repr=False)
    _message: Message = field(default=Message(()), init=False, repr=False)  # the last one received, or sent by the first stage
    _looked: float = field(default=0.0, init=False, repr=False)
    _features: bool = field(default=False, init=False, repr=False)  # the first stage trains on cached features
    _peers: Ranks = field(default=ALONE, init=False, repr=False)  # those with the same modules
    _gradients: Any = field(default=None, init=False, repr=False)  # the group in which they average gradients
    _stop: Agreement = field(default_factory=lambda: Agreement(ALONE), init=False, repr=False)  # of the first stages
    _began: float = field(default=0.0, init=False, repr=False)  # this epoch's training

    @classmethod
    def of(cls, spec: TrainSpec) -> Self:
        """Raises RunError for settings that couple modules."""
        where = "train.strategy"
        if spec.amp == "float16":
            what = 'strategy = "modules" does not train in float16: one loss scale would make each module wait for all gradients'
            raise RunError(what, where=where, fix='Use amp = "bfloat16", or strategy = "ddp"')
        if spec.clip is not None and spec.clip_mode == "norm":
            what = 'strategy = "modules" does not clip by the norm of all gradients: each module would wait for those of the others'
            raise RunError(what, where=where, fix='Use clip_mode = "module" (each by its own norm), "agc" or "value"')
        if spec.checkpoint_format == "sharded":
            what = 'strategy = "modules" has no tensor of which each rank holds a part; rank 0 writes all of a checkpoint'
            raise RunError(what, where="train.checkpoint_format", fix='Use checkpoint_format = "whole"')
        if spec.replicas > 1 and spec.sync_norm:
            what = "train.sync_norm synchronizes over all processes, of which only those with the same modules have the same norms"
            raise RunError(what, where="train.replicas", fix="Leave sync_norm or replicas out")
        strategy = super().of(spec)
        strategy.spec = spec
        return strategy

    def with_ranks(self, ranks: Ranks) -> Self:
        """The same strategy in a chain; all ranks have to call it."""
        strategy = super().with_ranks(ranks)
        replicas = self.spec.replicas
        if ranks.count % replicas or ranks.count == replicas:
            what = f"{ranks.count} processes are no chains of two or more, {replicas} of them side by side"
            fix = f'Start {max(2, -(-ranks.count // replicas)) * replicas} processes, or use strategy = "ddp"'
            raise RunError(what, where="train.replicas", fix=fix)
        strategy._transport = Transport.of(strategy.device, ranks)
        strategy._join_links()
        first = ranks.number - ranks.number % replicas
        strategy._peers = ranks.among(range(first, first + replicas))
        shared = strategy.device.type == "cuda" and strategy._transport.backend is None  # by ranks that NCCL does not connect
        strategy._gradients = strategy._peers.new_group("gloo" if shared else None) if replicas > 1 else None
        strategy._stop = Agreement(strategy._peers)
        return strategy

    def _join_links(self) -> None:
        """Makes this rank's ends of the links to its neighbours. All ranks have to call it."""
        transport = self._transport
        # A thread receives in one group while the step sends in the other.
        heads = [self.ranks.new_group() for _ in range(2)]
        tensors = [self.ranks.new_group(transport.backend) for _ in range(2)] if transport.backend is not None else None

        def wires(stage: int, peer: int) -> tuple[Wire, Wire]:
            head = Wire(heads[stage % 2], peer, self._patience)
            return head, Wire(tensors[stage % 2], peer, self._patience, transport.device) if tensors is not None else head

        if not self.feeds:
            self._inlet = Inlet(*wires(self.stage, self.ranks.number + self.spec.replicas), self.device)
        if self.stage + 1 < self.stages:
            self._outlet = Outlet(*wires(self.stage + 1, self.ranks.number - self.spec.replicas))

    @property
    def stage(self) -> int:
        """The place of this rank in its chain, from 0."""
        return self.stages - 1 - self.ranks.number // self.spec.replicas

    @property
    def stages(self) -> int:
        """How many ranks a chain has."""
        return self.ranks.count // self.spec.replicas

    @property
    def feeds(self) -> bool:
        return self.stage == 0

    @property
    def peers(self) -> Ranks:
        return self._peers

    def _patience(self) -> timedelta:
        return timedelta(seconds=self.ranks.timeout * (SLOW if self._slow else 1))

    def expect(self, *, slow: bool) -> None:
        super().expect(slow=slow)
        self._peers.expect(slow=slow)
        self._slow = slow

    def own(self, plan: Plan) -> Owned:
        """Assigns the modules of a phase to the ranks; returns this rank's. All ranks have to call it."""
        self.runs = self.ranks.broadcast(runs_of(plan, one_chain(self.spec), self.stages) if self.ranks.first else None)
        parts = split(plan.module, self.runs)
        self._own, self._followed = parts[self.stage], None
        if followed_weights(parts):
            self._back = self._back or self.ranks.new_group()
            self._followed = FollowedWeights(parts, self.stage, self._wire_back)
        if self.device.type != "cpu":
            plan.module.cpu()  # of the others' modules, this rank keeps the weights of the phase's beginning
        return Owned.of(plan.module, self._own.module)

    def _wire_back(self, stage: int) -> Wire:
        """Between this rank and the one of its chain that has this stage."""
        replicas = self.spec.replicas
        return Wire(self._back, (self.stages - 1 - stage) * replicas + self.ranks.number % replicas, self._patience)

    def wrap(self, module: nn.Module, plan: Plan, unused: Sequence[str] = ()) -> nn.Module:
        assert self._own is not None
        emitted: Any = getattr(module, "suffix", module)
        self._trained = self._own if emitted is plan.module else split(emitted, self.runs)[self.stage]
        self._features = emitted is not module
        part = self._trained.module
        if self._gradients is None or not any(p.requires_grad for p in part.parameters()):
            return part
        return replicated(part, self.device, [name for name in unused if name in dict(part.named_parameters())], self._gradients)

    def after_step(self) -> None:
        if self._followed is not None:
            self._followed.after_step()

    def without_reduction(self, module: nn.Module) -> AbstractContextManager[Any]:
        return module.no_sync() if isinstance(module, DistributedDataParallel) else super().without_reduction(module)

    def evaluated(self, wrapped: nn.Module, plan: Plan) -> nn.Module:
        assert self._own is not None
        return self._own.module

    def batches(self, source: Iterator[Batch], count: int, *, training: bool) -> Iterator[Batch]:
        """The first stage takes batches from `source`; the others get what the stage before has computed from them."""
        self._left, self._training = count, training
        if training:
            self._began = time.perf_counter()
            for end in (self._inlet, self._outlet, self._followed):
                if end is not None:
                    end.reset()
        self._message = Message(())
        if self._inlet is None:
            yield from source
        else:
            for message in self._inlet.messages():
                self._message = message
                sample, target, *values = message.values
                yield Batch(sample, tuple(values), target)
        if self._outlet is not None:
            self._outlet.flush()

    def forward(self, call: Callable[..., Any], batch: Batch, *, targets: bool) -> tuple[Any, Tensor | None]:
        """This rank's modules on a batch; the last stage returns what `call` does, the others None and the sum of their local losses."""
        assert self._trained is not None
        part = self._trained
        if part.stream:
            begin_stream(part.stream)
        values = batch.input if isinstance(batch.input, tuple) else (batch.input.float() if self._features else batch.input,)
        result = call(*values, batch.target)
        if part.last:
            return result if targets else (result, None)
        self._hand_on(batch, result)
        if self._followed is not None:
            self._followed.catch_up()
        losses = [result[i] for i in part.losses]
        return None, torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)

    def infer(self, module: nn.Module, batch: Batch) -> Any:
        assert self._own is not None
        values = batch.input if isinstance(batch.input, tuple) else (batch.input,)
        result = module(*values, batch.target)
        if self._own.last:
            return result
        self._hand_on(batch, result)
        return None

    def _hand_on(self, batch: Batch, values: tuple[Any, ...]) -> None:
        """Sends what the next stage needs; flags come from the first one."""
        assert self._outlet is not None
        stop, last = self._message.stop, self._message.last
        if self._inlet is None:
            self._left -= 1
            ends_step = self._training and self._left % self.spec.accumulate == 0
            stop = self._stop(self._signum()) if ends_step else 0
            last = bool(stop) or not self._left
            self._message = Message((), stop, last)
        self._outlet.send(Message((batch.sample, batch.target, *values), stop, last))

    def _signum(self) -> int:
        """A stop signal that this rank has received; every `LOOK` seconds also one that another rank has reported; else 0."""
        if signum := self.signal():
            return signum
        if (now := time.monotonic()) < self._looked + LOOK:
            return 0
        self._looked = now
        return self.ranks.asked_to_stop()

    def requested(self, signum: int) -> int:
        if signum and not self.feeds:
            self.ranks.ask_to_stop(signum)
        return self._message.stop

    def times(self) -> list[dict[str, Any]]:
        """Numbers of the first module and of the one after the last; seconds of work, and of waiting for either neighbour; bytes sent."""
        receiving, sending, back = (end.waited if end is not None else 0.0 for end in (self._inlet, self._outlet, self._followed))
        work = time.perf_counter() - self._began - receiving - sending - back
        run, sent = self.runs[self.stage], sum(end.bytes for end in (self._outlet, self._followed) if end is not None)
        own: dict[str, Any] = {"modules": [run.start, run.stop], "work_seconds": work}
        own |= {"receive_seconds": receiving, "send_seconds": sending + back, "bytes": sent}
        return self.ranks.gather(own)

    def stopping(self) -> int:
        return int(self._peers.largest(self._signum()))

    def announce(self, value: Any) -> None:
        self.ranks.broadcast(value, self.ranks.count - 1)

    def announced(self) -> Any:
        return self.ranks.broadcast(None, self.ranks.count - 1)

    def gathered(self, state: Mapping[str, Any], module: nn.Module, *, keep: bool, everywhere: bool) -> dict[str, Any] | None:
        if self._followed is not None:
            self._followed.receive()  # of the step that has just ended: every rank is as far
        own = _on_cpu(state) if self._peers.first else None
        found = self.ranks.gather(own) if everywhere else self.ranks.collect(own)
        return _merged([of for of in found if of is not None], module.state_dict()) if found is not None else None

    def differing(self, buffers: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        by_rank = self.ranks.gather(self._peers.differing(buffers)[self._peers.number])
        replicas = self.spec.replicas
        return [{name: t for of in by_rank[replica::replicas] for name, t in of.items()} for replica in range(replicas)]

    def share(self, owned: Owned, names: Sequence[str]) -> None:
        """Gives every rank the values of these parameters, which the others train, in the plan's module."""
        mine = {name: p.detach() for name, p in owned.parameters().items() if name in set(names)}
        by_rank = self.ranks.gather(_on_cpu(mine))
        parameters = owned.whole_parameters()
        with torch.no_grad():
            for name, value in ((n, v) for rank, found in enumerate(by_rank) if rank != self.ranks.number for n, v in found.items()):
                parameters[name].copy_(value)

    def describe(self) -> str:
        return ", ".join(filter(None, (super().describe(), f"{self.ranks.count} ranks (modules)", self._transport.describe())))


def _on_cpu(value: Any) -> Any:
    """Nested state dicts with every tensor on the CPU."""
    if isinstance(value, Mapping):
        return {key: _on_cpu(item) for key, item in value.items()}
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _merged(states: Sequence[dict[str, Any]], whole: Mapping[str, Any]) -> dict[str, Any]:
    """One phase's state from those of all ranks: everything by name, in the order in which one process has it.

    `whole` is the state dict of the plan's module: no rank owns what the graph never reads, so it is as the phase began.
    """
    merged = dict(states[0])
    for kind in ("model", "ema"):
        if states[0][kind] is not None:
            found = {key: value for state in states for key, value in state[kind].items()}
            merged[kind] = {key: found.get(key, value) for key, value in whole.items()}
    parts = [state["optimizer"] for state in states]
    named = {kind: {name: part[kind][name] for part in parts for name in part[kind]} for kind in ("state", "groups")}
    merged["optimizer"] = {kind: {name: found[name] for name in sorted(found)} for kind, found in named.items()}
    return merged


def check_modules(plan: Plan, settings: TrainSpec, processes: int) -> None:
    """Raises RunError or PassError if a plan has no gradient-isolated modules, fewer than ranks, or some that depend on each other."""
    count, ranks = isolated_modules(plan.module), max(1, processes // settings.replicas)
    if count < max(2, ranks):  # perhaps later
        count = max(isolated_modules(phase.plan.module) for phase in plan.phases(settings.epochs))
    if count == 1:
        what = 'strategy = "modules" needs gradient-isolated modules, and this plan has none'
        raise RunError(what, where="train.strategy", fix='Add a supervise pass, or use strategy = "ddp"')
    if count < ranks:
        what = f"the plan has {count} gradient-isolated modules for {ranks} processes"
        raise RunError(what, where="train.strategy", fix=f"Start {count * settings.replicas} processes, or let supervise make more modules")
    singly(plan.module)
    if couples_parameters(settings.optimizer):
        what = f"a step of {settings.optimizer.name} on a parameter depends on other parameters, also those of other modules"
        raise RunError(what, where="train.optimizer", fix='Use an optimizer without a common norm (adamw, sgd, ...), or strategy = "ddp"')


def couples_parameters(spec: OptimizerSpec) -> bool:
    """Whether an optimizer steps otherwise with parameters apart than together: tried on six small ones."""

    def stepped(halves: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(3, *shape, generator=draw)) for shape in ((4,), (), (2, 2), (), (4,), (5,))]
        size = len(parameters) // halves
        groups = [nn.ParameterList(parameters[first : first + size]) for first in range(0, len(parameters), size)]
        optimizers = [build_optimizer(group, spec) for group in groups]
        for step in range(1, 7):
            for parameter in parameters:
                parameter.grad = step * torch.randn(parameter.shape, generator=draw)
            for optimizer in optimizers:
                optimizer.step()
        return [p.detach() for p in parameters]

    # Some compile their step, which takes longer than all else here.
    with torch.compiler.set_stance("force_eager"):
        return not all(map(torch.equal, stepped(1), stepped(2)))
