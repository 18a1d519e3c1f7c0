"""Entry point of training: one loop for all plans, which knows no pass by name."""

import os
from contextlib import closing
from typing import Any

import torch
from rich.console import Console

from graphopt.compiler.plan import Plan
from graphopt.data.loader import Data, ImageFeed, Mixer, open_data
from graphopt.driver import build_backbone, compile
from graphopt.errors import RunError
from graphopt.spec import DataSpec, Spec, TrainSpec, dumps
from graphopt.train.checkpoint import Checkpointer
from graphopt.train.feature_cache.cache import FeatureCache
from graphopt.train.metrics import MetricsLog
from graphopt.train.phase import RunContext
from graphopt.train.run import Run
from graphopt.train.run_folder import RunFolder
from graphopt.train.run_log import RunLog
from graphopt.train.screen import Screen
from graphopt.train.settings import resume_settings
from graphopt.train.state import RunState, Summary
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
    """Trains a spec, or a plan compiled by hand, into the folder `out`.

    Args:
        resume: continue the run in `out` (or start it, where there is none yet). The result is bit-identical on the CPU.
        trust: let the spec run Python code that it names.
        settings, data: for a plan without a spec; otherwise they replace those of the spec.
        tensorboard: write event files under `out/tensorboard` as well.
        console: where progress is shown; None is silent.

    Raises:
        GraphoptError: the spec, the data or the folder is wrong, the loss is not finite, or one of these checks fails: the optimizer holds
            exactly the trainable parameters; these have finite gradients, frozen ones none; frozen tensors do not change.
        Stopped: Ctrl-C or SIGTERM, after writing a checkpoint.
    """
    plan, spec = (None, what) if isinstance(what, Spec) else (what, what.spec)
    settings = settings or (spec.train if spec is not None else TrainSpec())
    data = data or (spec.data if spec is not None else DataSpec())
    strategy = Strategy.of(settings)
    # Missing files are the most common mistake: the data is opened before a folder is made or anything is compiled.
    shape = plan.base.input if plan is not None else spec.backbone.input
    opened = data if isinstance(data, Data) else open_data(data, shape, settings.seed)
    images, evaluation = _feeds(opened, data, settings, strategy)
    digest, text = (plan.digest if plan is not None else spec.digest), (dumps(spec) if spec is not None else "")
    folder = RunFolder.claim(out, digest, text, resume=resume)
    try:
        with strategy.kernels(), StopSignals() as signals:
            checkpointer = Checkpointer(folder, text, resume_settings(settings, data), settings.keep)
            saved = checkpointer.load() if resume else None
            plan = plan or _compiled(spec, settings.seed, trust, weights=saved is None)
            mixer = Mixer.of(data.augment, opened.classes, settings.label_smoothing, settings.seed) if isinstance(data, DataSpec) else None
            features = FeatureCache(
                images,
                strategy,
                folder=folder.path / "features",
                digest=digest,
                identity={"data": _identity(data), "seed": settings.seed},
                mixed=mixer is not None,
            )
            context = RunContext(settings, strategy, images, evaluation, opened.classes, mixer, features)
            state = checkpointer.restore(saved, plan, context) if saved is not None else RunState.initial(plan, context)
            board = folder.path / "tensorboard" if tensorboard else None
            offset = saved["metrics_offset"] if saved is not None else 0
            with closing(MetricsLog(folder.metrics, offset=offset, tensorboard=board, step=state.progress.total)) as metrics:
                log = RunLog(state, metrics, Screen(console, settings.epochs), strategy)
                if saved is not None:
                    log.resumed()
                else:
                    log.phase(state.phase.plan.decisions)
                features.check(plan)
                return Run(context, state, log, checkpointer, signals).run()
    finally:
        folder.release()


def _compiled(spec: Spec, seed: int, trust: bool, weights: bool) -> Plan:
    torch.manual_seed(seed)
    model = build_backbone(spec.backbone, trust=trust, weights=weights)
    return compile(model, spec, verify=spec.verify or "fast", costs=False, trust=trust)


def _feeds(data: Data, spec: DataSpec | Data, settings: TrainSpec, strategy: Strategy) -> tuple[ImageFeed, ImageFeed]:
    """The training and the evaluation batches."""
    common: dict[str, Any] = {
        "workers": spec.workers if isinstance(spec, DataSpec) else 0,
        "pin": strategy.device.type == "cuda",
        "rank": strategy.rank,
    }
    train = ImageFeed(data.train, settings.batch, seed=settings.seed, accumulate=settings.accumulate, **common)
    if not len(data.evaluation):
        raise RunError("there are no evaluation images", where="data")
    return train, ImageFeed(data.evaluation, settings.batch, shuffle=False, **common)


def _identity(data: DataSpec | Data) -> dict[str, Any]:
    """Everything that determines the inputs of training, as plain values."""
    return data.model_dump(mode="json", exclude={"workers"}) if isinstance(data, DataSpec) else {}
