"""The emitted module in other people's loops: bare PyTorch, Lightning, Accelerate, and DDP on two ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphopt
from graphopt.passes.supervise import Supervise
from tests.support.backbones import Small
from tests.support.ranks import run_ranks

STEPS, BATCH = 12, 16


def emitted() -> nn.Module:
    torch.manual_seed(0)
    return graphopt.compile(Small(drop=0.0), Supervise(modules=3), input=(3, 8, 8), costs=False, verify="fast").module


def data() -> TensorDataset:
    """Ten classes that a small network tells apart: each has a colour and a place."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(STEPS * BATCH) % 10
    x = 0.3 * torch.randn(len(y), 3, 8, 8, generator=generator)
    for image, label in zip(x, y.tolist(), strict=True):
        image[label % 3, label // 2 : label // 2 + 3] += 2
    return TensorDataset(x, y)


def accuracy(module: nn.Module) -> float:
    x, y = data().tensors
    with torch.no_grad():
        return (module.eval()(x).argmax(1) == y).float().mean().item()


def by_hand(module: nn.Module, epochs: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for x, y in DataLoader(data(), BATCH):
            output, local_loss = module.train()(x, y)
            loss = F.cross_entropy(output, y) + local_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_bare_pytorch() -> None:
    module = emitted()
    losses = by_hand(module)
    assert sum(losses[-STEPS:]) < 0.7 * sum(losses[:STEPS])
    assert accuracy(module) > 0.5


def test_lightning_takes_the_same_steps(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            output, local_loss = self.module(*batch)
            return F.cross_entropy(output, batch[1]) + local_loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    reference = emitted()
    task = Task(copy.deepcopy(reference))
    by_hand(reference, epochs=2)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, DataLoader(data(), BATCH))
    for (name, mine), theirs in zip(task.module.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_takes_the_same_steps(accumulate: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    reference = emitted()
    module = copy.deepcopy(reference)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module, optimizer, loader = accelerator.prepare(module, optimizer, DataLoader(data(), BATCH))
    module.train()
    for x, y in loader:
        with accelerator.accumulate(module):
            output, local_loss = module(x, y)
            accelerator.backward(F.cross_entropy(output, y) + local_loss)
            optimizer.step()
            optimizer.zero_grad()
    if accumulate == 1:
        by_hand(reference, epochs=1)
        for mine, theirs in zip(accelerator.unwrap_model(module).parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert all(p.isfinite().all() for p in module.parameters())


def _rank(rank: int, folder: str) -> None:
    module = emitted()
    _norms_at_rest(module)
    # Different weights on the ranks at first: DDP sends rank 0's.
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(rank)
    wrapped = nn.parallel.DistributedDataParallel(module)
    x, y = (t[rank * BATCH : (rank + 1) * BATCH] for t in data().tensors)
    for _ in range(2):
        wrapped.zero_grad()
        output, local_loss = wrapped(x, y)
        (F.cross_entropy(output, y) + local_loss).backward()
    torch.save({n: p.grad for n, p in module.named_parameters()}, f"{folder}/{rank}.pt")


def _norms_at_rest(module: nn.Module) -> None:
    """Norms that use running statistics, so that a batch is the sum of its parts."""
    module.train()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()


def test_two_ranks_average_to_one_process(tmp_path: Path) -> None:
    run_ranks(_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    module = emitted()
    _norms_at_rest(module)
    x, y = (t[: 2 * BATCH] for t in data().tensors)
    for _ in range(2):
        module.zero_grad()
        output, local_loss = module(x, y)
        (F.cross_entropy(output, y) + local_loss).backward()
    for name, parameter in module.named_parameters():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], parameter.grad, atol=1e-6, rtol=1e-4)
