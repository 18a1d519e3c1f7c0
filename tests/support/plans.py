"""Plans of small backbones, each of which is traced once: tests train hundreds of runs of the same few networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from graphopt import Pass, Plan
from graphopt.compiler.plan import Source, compile_phase
from graphopt.driver import digest_of, prepare


def compiled(make: Callable[[], nn.Module], passes: Sequence[Pass], shape: tuple[int, ...], *, seed: int = 0) -> Plan:
    """What `graphopt.compile(make(), passes, input=shape, verify="off", costs=False)` gives right after `torch.manual_seed(seed)`."""
    source, random = _source(make, shape, seed)
    torch.set_rng_state(random)
    digest = digest_of(passes, source.backbone, source.base.input)
    return compile_phase(replace(source.with_passes(passes), digest=digest), verify="off", costs=False)


@cache
def _source(make: Callable[[], nn.Module], shape: tuple[int, ...], seed: int) -> tuple[Source, Tensor]:
    torch.manual_seed(seed)
    source = prepare(make(), [], input=shape, compare=False)
    return source, torch.get_rng_state()
