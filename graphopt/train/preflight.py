"""What can be found wrong with a run before it begins: `train` stops at the first of it, `graphopt check` reports all."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphopt.compiler.plan import Plan
from graphopt.data.loader import Data, open_data
from graphopt.data.mixing import Mixer
from graphopt.driver import settle
from graphopt.errors import GraphoptError, RunError
from graphopt.hashing import hash_parts
from graphopt.ir.inputs import Input, show, tensors_of
from graphopt.spec import DataSpec, Spec, TrainSpec, dumps, load, loads
from graphopt.train import optimizer as optimizers
from graphopt.train.distillation import open_teacher
from graphopt.train.evaluation import check_output, traced_output
from graphopt.train.feature_cache.cache import FeatureCache
from graphopt.train.feature_cache.inputs import check_inputs
from graphopt.train.feeds import Feeds
from graphopt.train.modules import check_modules
from graphopt.train.ranks import Ranks
from graphopt.train.strategies import choose
from graphopt.train.strategy import Strategy


@dataclass(frozen=True)
class Inputs:
    """Where a run trains, and on what."""

    strategy: Strategy
    data: Data
    feeds: Feeds
    mixer: Mixer | None  # mixup and CutMix, if the spec asks for them

    @classmethod
    def open(cls, settings: TrainSpec, data: DataSpec | Data, input: Input, strategy: Strategy) -> Self:
        """Raises RunError for data that is missing or does not fit, a batch that is larger or does not divide, and several inputs."""
        (shape, dtype), *others = tensors_of(input)
        if others or dtype is not None:
            what = f"the runner gives a network one image, this one takes {show(input)}"
            raise RunError(what, where="input", fix="Train `plan.module`, called with all inputs, in a loop of your own")
        settings.micro_batch(strategy.peers.count)
        opened = data if isinstance(data, Data) else open_data(data, shape, settings.seed)
        if not len(opened.evaluation):
            raise RunError("there are no evaluation images", where="data")
        loading: dict[str, Any] = {"workers": data.workers if isinstance(data, DataSpec) else 0, "pin": strategy.device.type == "cuda"}
        loading |= {"rank": strategy.peers, "accumulate": settings.accumulate}
        feeds = Feeds(settings, opened, data if isinstance(data, DataSpec) else None, shape, loading)
        smoothing = settings.label_smoothing
        mixer = Mixer.of(data.augment, opened.classes, smoothing, settings.seed) if isinstance(data, DataSpec) else None
        return cls(strategy, opened, feeds, mixer)

    def outline(self, data: DataSpec | Data) -> str:
        """A hash of what makes samples of files, of their number and their targets; the files may lie elsewhere on each machine."""
        made = data.model_dump_json(exclude={"root", "workers", "cache"}) if isinstance(data, DataSpec) else ""
        return hash_parts(made.encode(), *(samples.outline().encode() for samples in (self.data.train, self.data.evaluation)))

    def features(self, folder: Path, digest: str, identity: Mapping[str, Any]) -> FeatureCache:
        """The run's cache of features; it touches no file before a phase needs it."""
        return FeatureCache(self.feeds.images, self.strategy, folder=folder, digest=digest, identity=identity, mixed=self.mixer is not None)


def check_outputs(plan: Plan, classes: int) -> None:
    """Raises RunError unless the backbone is a classifier of at least so many classes."""
    value = traced_output(plan)
    check_output(value, torch.empty(len(value)) if isinstance(value, Tensor) and value.ndim else torch.empty(0), classes)


def check_optimizer(plan: Plan, settings: TrainSpec, steps: int = 1) -> None:
    """Raises RunError unless timm knows the optimizer and the schedule, takes their options, and can step with them."""
    rates = optimizers.layer_rates(plan.backbone, settings.optimizer)
    optimizer = optimizers.build_optimizer(plan.module, settings.optimizer, rates=rates, regions=plan.learning_rates)
    schedule = optimizers.Schedule(optimizer, settings, steps, plan.learning_rates)
    for done in (0, settings.epochs * steps // 2, settings.epochs * steps - 1):
        schedule.set_step(done)
    probe = nn.ParameterList([nn.Parameter(torch.zeros(2, 2))])
    probe[0].grad = torch.zeros(2, 2)
    tried = optimizers.build_optimizer(probe, settings.optimizer)
    try:
        tried.step()
        tried.step()  # with the state of the first
    except Exception as error:
        what = f"{settings.optimizer.name} cannot step with these arguments: {error}"
        raise RunError(what, where="train.optimizer", fix="Check train.optimizer.arguments") from error


@cache
def version(name: str) -> str:
    """The version of an installed package; to find it takes as long as a small step."""
    return metadata.version(name)


def versions(title: str = "{}") -> dict[str, str]:
    """The versions of what computes a step, by the names of the packages, in the words of `title`."""
    found = {"torch": torch.__version__, **{name: version(name) for name in ("torchvision", "timm", "graphopt")}}
    return {title.format(name): number for name, number in found.items()}


def code(backbone: nn.Module) -> dict[str, str]:
    """Digests of the source files that compute a step, by the names of their modules: the backbone's, and what is loaded of graphopt."""
    names = {type(module).__module__ for module in backbone.modules()} | {name for name in sys.modules if name.startswith("graphopt.")}
    found = {name: _file_digest(getattr(sys.modules.get(name), "__file__", None)) for name in sorted(names)}
    return {f"the code of {name}": digest for name, digest in found.items() if digest is not None}


@cache
def _file_digest(file: str | None) -> str | None:
    """Of a file whose code is loaded, if it is one: what is written to it later does not count."""
    return hash_parts(Path(file).read_bytes()) if file and Path(file).is_file() else None


def check_images(plan: Plan, settings: TrainSpec, inputs: Inputs) -> None:
    """Raises RunError unless images can be prepared as every phase that is foreseen needs them, and features of them cached."""
    asked = [item for item in plan.matched if item.instance.value.input(plan.sizes.full) != plan.sizes.full]
    if asked:
        for phase in plan.phases(settings.epochs):
            data, cut = inputs.feeds.prepared(phase.plan.base.input, phase.plan.needs.images), phase.plan.needs.features
            if cut is not None:
                check_inputs(data.train, cut.options, mixed=inputs.mixer is not None)


def check_strategy(plan: Plan, settings: TrainSpec, ranks: int = 1) -> None:
    """Raises GraphoptError unless so many processes can train the plan by the strategy that the settings name."""
    if plan.compared and settings.strategy in ("fsdp", "modules"):
        what = f"a trigger compares the outputs of {plan.compared[0]}, of which each process has only a part"
        raise RunError(what, where="train.strategy", fix='Use strategy = "ddp", or another score')
    if settings.strategy == "modules":
        check_modules(plan, settings, ranks)


def problems(plan: Plan, settings: TrainSpec, data: DataSpec | Data, *, trust: bool = False) -> Iterator[GraphoptError]:
    """Everything for which `train` would refuse a run of this plan before its first step; with `trust`, a teacher's code is run."""
    steps = 1
    try:
        inputs = Inputs.open(settings, data, plan.sizes.full, choose(settings))
        steps = len(inputs.feeds.images) // settings.accumulate
        check_outputs(plan, inputs.data.classes)
        inputs.features(Path(), "", {}).check(plan)
        check_images(plan, settings, inputs)
        open_teacher(settings, plan, inputs.data, trust=trust)
    except GraphoptError as error:
        yield error
    try:
        check_optimizer(plan, settings, steps)
        check_strategy(plan, settings)
    except GraphoptError as error:
        yield error


def settled(spec: Spec, settings: TrainSpec, folder: Path, ranks: Ranks, *, trust: bool) -> Spec:
    """The spec, settled: as the run in `folder` began with it, else by what rank 0 measures for these settings; the same on all ranks."""
    if spec.settled:
        return spec
    found = spec.model_copy(update={"train": settings})
    if ranks.first:
        with suppress(GraphoptError):  # nothing has begun there
            begun = load(folder / "spec.toml", trust=trust)
            found = begun if begun.settles(spec) else found
        found = settle(found, trust=trust)
    return spec.with_passes(loads(ranks.broadcast(dumps(found)), trust=trust).passes)
