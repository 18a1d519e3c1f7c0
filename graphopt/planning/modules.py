"""What each rank of a chain needs, takes and sends, where every rank trains some of a plan's gradient-isolated modules."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from graphopt.compiler.parts import split
from graphopt.compiler.plan import Plan
from graphopt.compiler.stages import Stage, stages
from graphopt.compiler.triggers import Decision
from graphopt.cost import Cost, Rates
from graphopt.cost.partition import assign
from graphopt.spec import TrainSpec
from graphopt.train.assignment import one_chain, seconds_of, step_of
from graphopt.train.following import followed_weights
from graphopt.train.link import DEPTH
from graphopt.train.modules import check_modules

#: bytes that a sample's number and its class take in a message
SAMPLE = 16


@dataclass(frozen=True)
class ChainRank:
    """One rank in a phase.

    Attributes:
        rank: its number; the chain begins at the highest. modules: those that it trains, from 0.
        seconds: of a step, all micro-batches, forward to update. step: its cost, link aside.
        messages, sent_bytes: that it sends in a step, to the next rank, and of weights that earlier modules follow (lookahead) to theirs;
            the heads of messages are not counted.
        link_bytes: the most that lies in messages which wait to be taken, here or by the next rank.
    """

    rank: int
    modules: range
    seconds: float
    step: Cost = field(repr=False)
    messages: int
    sent_bytes: int
    link_bytes: int
    accumulate: int

    @property
    def held_bytes(self) -> int:
        """The peak of its step."""
        return self.step.peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; modules count from 1."""
        plain = {name: getattr(self, name) for name in ("rank", "seconds", "held_bytes", "link_bytes", "messages", "sent_bytes")}
        return {**plain, "modules": [number + 1 for number in self.modules], "peak_parts": self.step.peak_parts}


@dataclass(frozen=True)
class ChainPhase:
    """One phase: its start and its length in epochs, and its ranks in the order of the chain; and a step of one process that does all."""

    epoch: float
    epochs: float
    ranks: tuple[ChainRank, ...]
    alone: ChainRank

    def step_seconds(self, link: int | None = None) -> float:
        """Between two steps: as long as the slowest rank takes, or the largest message at `link` bytes per second."""
        return max(max(r.seconds, r.sent_bytes / link if link else 0.0) for r in self.ranks)

    @property
    def fill_seconds(self) -> float:
        """What a run of batches takes beyond its steps: until the first micro-batch is through, all but the slowest rank's time."""
        seconds = [r.seconds / r.accumulate for r in self.ranks]
        return sum(seconds) - max(seconds)


@dataclass(frozen=True)
class ChainCost:
    """A run on a chain of ranks. `micro_batch` are the samples that go through the network at once, `accumulate` times a step."""

    batch: int
    micro_batch: int
    accumulate: int
    rates: Rates
    phases: tuple[ChainPhase, ...]

    def to_dict(self, link: int | None = None) -> dict[str, Any]:
        """Plain values, for JSON; `link` is a rate in bytes per second."""
        names = ("batch", "micro_batch", "accumulate")
        about = {"strategy": "modules", "ranks": len(self.phases[0].ranks), "error": self.rates.error}
        return {**about, **{name: getattr(self, name) for name in names}, "phases": [self._phase(phase, link) for phase in self.phases]}

    def _phase(self, phase: ChainPhase, link: int | None) -> dict[str, Any]:
        seconds = phase.step_seconds(link)
        return {
            "epoch": phase.epoch,
            "epochs": phase.epochs,
            "chain": [rank.to_dict() for rank in phase.ranks],
            "step_seconds": seconds,
            "images_per_second": self.batch / seconds if seconds else None,
            "fill_seconds": phase.fill_seconds,
            "seconds_alone": phase.alone.seconds,
            "held_bytes_alone": phase.alone.held_bytes,
        }


def forecast_chain(plan: Plan, train: TrainSpec, *, ranks: int, rates: Rates, decisions: Sequence[Decision] | None = None) -> ChainCost:
    """The cost of each rank of a run with `strategy = "modules"` that starts with `plan`, in its first phase. Starts no process.

    Of several chains side by side, it is that of one, without the averaging of gradients.

    `decisions` are those of a finished run; by default those that can be foreseen. Raises RunError for a plan with fewer modules than
    ranks, PassError if modules share what they train, CostError if a step cannot be forecast.
    """
    check_modules(plan, train, ranks)
    one, length = one_chain(train), ranks // train.replicas
    phases = []
    for start, end, _, current in plan.phases(train.epochs, decisions):
        seconds = seconds_of(current, one, rates)
        (alone,), chain = _chain(current, assign(seconds, 1), train, rates), _chain(current, assign(seconds, length), one, rates)
        phases.append(ChainPhase(start, end - start, chain, alone))
    return ChainCost(train.batch, train.micro_batch(), train.accumulate, rates, tuple(phases))


def _chain(plan: Plan, runs: Sequence[range], train: TrainSpec, rates: Rates) -> tuple[ChainRank, ...]:
    found = stages(plan, runs, train.micro_batch(), train.amp)
    back: list[list[int]] = [[] for _ in found]
    for (owner, _), weights in followed_weights(split(plan.module, runs)).items():
        back[owner].append(sum(w.nbytes for w in weights))
    return tuple(_rank(stage, len(runs) - 1 - place, back[place], train, rates) for place, stage in enumerate(found))


def _rank(stage: Stage, rank: int, back: Sequence[int], train: TrainSpec, rates: Rates) -> ChainRank:
    """`back` are the bytes of weights that go to each rank with modules that follow this one's."""
    step, also = step_of(stage, train), SAMPLE * train.micro_batch()
    sent = 0 if stage.part.last else stage.sent_bytes + also
    received = 0 if stage.first else stage.received_bytes + also
    return ChainRank(
        rank=rank,
        modules=stage.modules,
        seconds=rates.seconds(step),
        step=step,
        messages=train.accumulate * bool(sent) + len(back),
        sent_bytes=train.accumulate * sent + sum(back),
        # A message that this step has sent, or computes with, is counted in the step.
        link_bytes=DEPTH * received + (DEPTH - 1) * sent,
        accumulate=train.accumulate,
    )
