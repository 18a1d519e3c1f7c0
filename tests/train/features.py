"""Runs with cached features, small ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from graphopt.data.loader import ImageFeed, open_data
from graphopt.passes.drop import Drop
from graphopt.spec import DataSpec, TrainSpec
from graphopt.train import train
from graphopt.train.checkpoint import load_checkpoint
from graphopt.train.feature_cache.cache import FeatureCache
from graphopt.train.strategy import Strategy
from tests.train import small

DATA = DataSpec(name="digits", train_limit=80, eval_limit=20)
TRAIN = TrainSpec(epochs=5, batch=16, device="cpu", optimizer={"name": "sgd", "lr": 0.05}, checkpoint_steps=2)
SCHEDULE = [{"epoch": 1, "upto": "blocks.0"}, {"epoch": 3, "upto": "blocks.2"}]


def plan_of(**options):
    return small.plan([Drop(**{"when": SCHEDULE, "force": True, **options})], drop=0.2)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(folder / "last.pt")["phase"]["model"]


def features_of(folder: Path) -> list[dict]:
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "features"]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(tmp_path: Path, name: str = "run", data: DataSpec = DATA, settings: TrainSpec = TRAIN, resume: bool = False, **options):
    train(plan_of(**options), tmp_path / name, settings=settings, data=data, resume=resume)
    return tmp_path / name


def cache_of(folder: Path, plan, data: DataSpec = DATA, **more) -> FeatureCache:
    images = ImageFeed(open_data(data, plan.base.input, 0).train, 16)
    return FeatureCache(images, Strategy(torch.device("cpu")), folder=folder, digest=plan.digest, identity={}, **more)
