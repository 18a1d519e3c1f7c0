"""The runner's door: one loop for all plans. It knows no pass by name; structure comes from (spec, decisions) and nothing else."""

from __future__ import annotations

import os
from typing import Any

import torch
from rich.console import Console

from graphopt.compiler.plan import Plan
from graphopt.data.loader import Data, ImageFeed, Mixer, open_data
from graphopt.errors import RunError
from graphopt.spec import DataSpec, Spec, TrainSpec, dumps
from graphopt.train.checkpoint import RunFolder
from graphopt.train.feature_cache.cache import Keeper
from graphopt.train.phase import Setting
from graphopt.train.run import Run, Summary
from graphopt.train.screen import Screen
from graphopt.train.settings import settings_table
from graphopt.train.stopping import StopSignals
from graphopt.train.strategy import Strategy


def train(
    what: Spec | Plan,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    trust: bool = False,
    settings: TrainSpec | None = None,
    data: DataSpec | Data | None = None,
    tensorboard: bool = False,
    console: Console | None = None,
) -> Summary:
    """Train a spec, or a plan compiled by hand, into the folder `out`.

    Args:
        resume: continue the run in `out` (or start it, where there is none yet). The result is bit-identical on the CPU.
        trust: let the spec run Python code that it names.
        settings, data: for a plan without a spec; otherwise they take the place of the spec's.
        tensorboard: write event files under `out/tensorboard` as well.
        console: where progress goes; None is silent.

    Raises:
        GraphoptError: the spec, the data or the folder is not as it must be; R1, R2 or R4 is broken; the loss is not finite.
        Stopped: Ctrl-C or SIGTERM, after writing a checkpoint.
    """
    plan, spec = (None, what) if isinstance(what, Spec) else (what, what.spec)
    settings = settings or (spec.train if spec is not None else TrainSpec())
    data = data or (spec.data if spec is not None else DataSpec())
    strategy = Strategy.of(settings)
    # Files are looked for before a folder is made or anything compiled: that they are missing is the commonest mistake.
    shape = plan.base.input if plan is not None else spec.backbone.input
    opened = data if isinstance(data, Data) else open_data(data, shape, settings.seed)
    feeds = _feeds(opened, data, settings, strategy)
    digest, text = (plan.digest if plan is not None else spec.digest), (dumps(spec) if spec is not None else "")
    folder = RunFolder.claim(out, digest, text, resume=resume)
    try:
        with strategy.kernels(), StopSignals() as signals:
            state = folder.load() if resume else None
            if plan is None:
                torch.manual_seed(settings.seed)
                plan = _compile(spec, trust, weights=state is None)
            mixer = _mixer(data, opened, settings)
            keeper = Keeper(
                opened.train,
                feeds[0],
                strategy,
                folder=folder.path / "features",
                digest=digest,
                identity={"data": _transform_of(data), "seed": settings.seed},
                batch=settings.batch,
                seed=settings.seed,
                workers=data.workers if isinstance(data, DataSpec) else 0,
                mixed=mixer is not None,
            )
            run = Run(
                plan,
                Setting(settings, strategy, feeds[0], opened.classes, keeper),
                feeds[1],
                mixer,
                folder,
                spec=text,
                settings=settings_table(settings, data),
                screen=Screen(console, settings.epochs),
                signals=signals,
                tensorboard=tensorboard,
                state=state,
            )
            return run.run()
    finally:
        folder.release()


def _compile(spec: Spec, trust: bool, weights: bool) -> Plan:
    from graphopt.driver import build_backbone as build
    from graphopt.driver import compile

    model = build(spec.backbone, trust=trust, weights=weights)
    return compile(model, spec, verify=spec.verify or "fast", costs=False, trust=trust)


def _feeds(data: Data, spec: DataSpec | Data, settings: TrainSpec, strategy: Strategy) -> tuple[ImageFeed, ImageFeed]:
    """The training and the evaluation batches."""
    common: dict[str, Any] = {
        "workers": spec.workers if isinstance(spec, DataSpec) else 0,
        "pin": strategy.device.type == "cuda",
        "rank": strategy.rank,
        "world": strategy.world,
    }
    train = ImageFeed(data.train, settings.batch, seed=settings.seed, accumulate=settings.accumulate, **common)
    if not len(data.evaluation):
        raise RunError("there are no evaluation images", where="data")
    return train, ImageFeed(data.evaluation, settings.batch, shuffle=False, **common)


def _transform_of(data: DataSpec | Data) -> dict[str, Any]:
    """What makes inputs of the images, as plain values."""
    return data.model_dump(mode="json", exclude={"workers"}) if isinstance(data, DataSpec) else {}


def _mixer(spec: DataSpec | Data, data: Data, settings: TrainSpec) -> Mixer | None:
    if not isinstance(spec, DataSpec):
        return None
    return Mixer.of(spec.augment, data.classes, settings.label_smoothing, settings.seed)
