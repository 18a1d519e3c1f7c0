"""The typed spec: the keys a TOML file can have, with types and defaults. `graphopt.spec.reading` reads files."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, SerializeAsAny

from graphopt.compiler.pass_base import Pass
from graphopt.errors import RunError
from graphopt.spec.data import DataSpec
from graphopt.spec.kinds import (
    Above0,
    Arguments,
    Batch,
    Count,
    Deviations,
    Fraction,
    FractionAbove0,
    FractionBelow1,
    Means,
    NonNegative,
    Positive,
    Shape,
    Table,
    as_tuple,
)

Source = Literal["torchvision", "timm", "python", "cifar"]
Verify = Literal["full", "fast", "off"]


class WeightsSpec(Table):
    """`weights = { file = "...", reset = ["fc"] }`: weights that are loaded in part, for fine-tuning."""

    file: str = Field(min_length=1, description="safetensors or a torch checkpoint, of which no code is run")
    reset: Annotated[tuple[str, ...], as_tuple] = Field(default=(), description="modules that start anew, by their paths: a new head")
    entry: str | None = Field(
        default=None, description="the state dict's key in a checkpoint; default: state_dict_ema, model_ema, state_dict or model"
    )


class HeadInitSpec(Table):
    """`head_init = { scale = 0.001, bias = -6.9 }`: how the classifier of a timm backbone begins, whatever its weights come from."""

    scale: NonNegative = Field(default=1.0, description="factor on its weights and biases")
    bias: Annotated[float, Field(ge=-1e3, le=1e3)] | None = Field(default=None, description="value of all its biases")


class BackboneSpec(Table):
    """`[backbone]`: the network, and the shape of one sample."""

    source: Source = Field(description="torchvision, timm, cifar (CIFAR ResNets) or python (your factory; --trust)")
    name: str = Field(min_length=1, description='the library\'s name; for python "package.module:factory" or "file.py:factory"')
    arguments: Arguments = Field(default={}, description="keyword arguments of the constructor, e.g. num_classes")
    input: Shape = Field(description="one sample's shape, [3, 224, 224]; default: the model's own")
    weights: str | WeightsSpec | None = Field(
        default=None, description='safetensors or a torch checkpoint, loaded strictly; { file = "...", reset = ["fc"] } for a new head'
    )
    head_init: HeadInitSpec | None = Field(default=None, description="how the classifier begins: { scale = 0.001, bias = -6.9 }")


class OptimizerSpec(Table):
    """`[train.optimizer]`, or just its name: `optimizer = "adamw"`. timm's optimizer factory makes it."""

    name: str = Field(default="sgd", description="timm's name: sgd (Nesterov), momentum, adamw, lamb, ...")
    lr: Above0 = Field(default=0.1, description="peak learning rate, for the whole batch")
    momentum: FractionBelow1 = Field(default=0.9, description="of SGD; the betas of Adam are set in arguments")
    weight_decay: NonNegative = Field(default=5e-4, description="not applied to biases, norms and scalars that a pass has added")
    layer_decay: FractionAbove0 | None = Field(default=None, description="learning-rate factor per layer from the head")
    layer_decay_min: Fraction = Field(default=0.0, description="least of these factors")
    arguments: Arguments = Field(default={}, description="further arguments of that optimizer, e.g. { betas = [0.9, 0.95] }")


class SchedulerSpec(Table):
    """`[train.scheduler]`, or just its name: `scheduler = "step"`. timm's scheduler factory makes it."""

    name: Literal["constant", "cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt"] = Field(
        default="cosine", description="timm's name"
    )
    on_updates: bool = Field(default=True, description="a new rate in each optimizer step; false: in each epoch")
    epochs: Positive | None = Field(default=None, description="length of the decay (of its first cycle); default: train.epochs")
    warmup_epochs: Count = Field(default=0, description="epochs of linear warm-up")
    warmup_prefix: bool = Field(default=False, description="the decay begins after the warm-up, rather than at epoch 0")
    warmup_lr: NonNegative = Field(default=1e-5, description="learning rate at the first step of the warm-up")
    min_lr: NonNegative = Field(default=0.0, description="learning rate at the end")
    decay_epochs: Above0 | None = Field(default=None, description="step: epochs between decays; wsd, rsqrt: of the decay")
    decay_milestones: Annotated[tuple[Positive, ...], as_tuple] = Field(default=(), description="multistep: epochs at which it decays")
    decay_rate: Annotated[float, Field(gt=0, le=100)] = Field(default=0.1, description="step: factor of a decay; poly: the power")
    arguments: Arguments = Field(default={}, description="further arguments of timm's create_scheduler_v2")


class LossSpec(Table):
    """`[train.loss]`, or just its name: `loss = "bce"`. The criterion; the local losses of passes have their own."""

    name: Literal["cross_entropy", "bce"] = Field(default="cross_entropy", description="bce: binary cross-entropy, a class at a time")
    target_threshold: Fraction | None = Field(default=None, description="bce: softened targets above it become 1, others 0")
    sum: bool = Field(default=False, description="bce: the sum over classes, rather than their mean")
    pos_weight: Above0 | None = Field(default=None, description="bce: weight of the classes that are there")


class DistillSpec(Table):
    """`[train.distill]`: a teacher, whose outputs are learned with the classes (Hinton et al., arXiv 1503.02531)."""

    source: Source = Field(default="timm", description="as in [backbone]")
    name: str = Field(min_length=1, description="as in [backbone]; as many classes as the backbone has")
    arguments: Arguments = Field(default={}, description="as in [backbone]")
    weights: str = Field(min_length=1, description="safetensors or a torch checkpoint")
    mean: Means | None = Field(default=None, description="per channel, of the images that it was trained on; default: those of [data]")
    std: Deviations | None = Field(default=None, description="per channel, likewise")
    hard: bool = Field(
        default=False, description="its best class is learned, rather than its softened outputs (Touvron et al., 2012.12877)"
    )
    temperature: Above0 = Field(default=4.0, description="of softened outputs")
    weight: NonNegative = Field(default=1.0, description="of the teacher's part of the loss")
    task_weight: NonNegative = Field(default=1.0, description="of the criterion's part of the loss")


class FsdpSpec(Table):
    """`[train.fsdp]`: options of `strategy = "fsdp"`, which shards parameters over the processes."""

    offload: bool = Field(default=False, description="hold parameters, gradients and optimizer state in the memory of the CPU")
    precision: Literal["bfloat16"] | None = Field(
        default=None, description="dtype in which blocks are gathered and computed, norms too; default: float32, computed by `amp`"
    )
    prefetch: Annotated[int, Field(ge=0, le=16)] = Field(default=0, description="blocks that are gathered ahead, in the graph's order")


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class TrainSpec(Table):
    """`[train]`: the training run."""

    epochs: Positive = Field(default=10, description="passes over the training images")
    batch: Batch = Field(default=128, description="samples per optimizer step, over all processes and micro-batches")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="of initial weights, order, and augmentation")
    optimizer: Annotated[OptimizerSpec, BeforeValidator(_named)] = OptimizerSpec()
    scheduler: Annotated[SchedulerSpec, BeforeValidator(_named)] = SchedulerSpec()
    loss: Annotated[LossSpec, BeforeValidator(_named)] = LossSpec()
    distill: DistillSpec | None = Field(default=None, description="a teacher; see [train.distill]; forecasts leave it out")
    label_smoothing: FractionBelow1 = Field(default=0.0, description="share of the target that all classes get")
    accumulate: Positive = Field(
        default=1, description="micro-batches per optimizer step, each of batch / (processes x accumulate) samples"
    )
    clip: Above0 | None = Field(default=None, description="gradient clipping; see clip_mode")
    clip_mode: Literal["norm", "module", "value", "agc"] = Field(
        default="norm",
        description="by total norm, by the norm of each gradient-isolated module, by value, or adaptive (agc: all but the head)",
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, description="decay of the averaged weights")
    ema_warmup: bool = Field(default=True, description="the decay of the averages grows to its value; false: it has it from the start")
    amp: Literal["bfloat16", "float16"] | None = Field(default=None, description="autocast dtype; default: float32")
    channels_last: bool = Field(default=False, description="memory format of images and convolutions")
    compile: bool = Field(default=False, description="torch.compile, once per phase")
    device: str = Field(default="auto", description="auto: CUDA where there is one; cpu, cuda, cuda:1")
    strategy: Literal["auto", "single", "ddp", "fsdp", "modules"] = Field(
        default="auto",
        description="of several processes; auto: ddp; fsdp shards parameters, gradients and optimizer state; modules: each process trains "
        "some of the modules that supervise makes",
    )
    replicas: Positive = Field(
        default=1, description='with strategy = "modules": how many processes train the same modules, each on its share of the batch'
    )
    fsdp: FsdpSpec = Field(default=FsdpSpec(), description='options of strategy = "fsdp"; all off by default')
    sync_norm: bool = Field(default=False, description="batch norms use the statistics of all processes' samples")
    timeout: Positive = Field(
        default=300, description="seconds that a process waits for the others in a step; longer in the first of a phase"
    )
    deterministic: bool = Field(default=True, description="bit-identical reruns on CPU; on CUDA deterministic kernels where they exist")
    checkpoint_steps: Positive | None = Field(default=None, description="also write a checkpoint every so many steps; always one per epoch")
    keep: Positive = Field(default=2, description="checkpoints retained: last, best, latest epochs; from 2 on the one before the last, too")
    checkpoint_format: Literal["whole", "sharded"] = Field(
        default="whole", description="one file, or what fsdp shards in a file of each rank, in a folder that all ranks share"
    )
    checkpoint_async: bool = Field(default=False, description="write checkpoints while training goes on; takes a copy of the state")
    eval_every: Positive = Field(default=1, description="epochs between evaluations; the last epoch always")
    log_every: Positive = Field(default=10, description="steps between metrics lines")
    ledger: bool = Field(default=False, description="record every step's samples; `graphopt report` then checks each epoch")

    def micro_batch(self, ranks: int = 1) -> int:
        """Samples that one process takes through the network at once. Raises RunError if the batch does not divide; says which do."""
        parts = ranks * self.accumulate
        if self.batch % parts:
            near = sorted({max(1, self.batch // parts) * parts, (self.batch // parts + 1) * parts})
            processes = f"{ranks} processes" if ranks > 1 else "1 process"
            what = f"a batch of {self.batch} does not divide into {processes} with {self.accumulate} micro-batches each"
            raise RunError(what, where="train.batch", fix=f"Use {' or '.join(map(str, near))}")
        return self.batch // parts

    def forecast_options(self) -> dict[str, Any]:
        """Options of `graphopt.cost.forecast`, for a training step of this run: one of `batch` samples, where there is one process."""
        optimizer = self.optimizer
        arguments = {"momentum": optimizer.momentum, "weight_decay": optimizer.weight_decay, **optimizer.arguments}
        return {
            "optimizer": optimizer.name,
            "optimizer_options": arguments,
            "amp": self.amp,
            "channels_last": self.channels_last,
            "accumulate": self.accumulate,
        }


class Spec(Table):
    """A whole spec. Two are equal if their resolved values are, wherever they were read from."""

    name: str = Field(default="", description="human-readable; shown in reports")
    verify: Verify | None = Field(default=None, description="default: full in apply, fast in train")
    backbone: BackboneSpec
    passes: tuple[SerializeAsAny[Pass], ...] = Field(
        default=(), alias="pass", max_length=100, description="in the order in which they are applied"
    )
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()

    _file: str | None = PrivateAttr(default=None)
    _lines: Mapping[tuple[str | int, ...], int] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    @property
    def _text(self) -> str:
        return json.dumps(self.resolved(), sort_keys=True)  # as text, nan is nan

    @property
    def lines(self) -> Mapping[tuple[str | int, ...], int]:
        """Key path (`("pass", 0, "select")`) -> its line, from 1; 0 for an override. Empty for a spec made in Python."""
        return self._lines

    @property
    def file(self) -> str | None:
        """The file it was read from, as messages name it; None for a spec made in Python."""
        return self._file

    def where(self, *path: str | int) -> str | None:
        """`"quickstart.toml:14, pass 2 (freeze), select"` for an error's location; None for a spec made in Python."""
        if self._file is None:
            return None
        return locate(self._file, self._lines, [item.name for item in self.passes], path)

    def location_of(self, index: int) -> str | None:
        """`"quickstart.toml:9"`: where pass `index` (from 0) begins; None for a spec made in Python."""
        line = self._lines.get(("pass", index))
        return f"{self._file}:{line}" if self._file and line else self._file

    def resolved(self, *, defaults: bool = True) -> dict[str, Any]:
        """The spec as plain TOML values, every default written out unless told otherwise; keys without a value are left out."""
        options: dict[str, Any] = {"mode": "json", "by_alias": True, "exclude_none": True, "exclude_unset": not defaults}
        table = self.model_dump(**options, exclude={"passes"})
        passes = [{"use": item.name, **item.model_dump(**options)} for item in self.passes]
        ordered: dict[str, Any] = {key: table.pop(key) for key in ("name", "verify") if key in table}
        return {**ordered, "backbone": table.pop("backbone"), "pass": passes, **table}

    @property
    def settled(self) -> bool:
        """Whether what its passes decide follows from the spec and the backbone alone, not from the machine (`graphopt.driver.settle`)."""
        return all(item.settled for item in self.passes)

    def settles(self, other: "Spec") -> bool:
        """Whether its passes are those of `other`, settled."""
        return len(self.passes) == len(other.passes) and all(map(Pass.settles, self.passes, other.passes))

    def with_passes(self, passes: Sequence[Pass]) -> "Spec":
        """The same spec with other values of its passes."""
        return self.model_copy(update={"passes": tuple(passes)})

    @property
    def digest(self) -> str:
        """Hash of what determines structure: the backbone (not its weights) and the passes in order. 16 hex digits."""
        table = self.resolved()
        backbone = {key: value for key, value in table["backbone"].items() if key not in ("weights", "head_init")}
        text = json.dumps({"format": 1, "backbone": backbone, "pass": table["pass"]}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def locate(file: str, lines: Mapping[tuple[str | int, ...], int], uses: list[str], path: tuple[str | int, ...]) -> str:
    """`file:line, field`, with the line of the nearest enclosing key that has one; `uses` are the names of the passes."""
    known = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in lines), None)
    if known is not None and lines[known] == 0:  # set by an override
        return f"--set {'.'.join(map(str, known))}, {_in_words(path, uses)}"
    location = f"{file}:{lines[known]}" if known else file
    return f"{location}, {_in_words(path, uses)}" if path else location


def _in_words(path: tuple[str | int, ...], uses: list[str]) -> str:
    """`("pass", 1, "select", 0)` as `pass 2 (freeze), select[0]`."""
    head = text = ""
    if len(path) > 1 and path[0] == "pass" and isinstance(path[1], int):
        use = f" ({uses[path[1]]})" if path[1] < len(uses) and uses[path[1]] else ""
        head, path = f"pass {path[1] + 1}{use}", path[2:]
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return ", ".join(filter(None, (head, text)))
