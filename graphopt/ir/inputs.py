"""What a forward takes: one tensor, or several; said by the shape of one sample each."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from graphopt.ir.sample import check_input

Shape: TypeAlias = tuple[int, ...]
#: the shape of one sample, `(3, 224, 224)`; or, for each of several tensors, its shape, or `(shape, dtype)` for whole numbers and booleans
Input: TypeAlias = Shape | tuple[Shape | tuple[Shape, torch.dtype], ...]


def as_input(given: Any) -> Input:
    """What a user gave, in tuples. Raises ValueError if it is no input, or if one sample of it is beyond memory."""
    items = tuple(given)
    if not any(isinstance(item, (tuple, list)) for item in items):
        return check_input(_sizes(items))
    several = tuple(_element(item) for item in items)
    return _simplest(several)


def tensors_of(input: Input) -> tuple[tuple[Shape, torch.dtype | None], ...]:
    """Shape of one sample and dtype of each tensor; the dtype is None where it is the backbone's."""
    items: Any = input if not input or isinstance(input[0], tuple) else (input,)
    return tuple(item if _has_dtype(item) else (item, None) for item in items)


def image_of(input: Input) -> tuple[int, int, int] | None:
    """The shape (C, H, W) of one sample, where a forward takes one image; else None."""
    (shape, dtype), *others = tensors_of(input)
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 and dtype is None and not others else None


def crop_padding(image: Shape) -> int:
    """Pixels on each side by which the augmentation `crop = "pad"` pads an image (C, H, W) before it takes a random crop of its size."""
    return max(image[1:]) // 8


def samples(input: Input, batch: int, make: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """A batch of each tensor. `make(*sizes)` gives those in the backbone's dtype; whole numbers and booleans alternate between 0 and 1.

    So token numbers are in every vocabulary, and no mask hides all or nothing.
    """
    return tuple(make(batch, *shape) if dtype is None else _alternating(batch, shape, dtype) for shape, dtype in tensors_of(input))


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype of a network's floating-point inputs: that of its first such parameter; None without one, for torch's default."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def sample_numbers(input: Input) -> int:
    """How many numbers one sample holds, of all tensors."""
    return sum(math.prod(shape) for shape, _ in tensors_of(input))


def input_of(module: fx.GraphModule) -> Input:
    """What an emitted module takes, its target aside: the backbone's input, or features and whatever else comes after a cut."""
    given = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder") if n.name != "target"]
    found = tuple(tuple(v.shape[1:]) if v.is_floating_point() else (tuple(v.shape[1:]), v.dtype) for v in given)
    return _simplest(found)


def show(input: Input) -> str:
    """The shapes with the batch: `(N, 3, 224, 224)`, or `(N, 3, 224, 224) and (N, 8)`."""
    return " and ".join(f"({', '.join(map(str, ('N', *shape)))})" for shape, _ in tensors_of(input))


def _simplest(several: tuple[Shape | tuple[Shape, torch.dtype], ...]) -> Input:
    """One tensor in the backbone's dtype is its shape alone."""
    (shape, dtype), *others = tensors_of(several)
    return several if others or dtype is not None else shape


def _element(item: Any) -> Shape | tuple[Shape, torch.dtype]:
    if not isinstance(item, (tuple, list)):
        raise ValueError(f"one of several inputs is a shape, or (shape, dtype), found {item!r}")
    if not _has_dtype(item):
        shape = _sizes(item)
        check_input(shape or (1,))  # a number per sample has no sizes
        return shape
    shape, dtype = _sizes(item[0]), item[1]
    check_input(shape or (1,))
    if dtype.is_floating_point or dtype.is_complex:
        raise ValueError(f"an input of floating-point numbers has the backbone's dtype: give its shape alone, {shape}")
    return shape, dtype


def _has_dtype(item: Any) -> bool:
    return len(item) == 2 and isinstance(item[1], torch.dtype)


def _sizes(item: Any) -> Shape:
    try:
        return tuple(size.__index__() for size in item)
    except (AttributeError, TypeError):
        raise ValueError(f"a shape is made of whole numbers, found {item!r}") from None


def _alternating(batch: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Each sample begins with the number that the one before does not begin with."""
    numbers = torch.arange(math.prod(shape)).reshape(shape) + torch.arange(batch).reshape(batch, *[1] * len(shape))
    return (numbers % 2).to(dtype)
