"""Plans of small backbones, each of which is traced once: tests compile and train the same few networks hundreds of times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache

import torch
from torch import Tensor, nn

from graphopt import Pass, Plan
from graphopt.compiler.measure import measure_with
from graphopt.compiler.pipeline import Verify
from graphopt.compiler.plan import Source, compile_phase
from graphopt.driver import digest_of, prepare


def compiled(
    model: nn.Module, passes: Sequence[Pass], shape: tuple[int, ...], *, verify: Verify = "off", costs: bool = False, batch: int = 32
) -> Plan:
    """What `graphopt.compile` gives for a model that nobody changes in between."""
    source = _source(model, shape, verify != "off")
    digest = digest_of(passes, model, source.base.input)
    source = replace(source, digest=digest, batch=batch, measure=measure_with(batch))
    return compile_phase(source.with_passes(passes), verify=verify, costs=costs)


def compiled_anew(make: Callable[[], nn.Module], passes: Sequence[Pass], shape: tuple[int, ...], *, seed: int = 0) -> Plan:
    """What `graphopt.compile(make(), passes, input=shape, verify="off", costs=False)` gives right after `torch.manual_seed(seed)`.

    A run of it records no forecasts of its phases, which take a fifth of its time.
    """
    model, random = _made(make, seed)
    torch.set_rng_state(random)
    return replace(compiled(model, passes, shape), measure=None)


@lru_cache(256)
def _source(model: nn.Module, shape: tuple[int, ...], compare: bool) -> Source:
    return prepare(model, [], input=shape, compare=compare)


@cache
def _made(make: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return make(), torch.get_rng_state()
