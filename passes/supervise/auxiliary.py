"""The auxiliary part of one locally supervised module: its head, its decoder and their local loss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import RunError
from graphopt.passes.supervise import losses

#: first scale of the local loss under float16; GradScaler's 2**16 overflows in the pooled head, whose features are normalised
FLOAT16_SCALE = 2.0**12


@dataclass(frozen=True)
class Weights:
    """Weights of one module's two losses; a loss of weight 0 is left out, with what would compute it."""

    reconstruct: float
    classify: float

    @staticmethod
    def between(first: float, last: float, index: int, count: int) -> float:
        """Linear over the auxiliary modules, from the first's to the last's; a single one takes the first's (as InfoPro's code does)."""
        return first if count < 2 else first + (last - first) * index / (count - 1)


class Auxiliary(nn.Module):
    """Head, decoder and loss weights of one module. Registered at `supervise.<i>`; runs in training only; export drops it.

    Attributes:
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
        decoder: nn.Module | None,
        weights: Weights,
        classes: int,
        *,
        difference: losses.Difference = "l1",
        temperature: float | None = None,
        rebuilds_image: bool = False,
    ) -> None:
        super().__init__()
        self.head = head
        self.decoder: Any = decoder
        self.weights, self.classes, self.temperature = weights, classes, temperature
        self.difference, self.rebuilds_image = difference, rebuilds_image
        self.register_buffer("scale", torch.tensor(FLOAT16_SCALE))
        self.register_buffer("clean", torch.zeros((), dtype=torch.int64))
        self.step_index = 0

    def get_extra_state(self) -> Tensor:
        """The step index, for the state dict."""
        return torch.tensor(self.step_index, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """The step index from a state dict."""
        self.step_index = int(state)

    def forward(self, h: Tensor, x: Tensor | None, target: Tensor, step_index: int = 0) -> Tensor:
        """The local loss, a scalar.

        Args:
            h: the module's output. x: what the decoder rebuilds (not differentiated). target: (N,) or (N, classes).
            step_index: for the decoder. An argument, so that a compiled module takes it as a number and is not compiled again for each.
        """
        terms: list[Tensor] = []
        sample_state: Any = None
        if self.decoder is not None:
            h, sample_state = self.decoder.sample(h, step_index)
        if self.head is not None:
            out = self.head(h)
            if self.temperature is None:
                loss = losses.classification(out, target)
            else:
                loss = losses.contrast(out, target, self.temperature)
            terms.append(_weighted(loss, self.weights.classify))
        if self.decoder is not None:
            assert x is not None
            prediction, goal = self.decoder(sample_state, x.detach())
            terms.append(_weighted(losses.reconstruction(prediction, goal, self.difference), self.weights.reconstruct))
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def validated_target(self, target: Tensor | None, batch: int) -> Tensor:
        """The target, if it fits a batch of this size.

        Raises:
            RunError: there is none, or its shape or type fits neither class indices nor probabilities.
        """
        wanted = f"class indices ({batch},), integers, or probabilities ({batch}, {self.classes}), floating point"
        if target is None:
            raise RunError(
                "training with local supervision needs the targets",
                where="supervise",
                fix=f"Call output, local_loss = module(x, target) with {wanted}; in eval mode module(x) is enough",
            )
        if not isinstance(target, Tensor):
            raise RunError(f"the target is a {type(target).__name__}, not a tensor", where="supervise", fix=f"Give {wanted}")
        integers = not target.is_floating_point() and not target.is_complex() and target.dtype != torch.bool
        fits = tuple(target.shape) == ((batch,) if integers else (batch, self.classes))
        if not fits or target.is_complex() or target.dtype == torch.bool:
            shape = ", ".join(map(str, target.shape)) + ("," if target.dim() == 1 else "")
            raise RunError(f"the target has shape ({shape}) and type {target.dtype}", where="supervise", fix=f"Give {wanted}")
        return target


def _weighted(loss: Tensor, weight: float) -> Tensor:
    """In float32 or wider. A factor of one is left out: next to a small module, every operation takes a measurable time."""
    loss = loss if loss.dtype == torch.float64 else loss.float()
    return loss if weight == 1 else weight * loss


class Boundary(nn.Module):
    """Marks where a locally supervised module ends in the graph; returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        """The input itself."""
        return x
