"""Which gradient-isolated modules each rank of a chain trains: what each takes of a step, forecast by the rates of this machine."""

from graphopt.compiler.parts import isolated_modules
from graphopt.compiler.plan import Plan
from graphopt.compiler.stages import Stage, every_module, stages
from graphopt.cost import Cost, Rates
from graphopt.cost.partition import assign
from graphopt.cost.rates import rates_of
from graphopt.errors import CostError
from graphopt.spec import TrainSpec


def runs_of(plan: Plan, train: TrainSpec, ranks: int) -> tuple[range, ...]:
    """The modules of each of so many ranks, in the order of the chain. Ranks take them from one of them, as they do the seconds."""
    count = isolated_modules(plan.module)
    return assign(seconds_of(plan, train) if count > ranks else [1.0] * count, ranks)


def one_chain(train: TrainSpec) -> TrainSpec:
    """The settings of one of several chains side by side: its share of the batch."""
    return train.model_copy(update={"batch": max(1, train.batch // train.replicas), "replicas": 1})


def seconds_of(plan: Plan, train: TrainSpec, rates: Rates | None = None) -> list[float]:
    """The seconds that a step of each module of a phase takes; without a forecast, all take as long.

    No two measurements of `rates` are equal: where several ranks have to agree, one of them calls this. What lies before cached features
    takes no time.
    """
    runs = every_module(plan)
    try:
        rates, found = rates or rates_of(train.device, train.amp, train.channels_last), stages(plan, runs, train.micro_batch(), train.amp)
        return [rates.seconds(step_of(stage, train)) for stage in found]
    except CostError:
        return [1.0] * len(runs)


def step_of(stage: Stage, train: TrainSpec) -> Cost:
    """The cost of a stage's step of `train`."""
    return stage.forecast(train.batch, **train.forecast_options())
