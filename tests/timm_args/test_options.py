"""Each option of timm's script sets a key, is refused, or is noted; none is ignored in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

from graphopt import SpecError
from graphopt.cli import main
from graphopt.spec import loads
from graphopt.timm_args import OPTIONS, convert, read

#: what an option is given, beside what else it needs, and the key and the value that it becomes
MAPPED: dict[str, tuple[dict[str, Any], str, Any]] = {
    "data": ({"data": "a"}, "data.root", "a"),
    "data_dir": ({"data_dir": "b", "data": "a"}, "data.root", "b"),
    "dataset": ({"dataset": "torch/CIFAR10"}, "data.name", "cifar10"),
    "train_split": ({"train_split": "part"}, "data.train_split", "part"),
    "val_split": ({"val_split": "test"}, "data.eval_split", "test"),
    "model": ({"model": "resnet18"}, "backbone.name", "resnet18"),
    "pretrained": ({"pretrained": True, "pretrained_path": "w.pth"}, "backbone.weights.reset", ["fc"]),
    "pretrained_path": ({"pretrained": True, "pretrained_path": "v.pth"}, "backbone.weights.file", "v.pth"),
    "initial_checkpoint": ({"pretrained": True, "initial_checkpoint": "c.pth"}, "backbone.weights", "c.pth"),
    "num_classes": ({"num_classes": 7}, "backbone.arguments.num_classes", 7),
    "gp": ({"gp": "max"}, "backbone.arguments.global_pool", "max"),
    "img_size": ({"img_size": 96}, "backbone.input", [3, 96, 96]),
    "in_chans": ({"in_chans": 1}, "backbone.arguments.in_chans", 1),
    "input_size": ({"input_size": [1, 64, 32], "img_size": 96}, "backbone.input", [1, 64, 32]),
    "crop_pct": ({"crop_pct": 1.0}, "data.crop_pct", 1.0),
    "mean": ({"mean": [0.5]}, "data.mean", [0.5]),
    "std": ({"std": [0.1, 0.2, 0.3]}, "data.std", [0.1, 0.2, 0.3]),
    "interpolation": ({"interpolation": "bilinear"}, "data.interpolation", "bilinear"),
    "batch_size": ({"batch_size": 6, "grad_accum_steps": 2}, "train.batch", 24),
    "channels_last": ({"channels_last": True}, "train.channels_last", True),
    "grad_accum_steps": ({"grad_accum_steps": 2}, "train.accumulate", 2),
    "grad_checkpointing": ({"grad_checkpointing": True}, "pass.0.segments", "every block"),
    "model_kwargs": ({"model_kwargs": {"stem_width": 8}}, "backbone.arguments.stem_width", 8),
    "head_init_scale": ({"head_init_scale": 0.1}, "backbone.head_init", {"scale": 0.1}),
    "head_init_bias": ({"head_init_bias": -7}, "backbone.head_init.bias", -7.0),
    "torchcompile": ({"torchcompile": "inductor"}, "train.compile", True),
    "device": ({"device": "cuda:1"}, "train.device", "cuda:1"),
    "amp": ({"amp": True}, "train.amp", "float16"),
    "amp_dtype": ({"amp": True, "amp_dtype": "bfloat16"}, "train.amp", "bfloat16"),
    "native_amp": ({"native_amp": True}, "train.amp", "float16"),
    "opt": ({"opt": "AdamW"}, "train.optimizer.name", "adamw"),
    "opt_eps": ({"opt_eps": "1e-7"}, "train.optimizer.arguments.eps", 1e-7),
    "opt_betas": ({"opt_betas": [0.8, 0.9]}, "train.optimizer.arguments.betas", [0.8, 0.9]),
    "momentum": ({"momentum": 0.5}, "train.optimizer.momentum", 0.5),
    "weight_decay": ({"weight_decay": 0.1}, "train.optimizer.weight_decay", 0.1),
    "clip_grad": ({"clip_grad": 2}, "train.clip", 2.0),
    "clip_mode": ({"clip_grad": 0.1, "clip_mode": "agc"}, "train.clip_mode", "agc"),
    "layer_decay": ({"layer_decay": 0.7}, "train.optimizer.layer_decay", 0.7),
    "layer_decay_min_scale": ({"layer_decay": 0.7, "layer_decay_min_scale": 0.2}, "train.optimizer.layer_decay_min", 0.2),
    "opt_foreach": ({"opt_foreach": False}, "train.optimizer.arguments.foreach", False),
    "opt_args": ({"opt_args": {"caution": True}}, "train.optimizer.arguments.caution", True),
    "opt_kwargs": ({"opt_kwargs": {"caution": True}}, "train.optimizer.arguments.caution", True),
    "sched": ({"sched": "tanh"}, "train.scheduler.name", "tanh"),
    "sched_on_updates": ({"sched_on_updates": True}, "train.scheduler.on_updates", True),
    "lr": ({"lr": 0.3}, "train.optimizer.lr", 0.3),
    "lr_base": ({"lr_base": 0.2}, "train.optimizer.lr", 0.2),
    "lr_base_size": ({"lr_base_size": 512}, "train.optimizer.lr", 0.05),
    "lr_base_scale": ({"lr_base_scale": "sqrt", "lr_base_size": 64}, "train.optimizer.lr", 0.2),
    "lr_noise": ({"lr_noise": [0.4, 0.9]}, "train.scheduler.arguments.noise", [0.4, 0.9]),
    "lr_noise_pct": ({"lr_noise": [0.4], "lr_noise_pct": 0.5}, "train.scheduler.arguments.noise_pct", 0.5),
    "lr_noise_std": ({"lr_noise": [0.4], "lr_noise_std": 0.5}, "train.scheduler.arguments.noise_std", 0.5),
    "lr_cycle_mul": ({"lr_cycle_limit": 2, "lr_cycle_mul": 2}, "train.epochs", 900),
    "lr_cycle_decay": ({"lr_cycle_limit": 2}, "train.scheduler.arguments.cycle_decay", 0.5),
    "lr_cycle_limit": ({"lr_cycle_limit": 2}, "train.epochs", 600),
    "lr_k_decay": ({"lr_k_decay": 0.5}, "train.scheduler.arguments.k_decay", 0.5),
    "lr_decay_fn": ({"sched": "wsd", "lr_decay_fn": "linear"}, "train.scheduler.arguments.decay_fn", "linear"),
    "lr_stable_timescale": ({"sched": "rsqrt", "lr_stable_timescale": 3}, "train.scheduler.arguments.stable_timescale", 3.0),
    "warmup_lr": ({"warmup_lr": 0.001}, "train.scheduler.warmup_lr", 0.001),
    "min_lr": ({"min_lr": 0.001}, "train.scheduler.min_lr", 0.001),
    "epochs": ({"epochs": 9}, "train.epochs", 9),
    "decay_milestones": ({"sched": "multistep", "decay_milestones": [3, 5]}, "train.scheduler.decay_milestones", [3, 5]),
    "decay_epochs": ({"sched": "step", "decay_epochs": 2.5}, "train.scheduler.decay_epochs", 2.5),
    "warmup_epochs": ({"warmup_epochs": 3}, "train.scheduler.warmup_epochs", 3),
    "warmup_prefix": ({"warmup_prefix": True}, "train.epochs", 305),
    "cooldown_epochs": ({"cooldown_epochs": 10}, "train.epochs", 310),
    "decay_rate": ({"sched": "poly", "decay_rate": 2}, "train.scheduler.decay_rate", 2.0),
    "no_aug": ({"no_aug": True}, "data.augment.crop", "squash"),
    "train_crop_mode": ({"train_crop_mode": "rkrc"}, "data.augment.crop", "rkrc"),
    "scale": ({"scale": [0.3, 1]}, "data.augment.scale", [0.3, 1.0]),
    "ratio": ({"ratio": [0.9, 1.1]}, "data.augment.ratio", [0.9, 1.1]),
    "hflip": ({"hflip": 0.1}, "data.augment.hflip", 0.1),
    "vflip": ({"vflip": 0.1}, "data.augment.vflip", 0.1),
    "color_jitter": ({"color_jitter": 0.1}, "data.augment.color_jitter", 0.1),
    "color_jitter_prob": ({"color_jitter_prob": 0.1}, "data.augment.color_jitter_prob", 0.1),
    "grayscale_prob": ({"grayscale_prob": 0.1}, "data.augment.grayscale", 0.1),
    "gaussian_blur_prob": ({"gaussian_blur_prob": 0.1}, "data.augment.blur", 0.1),
    "aa": ({"aa": "rand-m7"}, "data.augment.auto_augment", "rand-m7"),
    "aug_repeats": ({"aug_repeats": 3}, "data.augment.repeats", 3),
    "bce_loss": ({"bce_loss": True}, "train.loss.name", "bce"),
    "bce_sum": ({"bce_loss": True, "bce_sum": True}, "train.loss.sum", True),
    "bce_target_thresh": ({"bce_loss": True, "bce_target_thresh": 0.2}, "train.loss.target_threshold", 0.2),
    "bce_pos_weight": ({"bce_loss": True, "bce_pos_weight": 2}, "train.loss.pos_weight", 2.0),
    "reprob": ({"reprob": 0.25}, "data.augment.erase", 0.25),
    "remode": ({"remode": "rand"}, "data.augment.erase_mode", "rand"),
    "recount": ({"recount": 3}, "data.augment.erase_count", 3),
    "mixup": ({"mixup": 0.2}, "data.augment.mixup", 0.2),
    "cutmix": ({"cutmix": 0.2}, "data.augment.cutmix", 0.2),
    "cutmix_minmax": ({"cutmix_minmax": [0.2, 0.8]}, "data.augment.cutmix_minmax", [0.2, 0.8]),
    "mixup_prob": ({"mixup": 0.2, "mixup_prob": 0.5}, "data.augment.mixup_prob", 0.5),
    "mixup_switch_prob": ({"mixup": 0.2, "mixup_switch_prob": 0.1}, "data.augment.mixup_switch_prob", 0.1),
    "mixup_mode": ({"mixup": 0.2, "mixup_mode": "pair"}, "data.augment.mixup_mode", "pair"),
    "mixup_off_epoch": ({"mixup": 0.2, "mixup_off_epoch": 8}, "data.augment.mixup_off_epoch", 8),
    "smoothing": ({"smoothing": 0.2}, "train.label_smoothing", 0.2),
    "train_interpolation": ({"train_interpolation": "bicubic"}, "data.augment.interpolation", "bicubic"),
    "drop": ({"drop": 0.2}, "backbone.arguments.drop_rate", 0.2),
    "drop_path": ({"drop_path": 0.2}, "backbone.arguments.drop_path_rate", 0.2),
    "drop_block": ({"drop_block": 0.2}, "backbone.arguments.drop_block_rate", 0.2),
    "bn_momentum": ({"bn_momentum": 0.2}, "backbone.arguments.bn_momentum", 0.2),
    "bn_eps": ({"bn_eps": 0.2}, "backbone.arguments.bn_eps", 0.2),
    "sync_bn": ({"sync_bn": True}, "train.sync_norm", True),
    "model_ema": ({"model_ema": True}, "train.ema", 0.9998),
    "model_ema_decay": ({"model_ema": True, "model_ema_decay": 0.9}, "train.ema", 0.9),
    "model_ema_warmup": ({"model_ema": True, "model_ema_warmup": True}, "train.ema_warmup", True),
    "seed": ({"seed": 7}, "train.seed", 7),
    "log_interval": ({"log_interval": 5}, "train.log_every", 5),
    "val_interval": ({"val_interval": 5}, "train.eval_every", 5),
    "recovery_interval": ({"recovery_interval": 50}, "train.checkpoint_steps", 50),
    "checkpoint_hist": ({"checkpoint_hist": 3}, "train.keep", 3),
    "workers": ({"workers": 1}, "data.workers", 1),
    "experiment": ({"experiment": "mine"}, "name", "mine"),
    "kd_model_name": ({"kd_model_name": "resnet18"}, "train.distill.name", "resnet18"),
    "kd_temperature": ({"kd_model_name": "resnet18", "kd_temperature": 2}, "train.distill.temperature", 2.0),
    "distill_loss_weight": ({"kd_model_name": "resnet18", "distill_loss_weight": 0.3}, "train.distill.weight", 0.3),
    "task_loss_weight": ({"kd_model_name": "resnet18", "task_loss_weight": 0.3}, "train.distill.weight", 0.7),
}


def changed(name: str) -> Any:
    """A value of an option's kind that is not its default."""
    option = OPTIONS[name]
    kinds = {"text": "x", "texts": ["x"], "integer": 6, "number": 3.5, "integers": [3], "numbers": [3.5], "table": {"x": 1}}
    return not option.default if option.kind == "switch" else kinds[option.kind]


def at(table: Any, path: str) -> Any:
    for key in path.split("."):
        table = table[int(key) if isinstance(table, list) else key]
    return table


def test_every_option_that_sets_a_key_is_tried() -> None:
    assert MAPPED.keys() == {name for name, option in OPTIONS.items() if option.keys}
    assert all(option.keys or option.refused or option.unused for option in OPTIONS.values())


@pytest.mark.parametrize("name", MAPPED)
def test_an_option_becomes_its_key(name: str) -> None:
    given, path, value = MAPPED[name]
    made = convert(given, ranks=2 if name.startswith(("batch", "lr_base", "aug_")) else 1, teacher="t.safetensors")
    assert at(made.spec.resolved(), path) == pytest.approx(value)
    assert loads(made.text) == made.spec
    assert name not in made.notes


def test_options_that_set_no_key_are_refused_or_noted() -> None:
    for name, option in OPTIONS.items():
        if option.keys:
            continue
        given = {name: changed(name)} | ({"kd_model_name": "resnet18"} if name.startswith("kd_") else {})
        if option.refused:
            with pytest.raises(SpecError, match=f"^{name}: .* is refused: "):
                convert(given, ranks=2, teacher="t.safetensors")
        else:
            assert convert(given, ranks=2, teacher="t.safetensors").notes[name] == f"no effect: {option.unused}"


@pytest.mark.parametrize(
    "around",
    [
        {},
        {"no_aug": True, "sched": "none", "input_size": [3, 64, 64], "data_dir": "a", "lr": 0.1},
        {"pretrained": True, "pretrained_path": "w.pth", "initial_checkpoint": "c.pth", "sched": "step", "smoothing": 0},
        {"mixup": 0.1, "amp": True, "clip_grad": 1, "model_ema": True, "sched": "wsd", "kd_model_name": "resnet18", "bce_loss": True},
        {"lr_cycle_limit": 2, "lr_noise": [0.1], "sync_bn": True, "sched": "poly", "layer_decay": 0.5, "reprob": 0.1},
    ],
    ids=["alone", "without augmentation", "from a checkpoint", "with much", "with more"],
)
def test_no_option_is_ignored_in_silence(around: dict[str, Any]) -> None:
    """Whatever else is set: another value of an option gives another spec, or is noted, or refused."""
    before = convert(around, teacher="t.safetensors").spec
    silent = []
    for name in OPTIONS.keys() - around.keys():
        try:
            made = convert({**around, name: changed(name)}, teacher="t.safetensors")
        except SpecError:
            continue
        if made.spec == before and name not in made.notes:
            silent.append(name)
    assert silent == []


@pytest.mark.parametrize(
    "given",
    [
        {"train_crop_mode": "centre"},
        {"dataset": "tfds/mnist"},
        {"dataset": "hfds/cifar10"},
        {"dataset": "torch/qmnist"},
        {"train_split": "train[:10%]"},
        {"val_split": ""},
        {"model": "hf-hub:some/model"},
        {"model": "resnet5O"},
        {"pretrained": True},
        {"torchcompile": "eager"},
        {"device": "mps"},
        {"sched": "plateau"},
        {"mixup": 0.1, "mixup_mode": "half"},
        {"kd_model_name": "resnet18"},
        {"lr": "high"},
        {"mean": {"a": 1}},
        {"no_such_option": 1},
    ],
    ids=str,
)
def test_values_that_are_refused_name_their_option(given: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as error:
        convert(given)
    assert error.value.where == next(reversed(given)) if len(given) > 1 else next(iter(given))


def test_all_that_is_refused_is_told_at_once() -> None:
    with pytest.raises(SpecError, match=r"3 mistakes(.|\n)*jsd_loss(.|\n)*aug_splits|aug_splits(.|\n)*jsd_loss"):
        convert({"jsd_loss": True, "aug_splits": 3, "unknown": True})


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("sched", ["cosine", "tanh", "poly", "step", "multistep", "constant", "none", "wsd", "rsqrt"])
def test_epochs_are_counted_as_by_timm(sched: str, prefix: bool) -> None:
    given = {"sched": sched, "epochs": 20, "warmup_prefix": prefix, "lr_cycle_limit": 3, "lr_cycle_mul": 1.5, "cooldown_epochs": 4}
    given |= {"decay_epochs": 4, "eval_metric": "top1"}
    args = type("Args", (), {name: option.default for name, option in OPTIONS.items()} | given)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert convert(given).spec.train.epochs == create_scheduler_v2(optimizer, **scheduler_kwargs(args))[1]


class Recorder:
    """Arguments that note which of them are read."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return OPTIONS[name].default if name in OPTIONS else None


def test_every_option_that_timms_helpers_read_is_known() -> None:
    """The package has no script, but functions that read its arguments: those of newer versions show here."""
    args = Recorder()
    scheduler_kwargs(args)
    optimizer_kwargs(args)
    assert args.names - {"names"} <= {*OPTIONS}


def test_a_number_without_an_end_is_none() -> None:
    with pytest.raises(SpecError, match="epochs: expected a whole number, found inf"):
        convert(read(None, ["model=resnet18", "epochs=.inf"]))


def test_the_command_writes_a_spec_with_its_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "args.yaml", tmp_path / "spec.toml"
    source.write_text("model: resnet18\npin_mem: true\nopt_betas: null\nwarmup_lr: 1e-6\n")
    assert main(["import", str(source), "--set", "epochs=7", "-o", str(out)]) == 0
    assert "pin_mem: no effect" in capsys.readouterr().out
    assert "# pin_mem: no effect" in out.read_text()
    assert (loads(out.read_text()).train.epochs, loads(out.read_text()).train.scheduler.warmup_lr) == (7, 1e-6)
    assert main(["import", str(source), "-o", str(out)]) == 2, "a spec that is there stays"
    assert f"{out}: the file exists" in capsys.readouterr().err
    assert main(["import", str(source)]) == 0
    assert loads(capsys.readouterr().out).backbone.name == "resnet18"


@pytest.mark.parametrize("text", ["- a\n", "a: [", "a: !!python/object:os.system {}\n", "\x00"])
def test_a_file_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "args.yaml").write_text(text)
    with pytest.raises(SpecError, match=r"args\.yaml: not "):
        read(tmp_path / "args.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        read(tmp_path / "other.yaml")
    with pytest.raises(SpecError, match="OPTION=VALUE"):
        read(None, ["lr"])
