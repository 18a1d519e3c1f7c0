"""State dicts that come from files, without the versions that modules keep in theirs."""

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn


def load_versioned(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads all keys of a module, in the format that its own state dict has now.

    Some modules (torchvision's MNASNet) keep a version of their format in their state dict and refuse one without it; files of tensors and
    dictionaries that were worked on have lost it. Raises RuntimeError as `load_state_dict` does.
    """
    versioned: OrderedDict[str, Tensor] = OrderedDict(state)
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]  # where torch keeps the versions
    module.load_state_dict(versioned, strict=True)
