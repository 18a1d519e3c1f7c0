"""Which strategy a run has, by its spec and the processes that were started."""

from typing import cast

from graphopt.errors import RunError
from graphopt.spec import TrainSpec
from graphopt.train.modules import Modular
from graphopt.train.ranks import Ranks
from graphopt.train.strategy import Replicated, Strategy


def choose(spec: TrainSpec) -> Strategy:
    """The strategy of a spec, after all ranks have joined: alone `single`, with several ranks `ddp` where the spec says `auto`.

    Raises RunError for a device that is not there, a rank that is missing, or settings that the strategy cannot train with.
    """
    ranks = Ranks.join(spec.timeout)
    try:
        alone, several = Strategy.of(spec), cast(Strategy, Replicated.of(spec))
        if spec.strategy == "modules":
            several = Modular.of(spec)
        if spec.strategy == "fsdp":  # what it refuses, one process refuses too, so that `check` finds it
            from graphopt.train.fsdp import Sharded  # its part of torch takes a while to load

            several = Sharded.of(spec)
        if ranks.count == 1:  # an elastic run may shrink to one process
            return alone
        if spec.strategy == "single":
            fix = 'Start one process, or use strategy = "auto"'
            raise RunError(f'strategy = "single" is one process, {ranks.count} were started', where="train.strategy", fix=fix)
        return several.with_ranks(ranks.connected(several.device_of(ranks)))
    except Exception as error:
        raise ranks.reported(error) from error.__cause__
