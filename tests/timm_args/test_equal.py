"""One epoch of a run by timm's factories, and of the spec that its options become: the same losses, the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, create_dataset, create_transform, resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from graphopt.data.loader import epoch_order
from graphopt.data.randomness import reseed
from graphopt.timm_args import OPTIONS, convert
from graphopt.train import train

BASE = {
    "model": "resnet10t",
    "model_kwargs": {"channels": [8, 8, 16, 16], "stem_width": 8},
    "num_classes": 4,
    "input_size": [3, 16, 16],
    "batch_size": 4,
    "epochs": 2,
    "warmup_epochs": 1,
    "lr": 0.05,
    "device": "cpu",
    "workers": 0,
    "seed": 3,
    "model_ema": True,
    "model_ema_decay": 0.5,
}
VIT = {"model": "vit_tiny_patch16_224", "model_kwargs": {"img_size": 16, "depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 4}}
RUNS = {
    "no augmentation": {"no_aug": True, "opt": "momentum", "weight_decay": 0.1},
    "augmented": {
        "reprob": 0.5,
        "color_jitter": 0.4,
        "recount": 2,
        "mixup": 0.2,
        "opt": "sgd",
        "clip_grad": 0.01,
        "clip_mode": "agc",
        "grad_accum_steps": 2,
    },
    "mixed, bce, taught, more classes than the data": {
        **VIT,
        "num_classes": 6,
        "no_aug": True,
        "mixup": 0.4,
        "cutmix": 1.0,
        "mixup_mode": "elem",
        "mixup_switch_prob": 0.3,
        "mixup_off_epoch": 1,
        "bce_loss": True,
        "bce_target_thresh": 0.2,
        "bce_sum": True,
        "opt": "adamw",
        "opt_betas": [0.8, 0.9],
        "opt_eps": 1e-6,
        "layer_decay": 0.5,
        "layer_decay_min_scale": 0.3,
        "sched_on_updates": True,
        "clip_grad": 1.0,
        "kd_model_name": "test_resnet",
        "kd_temperature": 2.0,
        "task_loss_weight": 0.4,
        "head_init_scale": 0.1,
        "head_init_bias": -2.0,
        "model_ema_warmup": True,
    },
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    draw = np.random.RandomState(0)
    for split, count in (("train", 4), ("validation", 1)):
        for name in "abcd":
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.randint(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def by_timm(args: SimpleNamespace) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses of all steps, weights, averaged weights: what the script does with its factories, on the order and the draws of graphopt."""
    torch.manual_seed(args.seed)
    model = create_model(args.model, num_classes=args.num_classes, drop_rate=args.drop, **args.model_kwargs).train()
    if args.head_init_scale is not None:
        with torch.no_grad():
            for parameter in model.get_classifier().parameters():
                parameter.mul_(args.head_init_scale)
        nn.init.constant_(model.get_classifier().bias, args.head_init_bias)
    config = resolve_data_config(vars(args), model=model)
    augment: dict[str, Any] = {"no_aug": True, "interpolation": config["interpolation"]}
    if not args.no_aug:
        augment = {"scale": args.scale, "ratio": args.ratio, "hflip": args.hflip, "color_jitter": args.color_jitter}
        augment |= {"interpolation": args.train_interpolation, "re_prob": args.reprob, "re_mode": args.remode, "re_count": args.recount}
    dataset = create_dataset(args.dataset, root=args.data_dir, split=args.train_split)
    dataset.transform = create_transform(config["input_size"], is_training=True, mean=config["mean"], std=config["std"], **augment)
    mixed = args.mixup > 0 or args.cutmix > 0
    same = {"mode": args.mixup_mode, "label_smoothing": args.smoothing, "num_classes": args.num_classes}
    mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, **same) if mixed else None
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    updates = len(dataset) // args.batch_size // args.grad_accum_steps
    schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
    task = _task(args, model, mixed)
    losses, done = [], 0
    for epoch in range(epochs):
        order = epoch_order(len(dataset), args.seed, epoch)
        if mixup is not None:
            mixup.mixup_enabled = not args.mixup_off_epoch or epoch < args.mixup_off_epoch
        for update in range(updates):
            optimizer.zero_grad()
            total = 0.0
            for part in range(args.grad_accum_steps):
                number = update * args.grad_accum_steps + part
                x, target = _batch(dataset, order[number * args.batch_size :][: args.batch_size], args.seed, epoch)
                if mixup is not None:
                    reseed(args.seed, epoch, number, 1)
                    x, target = mixup(x, target)
                loss = task(x, target)["loss"] / args.grad_accum_steps
                loss.backward()
                total += loss.item()
            if args.clip_grad is not None:
                parameters = list(model.parameters())
                dispatch_clip_grad(parameters[:-2] if "agc" in args.clip_mode else parameters, args.clip_grad, mode=args.clip_mode)
            optimizer.step()
            done += 1
            ema.update(model, step=done)
            schedule.step_update(done)
            losses.append(total)
        schedule.step(epoch + 1)
    return losses, model.state_dict(), ema.module.state_dict()


def _teacher() -> nn.Module:
    torch.manual_seed(9)
    return create_model("test_resnet", num_classes=6)


def _task(args: SimpleNamespace, model: nn.Module, mixed: bool) -> nn.Module:
    criterion = _criterion(args, mixed)
    if not args.kd_model_name:
        return ClassificationTask(model, criterion)
    weights = {"task_loss_weight": args.task_loss_weight, "distill_loss_weight": args.distill_loss_weight}
    task = LogitDistillationTask(model, _teacher(), criterion, temperature=args.kd_temperature, **weights)
    task.train()
    return task


def _batch(dataset: Any, numbers: list[int], seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    found = []
    for number in numbers:
        reseed(seed, epoch, number)
        found.append(dataset[number])
    return torch.stack([image for image, _ in found]), torch.tensor([target for _, target in found])


def _criterion(args: SimpleNamespace, mixed: bool) -> nn.Module:
    if args.bce_loss:
        return BinaryCrossEntropy(target_threshold=args.bce_target_thresh, sum_classes=args.bce_sum)
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_weights_are_those_of_timms_factories(name: str, images: Path, tmp_path: Path) -> None:
    given = {**BASE, **RUNS[name], "data_dir": str(images)}
    losses, weights, averages = by_timm(SimpleNamespace(**{key: option.default for key, option in OPTIONS.items()} | given))
    torch.save(_teacher().state_dict(), tmp_path / "teacher.pt")
    train(convert({**given, "log_interval": 1}, teacher=str(tmp_path / "teacher.pt")).spec, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    torch.testing.assert_close([record["loss"] for record in records if record["kind"] == "step"], losses, rtol=1e-4, atol=1e-5)
    phase = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["phase"]
    for mine, theirs in ((phase["model"], weights), (phase["ema"], averages)):
        torch.testing.assert_close({key: mine[key] for key in theirs}, dict(theirs), rtol=1e-3, atol=1e-5)
