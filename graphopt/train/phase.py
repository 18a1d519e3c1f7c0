"""One phase: what is built again at every decision, and the training step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]  # re-exported without saying so
from torch import Tensor, nn

from graphopt.compiler.parts import parameters_by_module
from graphopt.compiler.pipeline import Verify
from graphopt.compiler.plan import Plan
from graphopt.compiler.triggers import Decision, step_at
from graphopt.data.loader import Batch, Feed, ImageFeed
from graphopt.data.mixing import Mixer
from graphopt.data.randomness import mixed_seed, preserved, reseed
from graphopt.hashing import content_digest
from graphopt.runtime.randomness import set_seeds
from graphopt.runtime.shards import is_sharded, local, local_like, whole_state
from graphopt.runtime.sync_norm import synchronize
from graphopt.spec import TrainSpec
from graphopt.train import optimizer as optimizers
from graphopt.train.checks import check_frozen, check_gradients, fingerprints, not_finite
from graphopt.train.distillation import Teacher
from graphopt.train.evaluation import Meter, check_output, count_correct
from graphopt.train.feature_cache.cache import FeatureCache
from graphopt.train.feeds import Feeds
from graphopt.train.loss import Criterion
from graphopt.train.similarity import IMAGES, similarities
from graphopt.train.strategy import Strategy

#: weight of an auxiliary classifier's loss where a backbone returns several outputs in training (GoogLeNet, Inception)
AUXILIARY_WEIGHT = 0.3
#: in float16, how many of the first steps may overflow while the scaler lowers its scale
MAX_OVERFLOWS = 50


@dataclass(frozen=True)
class RunContext:
    """What all phases of a run share."""

    spec: TrainSpec
    strategy: Strategy
    feeds: Feeds  # of images
    classes: int
    mixer: Mixer | None  # mixup and CutMix, if the spec asks for them
    features: FeatureCache  # caches what a prefix that has left the graph computes
    teacher: Teacher | None = None  # on the device


def advance(
    plan: Plan,
    decisions: Sequence[Decision],
    seed: int,
    epoch: float,
    state: Mapping[str, Tensor] | None = None,
    *,
    verify: Verify = "fast",
) -> Plan:
    """The plan after further decisions. What passes initialise is a function of (seed, epoch), so that a resumed run does the same.

    `state` is the module's, where ranks hold parts of it.
    """
    with preserved():
        reseed(seed, int(epoch), 2, *([] if epoch == int(epoch) else float(epoch).as_integer_ratio()))
        return plan.advance_to((*plan.decisions, *decisions), state=state, verify=verify)


class Step(NamedTuple):
    """What one optimizer step has computed, on the device: means over its samples, and sums.

    Attributes:
        total: the loss that was trained, local losses included. task: the criterion's part of it, of auxiliary classifiers too.
        correct: how many predictions were right. samples: none where another rank computes the output.
    """

    total: Tensor
    task: Tensor
    correct: Tensor
    samples: int

    def add_to(self, *meters: Meter) -> None:
        """Adds the figures of its samples."""
        if self.samples:
            task, total = self.task.double(), self.total.double()
            sums = Meter.sums_of(loss=task * self.samples, local=(total - task) * self.samples, correct=self.correct)
            for meter in meters:
                meter.add(self.samples, sums)


class AveragedWeights(ModelEmaV3):
    """timm's moving averages, each rank's of the parts that it holds."""

    def _foreach_lerp_(self, ema_values: list[Tensor], model_values: list[Tensor], weight: float) -> None:
        # What lies in front of cached features is whole in the network, and sharded in its average.
        parts = [local_like(own, average) for own, average in zip(model_values, ema_values, strict=True)]
        super()._foreach_lerp_([local(t) for t in ema_values], parts, weight)


class Phase:
    """A plan between two decisions, on its device, with its optimizer, schedule and averaged weights."""

    def __init__(self, plan: Plan, context: RunContext, *, earlier: "Phase | None" = None, state: Mapping[str, Any] | None = None) -> None:
        """`state` is the earlier phase's `state_dict()`."""
        self.plan, self.context = plan, context
        self.spec, self.strategy = spec, strategy = context.spec, context.strategy
        if spec.sync_norm and strategy.peers == strategy.ranks:  # a rank of a chain has whole batches
            synchronize(plan.module, strategy.device)
        self.owned = strategy.own(plan)
        strategy.to_device(self.owned.module)
        context.feeds.use(plan.base.input, plan.needs.images)
        context.features.use(context.feeds.images)
        self.feed: Feed = context.feeds.images
        same = earlier is not None and (earlier.plan.base.input, earlier.plan.needs.images) == (plan.base.input, plan.needs.images)
        self.features: dict[str, Any] = dict(earlier.features) if earlier is not None and same else {}  # what the feature cache has decided
        self._trained: nn.Module = plan.module
        self._wrapped: nn.Module = self._trained  # as a step calls it on several ranks
        self._call: Callable[..., Any] | None = None
        self._modules: tuple[frozenset[str], ...] = ()  # names of each module's parameters, where each is clipped by its own norm
        self.steps = len(self.feed) // spec.accumulate  # of the optimizer, per epoch
        self._optimize(state)
        self.scaler: torch.amp.GradScaler = earlier.scaler if earlier is not None else strategy.scaler()
        self.ema = AveragedWeights(self.owned.module, decay=spec.ema, use_warmup=spec.ema_warmup) if spec.ema is not None else None
        if self.ema is not None and state is not None and state["ema"] is not None:
            own, earlier_ema = self.owned.state_dict(self.ema.module), state["ema"]
            carried = {k: earlier_ema[k] if k in earlier_ema and earlier_ema[k].shape == v.shape else v for k, v in own.items()}
            self.owned.load(carried, self.ema.module)
        self.criterion = Criterion(spec).to(strategy.device)
        self.frozen = fingerprints(plan.module)
        # Buffers may hold infinity on purpose, masks for example.
        self._infinite = set(not_finite(dict(self.owned.module.named_buffers())))
        # Adaptive clipping leaves out the last linear layer (Brock et al., arXiv 2102.06171, section 4.1).
        self._unclipped = optimizers.head_parameters(plan.backbone) if spec.clip_mode == "agc" else frozenset()
        self.gradients_checked = False
        self._overflows = 0
        self._first_step = strategy.ranks.count > 1  # since this process has begun the phase

    def next(self, decisions: Sequence[Decision], epoch: float) -> "Phase":
        """The phase after `decisions`, with weights, optimizer state and averages carried over by name."""
        self.close()
        self.average_buffers()  # within an epoch; at its end that has been done
        state = self.state_dict(everywhere=True)
        return Phase(advance(self.plan, decisions, self.spec.seed, epoch, state["model"]), self.context, earlier=self, state=state)

    def _optimize(self, state: Mapping[str, Any] | None) -> None:
        """Makes the optimizer of the parameters that there are now, and its schedule; `state` is the earlier phase's."""
        plan, spec = self.plan, self.spec
        owned = None if self.owned.module is plan.module else self._parameters()
        self.optimizer = optimizers.optimizer_of(plan, spec.optimizer, owned)
        if state is not None:
            optimizers.load_optimizer_state(self.optimizer, plan.module, state["optimizer"], state["model"])
        self.schedule = optimizers.Schedule(self.optimizer, spec, self.steps, plan.learning_rates)

    def moments(self) -> list[tuple[float, int]]:
        """When triggers that need no measurement may fire: in epochs, and after how many steps of the run."""
        return [(moment, step_at(moment, self.steps)) for moment in self.plan.moments(self.spec.epochs)]

    def end(self, epoch: int, done: int) -> int:
        """The step of an epoch before which the next trigger may fire, after `done` steps of the run; its last step at the latest."""
        return min([self.steps, *(step - epoch * self.steps for _, step in self.moments() if step > done)])

    def close(self) -> None:
        check_frozen(self.plan.module, self.frozen)

    def begin(self, epoch: int = 0) -> bool:
        """Does what needs the phase's weights: caches the features that it trains on from `epoch` on, and compiles.

        False where that is done already.
        """
        if self._call is not None:
            return False
        self.strategy.expect(slow=True)
        self.feed, self._trained, self.features = self.context.features.prepare(self.plan, self.features, epoch)
        before, state = self._parameters(), optimizers.optimizer_state(self.optimizer, self.plan.module)
        self._wrapped = self.strategy.wrap(self._trained, self.plan, self._unused())
        after = self._parameters()
        if any(after[name] is not before[name] for name in before):
            self._optimize(None)
            # After the schedule, which begins anew: a checkpoint before the next step has the rates that were reached.
            optimizers.load_optimizer_state(self.optimizer, self.plan.module, self.strategy.to_shards(state, after))
        if self.ema is not None:
            self.strategy.wrap_average(self.ema.module, self.plan)
        self._call = self.strategy.callable(self._wrapped)
        return True

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Those that this rank trains, by their names in the plan's module."""
        return self.owned.parameters()

    def _unused(self) -> list[str]:
        """Trainable parameters of the trained part that no forward reads, by their names there."""
        unused = {id(p) for name, p in optimizers.named_parameters(self.plan.module).items() if name in self.plan.report.unused}
        return [name for name, p in self._trained.named_parameters(remove_duplicate=False) if id(p) in unused]

    def evaluated(self) -> dict[str, nn.Module]:
        """The networks that an evaluation calls with images, by the prefix of their figures: the trained one, and the averaged one."""
        modules = {"": self.strategy.evaluated(self._wrapped, self.plan)}
        return modules | ({"ema_": self.ema.module} if self.ema is not None else {})

    def train_mode(self) -> None:
        """Puts the whole network into training mode, and the part that is trained on cached features."""
        self.plan.module.train()
        self._trained.train()
        self._wrapped.train()

    def step(self, batches: Iterator[Batch], done: int) -> "Step":
        """One optimizer step after `done` ones, over the next `accumulate` batches on the device."""
        count = self.spec.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        reseed(self.spec.seed, 3, done, of_torch=False)  # what a user's network may draw from; torch's generators are set below
        total = task = correct = torch.zeros((), device=self.strategy.device)
        samples = 0
        for number, batch in zip(range(count), batches, strict=False):
            seed = self.spec.seed, done, number
            set_seeds(partial(mixed_seed, *seed, 4), mixed_seed(*seed, 5, self.strategy.peers.number))
            last = number + 1 == count
            with nullcontext() if last else self.strategy.without_reduction(self._wrapped):
                with self.strategy.autocast():
                    loss, criterion, output = self._loss(batch)
                if loss.requires_grad:
                    self.scaler.scale(loss / count).backward()
            total = _added(total, loss.detach(), count)
            if output is not None:
                task = _added(task, criterion.detach(), count)
                correct = correct + count_correct(output, batch.target)
                samples += len(batch.target)
        self.strategy.after_backward()
        self.scaler.unscale_(self.optimizer)
        self._check_gradients_once()
        if self.spec.clip is not None:
            self._clip(self.spec.clip, self.spec.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.strategy.after_step()
        set_seeds(None, None)
        if self.ema is not None:
            self.ema.update(self.owned.module, step=done + 1)
        if self._first_step:
            self.check_ranks("the weights after the first step of a phase")
            self.strategy.expect(slow=False)
            self._first_step = False
        return Step(total, task, correct, samples)

    def _clip(self, limit: float, mode: str) -> None:
        if mode == "module":
            mode, self._modules = "norm", self._modules or parameters_by_module(self.plan.module)
        parameters = {name: p for name, p in self._parameters().items() if p.grad is not None and name not in self._unclipped}
        for names in self._modules or (parameters,):
            self.strategy.clip([p for name, p in parameters.items() if name in names], limit, mode)

    def check_ranks(self, what: str) -> None:
        """Raises RunError unless all ranks have the same weights, bit for bit; of sharded ones each has its own part."""
        if self.strategy.peers.count > 1:
            whole = {name: p for name, p in self._parameters().items() if not is_sharded(p)}
            self.strategy.peers.require_equal({what: content_digest(whole)})

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss that trains, the criterion's part of it, and the output; only a loss where another rank computes the output."""
        assert self._call is not None, "begin() comes before the first step"
        outputs, local = self.strategy.forward(self._call, batch, targets=self.plan.needs.targets)
        if outputs is None:
            assert local is not None
            return local, local, None
        output, *auxiliary = outputs if isinstance(outputs, tuple | list) else [outputs]
        check_output(output, batch.target, self.context.classes)
        loss = self.criterion(output, batch.target)
        for other in auxiliary:
            if isinstance(other, Tensor):
                loss = loss + AUXILIARY_WEIGHT * self.criterion(other, batch.target)
        if self.context.teacher is not None:
            loss = self.context.teacher.combined(loss, batch.input, output)
        return (loss if local is None else loss + local), loss, output

    def _check_gradients_once(self) -> None:
        if self.gradients_checked:
            return
        finite = all(local(p.grad).isfinite().all() for p in self._parameters().values() if p.grad is not None)
        if self.scaler.is_enabled() and self._overflows < MAX_OVERFLOWS and not finite:
            self._overflows += 1  # the scaler will skip this step and lower its scale
            return
        check_gradients(self._parameters(), self.plan.report.unused)
        self.gradients_checked = True

    def not_finite(self) -> list[str]:
        """What is no longer finite of the weights, the averaged weights and the optimizer's state."""
        state = self.own_state()
        named = {"": state["model"], "averaged ": state["ema"] or {}}
        found = [f"{what}{name}" for what, tensors in named.items() for name in not_finite(tensors) if name not in self._infinite]
        found += [f"optimizer state of {name}" for name, of in state["optimizer"]["state"].items() if not_finite(of)]
        return list(dict.fromkeys(name for names in self.strategy.ranks.gather(found) for name in names))

    def share_scored(self) -> None:
        """Gives all ranks the weights that triggers measure, in the plan's module."""
        names = sorted({name for region in self.plan.scored.values() for name in region})
        if names:
            self.strategy.share(self.owned, names)

    def similarities(self) -> dict[str, Tensor]:
        """What triggers compare of the outputs of regions: on the first images of the evaluation data, the same ones on all ranks."""
        if not self.plan.compared:
            return {}
        images = ImageFeed(self.context.feeds.evaluation.samples, IMAGES, shuffle=False)
        with preserved():
            batch = self.strategy.move(next(iter(images.batches(0))))
        return similarities(self.plan, batch.input)

    def average_buffers(self) -> None:
        """Gives all ranks the mean of what they have measured apart: running statistics of norms, and of a user's own buffers."""
        ranks, buffers = self.strategy.peers, self._buffers()
        for name, mean in _means(ranks.differing(buffers)).items():
            buffers[name].copy_(mean)

    def buffers_by_rank(self) -> list[dict[str, Tensor]]:
        """Per rank, the buffers in which ranks differ between two averages; for a checkpoint, from which each rank goes on with its own."""
        return self.strategy.differing(self._buffers())

    def load_buffers(self, by_rank: Sequence[Mapping[str, Tensor]]) -> None:
        """The inverse of `buffers_by_rank()`; another number of ranks gets the mean."""
        ranks, buffers = self.strategy.peers, self._buffers()
        own = by_rank[ranks.number] if len(by_rank) == ranks.count else _means(by_rank)
        for name, value in own.items():
            if name in buffers:
                buffers[name].copy_(value)

    def _buffers(self) -> dict[str, Tensor]:
        modules = {"model": self.owned.module} | ({"ema": self.ema.module} if self.ema is not None else {})
        return {f"{kind}.{name}": buffer for kind, module in modules.items() for name, buffer in module.named_buffers()}

    def state_dict(self, *, keep: bool = True, everywhere: bool = False) -> Any:
        """What a checkpoint stores of a phase; everything by name, every tensor whole. Without `keep`, only takes part in gathering it.

        All ranks have to call it; those that do not get all of it, which `everywhere` asks for, get None.
        """
        return self.strategy.gathered(self.own_state(), self.plan.module, keep=keep, everywhere=everywhere)

    def own_state(self) -> dict[str, Any]:
        """As `state_dict()`, with sharded tensors as this rank holds them; nothing is copied, and no rank waits for another."""
        return {
            "model": self.owned.state_dict(),
            "optimizer": optimizers.optimizer_state(self.optimizer, self.plan.module),
            "scaler": self.scaler.state_dict(),
            "ema": self.owned.state_dict(self.ema.module) if self.ema is not None else None,
            "frozen": self.frozen,
            "first": not self.gradients_checked,
            "features": self.features,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict()`. Raises RunError if the network that (spec, decisions) gives is not the one that was saved."""
        self.owned.load(whole_state(state["model"]))
        optimizers.load_optimizer_state(self.optimizer, self.plan.module, state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.owned.load(whole_state(state["ema"] or state["model"]), self.ema.module)
        self.frozen, self.gradients_checked = dict(state["frozen"]), not state["first"]
        self.features = dict(state.get("features", {}))
        check_frozen(self.plan.module, self.frozen)


def _added(mean: Tensor, value: Tensor, count: int) -> Tensor:
    """The mean of `count` values, with one of them added."""
    return value if count == 1 else mean + value / count


def _means(by_rank: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The means of tensors that each rank has, computed in float64."""
    return {name: torch.stack([of[name].double() for of in by_rank]).mean(0).to(value.dtype) for name, value in by_rank[0].items()}
