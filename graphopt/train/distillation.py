"""A teacher: a trained network whose outputs a run learns, beside the classes (Hinton et al., arXiv 1503.02531)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.compiler.plan import Plan
from graphopt.data.loader import Data
from graphopt.data.randomness import preserved
from graphopt.data.transforms import Transform
from graphopt.errors import RunError
from graphopt.models.build import build
from graphopt.spec import DistillSpec, TrainSpec
from graphopt.train.evaluation import traced_output

_WHERE = "train.distill"


class Teacher(nn.Module):
    """The teacher's part of the loss, from a batch and the outputs (N, classes) of the network that is trained.

    Soft: the divergence between both outputs' distributions at a temperature T, times T squared, the mean over samples. Hard: the
    cross-entropy with the teacher's best class (Touvron et al., arXiv 2012.12877). The teacher does not train.

    Args:
        network: (N, C, H, W) -> (N, classes).
        factor, offset: per channel, what turns the run's normalised images into the teacher's.
    """

    def __init__(self, network: nn.Module, spec: DistillSpec, factor: Sequence[float], offset: Sequence[float]) -> None:
        super().__init__()
        self.network, self.spec = network.eval().requires_grad_(False), spec
        self.factor: Tensor
        self.offset: Tensor
        for name, values in (("factor", factor), ("offset", offset)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def combined(self, loss: Tensor, images: Tensor, output: Tensor) -> Tensor:
        """The criterion's loss and the teacher's, with their weights."""
        return self.spec.task_weight * loss + self.spec.weight * self(images, output)

    def forward(self, images: Tensor, output: Tensor) -> Tensor:
        with torch.no_grad():
            goal = self.network(images * self.factor + self.offset)
        if self.spec.hard:
            return F.cross_entropy(output, goal.argmax(dim=1))
        mine, theirs = (F.log_softmax(scores / self.spec.temperature, dim=-1) for scores in (output, goal))
        return F.kl_div(mine, theirs, reduction="batchmean", log_target=True) * self.spec.temperature**2


def open_teacher(settings: TrainSpec, plan: Plan, data: Data, *, trust: bool = False) -> Teacher | None:
    """The teacher that the settings name, on the CPU; None if they name none.

    Raises RunError where a step has no images for it or no outputs, or its outputs are not as many as the network's; BackboneError and
    WeightsError as `graphopt.models.build`.
    """
    spec = settings.distill
    if spec is None:
        return None
    if settings.strategy == "modules":
        raise RunError('of strategy = "modules", no process has both images and outputs', where=_WHERE, fix="Use ddp or fsdp")
    if any(item.match.feature_options is not None for item in plan.matched):
        fix = 'Let the prefix run in every step (cache = "none")'
        raise RunError("a teacher takes images, which a step on cached features does not have", where=_WHERE, fix=fix)
    if any(item.instance.value.input(plan.sizes.full) != plan.sizes.full for item in plan.matched):
        raise RunError("a teacher takes images of one size, and a pass changes theirs", where=_WHERE, fix="Leave resize or distill out")
    with preserved():
        network = build(spec.source, spec.name, spec.arguments, weights=spec.weights, trust=trust)
    teacher = Teacher(network, spec, *_conversion(spec, data.train.transform))
    _check(teacher, plan)
    return teacher


def _conversion(spec: DistillSpec, transform: Any) -> tuple[list[float], list[float]]:
    """Per channel, the factor and the offset that turn images of the run's mean and deviation into those of the teacher's."""
    if spec.mean is None and spec.std is None:
        return [1.0], [0.0]
    if not isinstance(transform, Transform):
        raise RunError("mean and std of the run's images are not known", where=_WHERE, fix="Leave the teacher's mean and std out")
    mean, std = (values.flatten().tolist() for values in (transform.mean, transform.std))
    theirs = [list(spec.mean or mean), list(spec.std or std)]
    if any(len(values) != len(mean) for values in theirs):
        raise RunError(f"its mean and std are of {len(theirs[0])} and {len(theirs[1])} channels, images have {len(mean)}", where=_WHERE)
    pairs = list(zip(mean, std, *theirs, strict=True))
    return [s / t for _, s, _, t in pairs], [(m - n) / t for m, _, n, t in pairs]


def _check(teacher: Teacher, plan: Plan) -> None:
    """Raises RunError unless the teacher takes the network's images and has as many outputs."""
    classes = traced_output(plan).shape[1]
    try:
        found = teacher.network(torch.zeros(1, *plan.base.input))
    except Exception as error:  # of any network
        raise RunError(f"the teacher does not take images of {plan.base.input}: {error}", where=_WHERE) from error
    if not isinstance(found, Tensor) or tuple(found.shape) != (1, classes):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        what = f"the teacher's outputs are {shape}, the network's (1, {classes})"
        raise RunError(what, where=_WHERE, fix=f"Give it as many classes: arguments = {{ num_classes = {classes} }}")
