"""The auxiliary part of one locally supervised module: its head, its decoder and their local loss.

A head makes class scores, or features to contrast, of the module's output. `pool` is mean over the positions, norm, linear; `norm-pool`
puts the norm first, over every position, as the transformer papers do (arXiv 2212.14215). `conv` is InfoPro's (ICLR 2021), "1c2f": a 3x3
convolution with norm and ReLU, global pooling, two linear layers with a ReLU between. `dictionary` compares each position with a vector
per class (DCL, ICLR 2024, openreview Gg7cXo3S8l), and `ahead` has blocks of its own (`graphopt.passes.supervise.ahead`). The default is
`pool`: a head runs in every module and every step, and must not cost what the module saves.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from graphopt.errors import RunError
from graphopt.passes.supervise.ahead import LookaheadBlocks
from graphopt.passes.supervise.decoders import ImageDecoder
from graphopt.passes.supervise.layout import ActivationLayout
from graphopt.passes.supervise.options import Difference, HeadKind

#: first scale of the local loss under float16; GradScaler's 2**16 overflows in the pooled head, whose features are normalised
FLOAT16_SCALE = 2.0**12
#: width of the hidden layer of InfoPro's head, and of the features it contrasts
HIDDEN = 128
#: most positions per side that the convolution gives; it takes every k-th row and column of a larger map. InfoPro's largest.
LARGEST_SIDE = 16


class Weights(NamedTuple):
    """Weights of one module's two losses; a loss of weight 0 is left out, with what would compute it."""

    reconstruct: float
    classify: float


class Auxiliary(nn.Module):
    """Head, decoder and loss weights of one module. Registered at `supervise.<i>`; runs in training only; export drops it.

    Attributes:
        lookahead: what the module's output goes through before the head and the decoder, if anything.
        classes: number of classes of the targets.
        temperature: the head gives features to contrast at this temperature; None: class scores.
        rebuilds_image: the decoder's goal is the network's input, not the module's.
        scale: of the local loss under float16, a power of two (see `local`). clean: steps without overflow since it last changed.
        step_index: steps so far, by which a decoder chooses its sample; part of the state dict. A plain number, so that reading it does
            not wait for a device.
    """

    scale: Tensor
    clean: Tensor

    def __init__(
        self,
        head: nn.Module | None,
        decoder: Any,
        weights: Weights,
        classes: int,
        difference: Difference,
        temperature: float | None,
        lookahead: LookaheadBlocks | None = None,
    ) -> None:
        super().__init__()
        self.head, self.decoder, self.lookahead = head, decoder, lookahead
        self.weights, self.classes, self.temperature = weights, classes, temperature
        self.difference, self.rebuilds_image = difference, isinstance(decoder, ImageDecoder)
        self.register_buffer("scale", torch.tensor(FLOAT16_SCALE))
        self.register_buffer("clean", torch.zeros((), dtype=torch.int64))
        self.step_index = 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step_index, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.step_index = int(state)

    def begin(self, image: Tensor | None) -> None:
        """Before a step. Raises RunError if the image that the decoder rebuilds is not one of [0, 1]."""
        if self.lookahead is not None and self.step_index == 0:
            self.lookahead.update(first=True)
        # Looking at values of another device waits for it: wrong statistics show in the first step.
        if image is not None and (image.device.type == "cpu" or self.step_index == 0) and not isinstance(image, FakeTensor):
            self.decoder.check(image)

    def end(self) -> None:
        """After a step."""
        self.step_index += 1
        if self.lookahead is not None:
            self.lookahead.end()

    def forward(self, h: Tensor, x: Tensor | None, target: Tensor, step_index: int = 0) -> Tensor:
        """The local loss, a scalar.

        Args:
            h: the module's output. x: what the decoder rebuilds (not differentiated). target: (N,) or (N, classes).
            step_index: for the decoder. An argument, so that a compiled module takes it as a number and is not compiled again for each.
        """
        terms: list[Tensor] = []
        sample_state: Any = None
        if self.lookahead is not None:
            h = self.lookahead(h)
        if self.decoder is not None:
            h, sample_state = self.decoder.sample(h, step_index)
        if self.head is not None:
            out = self.head(h)
            loss = _classification(out, target) if self.temperature is None else _contrast(out, target, self.temperature)
            terms.append(_weighted(loss, self.weights.classify))
        if self.decoder is not None:
            assert x is not None
            prediction, goal = self.decoder(sample_state, x.detach())
            terms.append(_weighted(_reconstruction(prediction, goal, self.difference), self.weights.reconstruct))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def validated_target(self, target: Tensor | None, batch: int) -> Tensor:
        """The target, if it fits a batch of this size.

        Raises:
            RunError: there is none, or its shape or type fits neither class indices nor probabilities.
        """
        wanted = f"class indices ({batch},), integers, or probabilities ({batch}, {self.classes}), floating point"
        if target is None:
            fix = f"Call output, local_loss = module(x, target) with {wanted}; in eval mode module(x) is enough"
            raise RunError("training with local supervision needs the targets", where="supervise", fix=fix)
        if not isinstance(target, Tensor):
            raise RunError(f"the target is a {type(target).__name__}, not a tensor", where="supervise", fix=f"Give {wanted}")
        integers = not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool
        fits = tuple(target.shape) == ((batch,) if integers else (batch, self.classes))
        if not fits or target.is_complex() or target.dtype == torch.bool:
            shape = ", ".join(map(str, target.shape)) + ("," if target.dim() == 1 else "")
            raise RunError(f"the target has shape ({shape}) and type {target.dtype}", where="supervise", fix=f"Give {wanted}")
        return target


class Boundary(nn.Module):
    """Marks where a locally supervised module ends in the graph; returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _weighted(loss: Tensor, weight: float) -> Tensor:
    """In float32 or wider. A factor of one is left out: next to a small module, every operation takes a measurable time."""
    loss = _wide(loss)
    return loss if weight == 1 else weight * loss


def _wide(value: Tensor) -> Tensor:
    """In float32 or wider."""
    return value if value.dtype == torch.float64 else value.float()


def _classification(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits (N, classes) with class indices (N,) or class probabilities (N, classes)."""
    return F.cross_entropy(logits, target.to(logits.dtype) if target.is_floating_point() else target)


def _contrast(features: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Supervised contrast (SupCon, arXiv 2004.11362, equation 2, one view), as InfoPro uses it; a sample alone in its class adds nothing.

    Args:
        features: (N, D), not yet of unit length.
        target: class indices (N,); or probabilities (N, classes), where the similarity of two samples is their probabilities' product.
    """
    features = F.normalize(_wide(features), dim=1)
    logits = features @ features.T / temperature
    diagonal = torch.eye(len(features), dtype=torch.bool, device=features.device)
    target = target.to(features.dtype) if target.is_floating_point() else target
    similar = target @ target.T if target.is_floating_point() else (target[:, None] == target[None, :]).to(features.dtype)
    similar = similar.masked_fill(diagonal, 0.0)
    log_likelihood = logits - torch.logsumexp(logits.masked_fill(diagonal, float("-inf")), dim=1, keepdim=True)
    total = similar.sum(1)
    return -((similar * log_likelihood).sum(1) / total.where(total > 0, 1.0)).mean()


def _reconstruction(prediction: Tensor, goal: Tensor, kind: Difference) -> Tensor:
    """Mean difference of two tensors of one shape, in float32 or wider.

    `"bce"` takes the prediction as logits (InfoPro's sigmoid and binary cross-entropy in one, which autocast allows).
    """
    prediction = _wide(prediction)
    goal = goal.to(prediction.dtype)
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(prediction, goal)
    return F.l1_loss(prediction, goal) if kind == "l1" else F.mse_loss(prediction, goal)


class PoolHead(nn.Module):
    """(N, ...) in `layout` -> (N, outputs): mean over positions and layer norm over channels, in either order, then linear."""

    def __init__(self, layout: ActivationLayout, outputs: int, norm_first: bool, hidden: int | None = None) -> None:
        super().__init__()
        self.layout, self.norm_first = layout, norm_first
        self.norm = nn.LayerNorm(layout.channels)
        self.fc = _mlp(layout.channels, hidden, outputs)

    def forward(self, h: Tensor) -> Tensor:
        if self.norm_first:
            return self.fc(self.norm(self.layout.tokens(h)).mean(1))
        # The mean of half-precision activations is float32, which weights in half precision do not take.
        return self.fc(self.norm(self.layout.mean(h).to(self.norm.weight.dtype)))


class DictionaryHead(nn.Module):
    """(N, ...) in `layout` -> (N, classes): mean over positions of the inner product with each class's embedding, over `temperature`.

    The embeddings train, from a standard normal distribution. Published is one table for all modules, averaged to each one's width; here
    each module has a table of its width, so that no parameter is trained by two of them.
    """

    def __init__(self, layout: ActivationLayout, classes: int, temperature: float) -> None:
        super().__init__()
        self.layout, self.temperature = layout, temperature
        self.embeddings = nn.Parameter(torch.randn(classes, layout.channels))

    def forward(self, h: Tensor) -> Tensor:
        # The mean of inner products is the inner product of the mean: no map of similarities comes into being.
        return F.linear(self.layout.mean(h).to(self.embeddings.dtype), self.embeddings) / self.temperature


class ConvHead(nn.Module):
    """(N, ...) in `layout` -> (N, outputs): InfoPro's head, its width and stride those of its ResNets with 16, 32 and 64 channels.

    Up to 32 channels the convolution doubles them at stride 2; from 64 on it has as many, at most 128, at stride 1 where the map is small.
    It takes every k-th row and column of a map that would still have more than `LARGEST_SIDE` positions per side.
    """

    def __init__(self, layout: ActivationLayout, outputs: int) -> None:
        super().__init__()
        assert layout.grid is not None
        self.layout = layout
        side = max(layout.grid)
        stride = 1 if layout.channels >= 64 and side <= LARGEST_SIDE else 2
        self.step = max(1, -(-side // (LARGEST_SIDE * stride)))
        width = 2 * layout.channels if layout.channels < 64 else min(layout.channels, HIDDEN)
        self.conv = nn.Conv2d(layout.channels, width, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.fc = _mlp(width, HIDDEN, outputs)

    def forward(self, h: Tensor) -> Tensor:
        h = self.layout.map(h)
        if self.step > 1:
            h = h[:, :, :: self.step, :: self.step]
        return self.fc(F.relu(self.bn(self.conv(h))).mean((2, 3)))


def _mlp(inputs: int, hidden: int | None, outputs: int) -> nn.Module:
    if hidden is None:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def build_head(kind: HeadKind, layout: ActivationLayout, classes: int, temperature: float) -> nn.Module:
    """The head of that kind, but for `"ahead"`. `"contrast"` ends in 128 features, on the convolutional trunk for maps, channels first."""
    if kind == "dictionary":
        return DictionaryHead(layout, classes, temperature)
    if kind == "conv" or (kind == "contrast" and layout.images):
        return ConvHead(layout, HIDDEN if kind == "contrast" else classes)
    if kind == "contrast":
        return PoolHead(layout, HIDDEN, norm_first=False, hidden=HIDDEN)
    return PoolHead(layout, classes, norm_first=kind == "norm-pool")
