"""Of which samples features can be cached: those that are the same each time, or of which some views are cached."""

from collections.abc import Mapping
from typing import Any

import torch

from graphopt.data.loader import Samples
from graphopt.data.transforms import Transform
from graphopt.errors import RunError


def check_inputs(samples: Samples, options: Mapping[str, Any], *, mixed: bool) -> None:
    """Raises RunError unless features of the samples can be cached with the options of a pass."""
    if mixed:
        what = "mixup and CutMix make new inputs from every batch, so features of them cannot be cached"
        raise RunError(what, where="data.augment", fix='Leave them out, or run the prefix in every step (cache = "none")')
    if samples.repeats > 1:
        fix = 'Leave repeats out, or run the prefix in every step (cache = "none")'
        raise RunError("images that an epoch repeats have no features that could be cached", where="data.augment.repeats", fix=fix)
    if options.get("crops"):
        _check_crops(samples, options)
    elif not samples.deterministic and not options.get("views") and not options.get("refresh"):
        what = "random augmentation gives a sample another input in every epoch, so features of it cannot be cached"
        fix = 'Cache them in RAM, where a part is computed anew in each epoch; or cache some views (views = 4), or nothing (cache = "none")'
        raise RunError(what, where="data.augment", fix=fix)
    for view in range(options.get("views") or 1):
        once, again = (samples[(view, 0)][1] for _ in range(2))
        if not torch.equal(once, again):
            what = "the transform gives another input each time for the same view of a sample"
            raise RunError(what, where="data", fix="Let it draw from torch's, numpy's or Python's own generators only")


def _check_crops(samples: Samples, options: Mapping[str, Any]) -> None:
    """Raises RunError where crops of features cannot stand for the augmentation of images."""
    transform = samples.transform
    if not isinstance(transform, Transform) or transform.padded_crop is None:
        what = "features are cropped in the place of images that are padded and cropped, and these are not"
        raise RunError(what, where="data.augment.crop", fix='Set it to "pad", or leave crops out of the pass')
    if tuple(samples[(0, 0)][1].shape[1:]) != tuple(transform.padded_crop.size):
        what = "images get another size after they are cropped, so crops of features cannot stand for those"
        raise RunError(what, where="data.augment.crop", fix='Resize with how = "scale", or leave crops out of the pass')
    needed = 2 ** len(transform.flips)
    if needed > 1 and not options.get("refresh") and (options.get("views") or 1) % needed:
        what = "the features of a flipped image are no flipped features of the image, so both have to be cached"
        raise RunError(what, where="data.augment", fix=f"Set views = {needed} in the pass, or refresh = 4")
