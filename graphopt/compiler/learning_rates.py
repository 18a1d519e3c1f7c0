"""Learning rates that passes set for their regions, over time."""

from collections.abc import Iterable
from dataclasses import dataclass

from graphopt.compiler.pipeline import Matched
from graphopt.compiler.triggers import LearningRate, RunSchedule
from graphopt.ir.paths import is_below


@dataclass(frozen=True)
class RegionRate:
    """The learning rate of one region, as one pass sets it.

    Attributes:
        name: of the pass and the region, one of a kind: `"1 freeze layer1"`.
        parameters: names of the region's parameters. paths: its module paths; what passes have added below them counts, too.
        rate: a function of the share of the run that is over and of the run's own schedule, as a factor of the base rate.
    """

    name: str
    parameters: frozenset[str]
    paths: tuple[str, ...]
    rate: LearningRate


@dataclass(frozen=True)
class LearningRates:
    """Every learning rate that passes set. A function of time alone, so that a resumed run needs nothing stored."""

    regions: tuple[RegionRate, ...] = ()

    @classmethod
    def of(cls, matched: Iterable[Matched]) -> "LearningRates":
        """Those that the passes of a plan set."""
        found = []
        for item in matched:
            value, match = item.instance.value, item.match
            regions = {region.name: region for region in match.regions}
            for name, rate in value.learning_rates(match.names).items():
                label = f"{item.instance.index + 1} {value.name} {name}"
                found.append(RegionRate(label, frozenset(regions[name].parameters), regions[name].paths, rate))
        return cls(tuple(found))

    def names(self, parameter: str) -> tuple[str, ...]:
        """The regions that a parameter lies in, in the order of their passes."""
        return tuple(r.name for r in self.regions if parameter in r.parameters or is_below(parameter, r.paths))

    def factor(self, names: Iterable[str], time: float, schedule: RunSchedule) -> float:
        """The learning rate after the share `time` of the run of what lies in these regions, as a factor of the base rate.

        Where several passes set it, each takes the rate of those before it for the run's own.
        """
        rates = {region.name: region.rate for region in self.regions}
        for name in names:
            schedule = _Rated(rates[name], schedule)
        return schedule(time)


@dataclass(frozen=True)
class _Rated:
    """A region's rate as a schedule of its own."""

    rate: LearningRate
    schedule: RunSchedule

    def __call__(self, time: float) -> float:
        return self.rate(time, self.schedule)
