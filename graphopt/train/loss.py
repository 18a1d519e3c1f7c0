"""The criterion of a run: what its spec asks for of the output and the targets."""

from typing import Any

import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy  # type: ignore[attr-defined]  # re-exported without saying so
from torch import Tensor, nn

from graphopt.spec import TrainSpec


class Criterion(nn.Module):
    """Loss of scores (N, classes) and targets: classes (N,) int64, which it smooths, or shares (N, classes), which mixup has smoothed.

    Binary cross-entropy is timm's (Wightman et al., arXiv 2110.00476), with thresholded targets.
    """

    def __init__(self, train: TrainSpec) -> None:
        super().__init__()
        self.smoothing, spec = train.label_smoothing, train.loss
        options: dict[str, Any] = {"target_threshold": spec.target_threshold, "sum_classes": spec.sum, "pos_weight": spec.pos_weight}
        self.binary = BinaryCrossEntropy(self.smoothing, **options) if spec.name == "bce" else None

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if self.binary is not None:
            return self.binary(output, target)
        return F.cross_entropy(output, target, label_smoothing=self.smoothing if target.ndim == 1 else 0.0)
