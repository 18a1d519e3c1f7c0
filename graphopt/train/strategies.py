"""Which strategy a run has, by its spec and the processes that were started."""

from graphopt.errors import RunError
from graphopt.spec import TrainSpec
from graphopt.train.ranks import Ranks
from graphopt.train.strategy import Replicated, Strategy


def choose(spec: TrainSpec) -> Strategy:
    """The strategy of a spec, after all ranks have joined: alone `single`, with several ranks `ddp` where the spec says `auto`.

    Raises RunError for a device that is not there, a rank that is missing, or settings that the strategy cannot train with.
    """
    alone = Strategy.of(spec)
    ranks = Ranks.join(alone.device.type)
    if ranks.count == 1:  # an elastic run may shrink to one process
        return alone
    if spec.strategy == "single":
        fix = 'Start one process, or use strategy = "auto"'
        raise RunError(f'strategy = "single" is one process, {ranks.count} were started', where="train.strategy", fix=fix)
    if spec.strategy == "fsdp":
        from graphopt.train.fsdp import Sharded  # its part of torch takes a while to load

        return Sharded.of(spec).with_ranks(ranks)
    return Replicated.of(spec).with_ranks(ranks)
