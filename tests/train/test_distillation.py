"""A teacher's part of the loss, and what cannot have one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt import GraphoptError
from graphopt.data.loader import open_data
from graphopt.models import cifar_resnet
from graphopt.passes.drop import Drop
from graphopt.spec import DataSpec, DistillSpec
from graphopt.train import train
from graphopt.train.distillation import Teacher, open_teacher
from tests.train.small import DATA, SHAPE, plan, records, settings, weights


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.manual_seed(1)
    torch.save(cifar_resnet.build("resnet8").state_dict(), file)
    return {"source": "cifar", "name": "resnet8", "weights": str(file)}


def test_a_hard_teacher_is_its_best_class() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    spec = DistillSpec(name="n", weights="w", hard=True, weight=0.25, task_weight=0.75)
    images, output = torch.randn(4, 3, 2, 2), torch.randn(4, 5)
    taught = Teacher(network, spec, [1.0, 2.0, 3.0], [0.0, 0.5, 1.0])
    seen = images * torch.tensor([1.0, 2.0, 3.0]).view(-1, 1, 1) + torch.tensor([0.0, 0.5, 1.0]).view(-1, 1, 1)
    expected = F.cross_entropy(output, network(seen).argmax(1))
    torch.testing.assert_close(taught(images, output), expected)
    torch.testing.assert_close(taught.combined(torch.tensor(2.0), images, output), 1.5 + 0.25 * expected)
    assert not any(p.requires_grad for p in taught.parameters())


def test_images_are_normalised_as_the_teacher_knows_them(teacher: dict[str, Any]) -> None:
    data = open_data(DataSpec(name="digits", mean=(0.5,), std=(0.25,), train_limit=32, eval_limit=10), SHAPE, seed=0)
    taught = open_teacher(settings(distill={**teacher, "mean": [0.4, 0.3, 0.2], "std": [0.5] * 3}), plan(), data)
    assert taught is not None
    pixels = torch.rand(3, 1, 1)
    theirs = (pixels - torch.tensor([0.4, 0.3, 0.2]).view(3, 1, 1)) / 0.5
    torch.testing.assert_close((pixels - 0.5) / 0.25 * taught.factor + taught.offset, theirs)


def test_a_run_learns_from_a_teacher_and_goes_on_with_it(teacher: dict[str, Any], tmp_path: Path) -> None:
    taught = settings(epochs=1, distill={**teacher, "task_weight": 0.0, "weight": 2.0, "temperature": 2.0})
    train(plan(), tmp_path / "a", settings=taught, data=DATA)
    train(plan(), tmp_path / "b", settings=settings(epochs=1), data=DATA)
    mine, other = ((records(tmp_path / name, "step")[0]["loss"]) for name in "ab")
    assert mine != other
    assert "train_local_loss" not in records(tmp_path / "a", "epoch")[0]
    assert not any(name.startswith("network") for name in weights(tmp_path / "a"))


@pytest.mark.parametrize(
    ("changes", "passes", "message"),
    [
        ({"distill": {"name": "resnet20"}}, [], "teacher.pt: .*do not fit"),
        ({"distill": {"arguments": {"in_chans": 1}}}, [], "do not fit|does not take images"),
        ({"distill": {"mean": [0.5, 0.5]}}, [], "2 and 3 channels"),
        ({"distill": {"weights": "gone.pt"}}, [], "no such weights file"),
        ({"distill": {}, "strategy": "modules"}, [], "no process has both"),
        ({"distill": {}}, [Drop(upto="blocks.0", when={"epoch": 1})], "cached features"),
    ],
    ids=["another network", "other images", "channels", "no file", "modules", "features"],
)
def test_what_cannot_be_taught(teacher: dict[str, Any], changes: dict[str, Any], passes: list[Any], message: str) -> None:
    changes = {**changes, "distill": {**teacher, **changes["distill"]}}
    with pytest.raises(GraphoptError, match=message):
        open_teacher(settings(**changes), plan(passes), open_data(DATA, SHAPE, seed=0))
