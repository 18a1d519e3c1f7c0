"""The local losses: classification, supervised contrast, and reconstruction."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Difference = Literal["l1", "l2", "bce"]


def classification(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits (N, classes) with class indices (N,) or class probabilities (N, classes); a scalar."""
    return F.cross_entropy(logits, target.to(logits.dtype) if target.is_floating_point() else target)


def contrast(features: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Supervised contrast (SupCon, arXiv 2004.11362, equation 2, one view), as InfoPro uses it.

    Args:
        features: (N, D), not yet of unit length.
        target: class indices (N,); or probabilities (N, classes), where the similarity of two samples is their probabilities' product.

    Returns:
        A scalar: the mean over samples of the negative mean log-likelihood of those of the same class. A sample without any adds nothing.
    """
    features = F.normalize(features.float(), dim=1)
    logits = features @ features.T / temperature
    diagonal = torch.eye(len(features), dtype=torch.bool, device=features.device)
    if target.is_floating_point():
        similar = target.float() @ target.float().T
    else:
        similar = (target[:, None] == target[None, :]).float()
    similar = similar.masked_fill(diagonal, 0.0)
    log_likelihood = logits - torch.logsumexp(logits.masked_fill(diagonal, float("-inf")), dim=1, keepdim=True)
    total = similar.sum(1)
    return -((similar * log_likelihood).sum(1) / total.where(total > 0, 1.0)).mean()


def reconstruction(prediction: Tensor, goal: Tensor, kind: Difference) -> Tensor:
    """Mean difference of two tensors of one shape; a scalar in float32 or wider.

    `"bce"` takes the prediction as logits (InfoPro's sigmoid and binary cross-entropy in one, which autocast allows); its goal must lie in
    [0, 1].
    """
    prediction = prediction if prediction.dtype == torch.float64 else prediction.float()
    goal = goal.to(prediction.dtype)
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(prediction, goal)
    return F.l1_loss(prediction, goal) if kind == "l1" else F.mse_loss(prediction, goal)
