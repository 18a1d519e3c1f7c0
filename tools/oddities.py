"""User-written backbones, each with one thing in its Python or its structure that a tracer or a rewrite can trip over.

`ODDITIES` has them by name, with the shape of one sample. Some cannot be compiled; those have to be refused with the reason.
"""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Shape = tuple[int, ...]
ODDITIES: dict[str, tuple[Callable[[], nn.Module], Shape]] = {}


def oddity(*shape: int, **arguments: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Registers a backbone under the name of its class."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        ODDITIES[cls.__name__] = (functools.partial(cls, **arguments), shape or (3, 16, 16))
        return cls

    return register


class Block(nn.Module):
    """A residual block: two 3x3 convolutions with norms."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


class Net(nn.Module):
    """Stem, four blocks, pool, linear."""

    block: Callable[[], nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.blocks = nn.Sequential(*(type(self).block() for _ in range(4)))

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


# -- what forward does with its input ---------------------------------------------------------------------------------------
@oddity()
class AssertsOnShape(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        assert x.shape[-1] % 4 == 0
        return super().forward(x)


@oddity(3, 15, 18)
class PadsToMultiple(Net):
    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.shape
        if h % 4 or w % 4:
            x = F.pad(x, (0, -w % 4, 0, -h % 4))
        return super().forward(x)


@oddity()
class LoopsOverSize(Net):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(x.shape[-1] // 8):
            x = x + i
        return super().forward(x)


@oddity()
class BranchesOnBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if x.shape[0] > 3 else x)


@oddity()
class TakesKeywords(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        return super().forward(x if mask is None else x * mask)


@oddity()
class TakesTwoInputs(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


@oddity()
class TakesDict(Net):
    def forward(self, x: Any) -> Tensor:
        return super().forward(x["image"])


@oddity()
class BranchesOnValue(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0.5 else -x)


@oddity()
class DropsLayersByPython(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if not self.training or random.random() < 0.5:
                x = block(x)
        return self.head(x)


@oddity()
class StemWithoutGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.stem(x)
        return self.head(self.blocks(x))


@oddity()
class DetachedStem(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).detach()))


# -- what forward returns ---------------------------------------------------------------------------------------------------
@oddity()
class ReturnsDict(Net):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = super().forward(x)
        return {"logits": logits, "probabilities": logits.softmax(-1)}


@oddity()
class ReturnsTuple(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(x)
        return self.head(x), x


@oddity()
class ReturnsFeatures(Net):
    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps[1:]


@dataclass
class Output:
    """What a library's model returns."""

    logits: Tensor
    features: Tensor


@oddity()
class ReturnsDataclass(Net):
    def forward(self, x: Tensor) -> Output:
        x = self.features(x)
        return Output(self.head(x), x)


# -- odd blocks -------------------------------------------------------------------------------------------------------------
class _ByValue(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean().item() < 100 else x


@oddity()
class BlocksBranchOnValue(Net):
    block = _ByValue


class _ByChannels(Block):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 8
        return super().forward(x)


@oddity()
class BlocksAssertOnChannels(Net):
    block = _ByChannels


class _Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(x)


@oddity()
class BlocksCountInBuffers(Net):
    block = _Counting


class _Averaging(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        return super().forward(x)


@oddity()
class BlocksAverageInPlace(Net):
    block = _Averaging


class _Reassigning(_Averaging):
    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.detach().mean((0, 2, 3))
        return Block.forward(self, x)


@oddity()
class BlocksReassignBuffers(Net):
    block = _Reassigning


class _Cumulative(Block):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8, momentum=None)


@oddity()
class NormsAverageAllBatches(Net):
    block = _Cumulative


class _Stateless(Block):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = (nn.BatchNorm2d(8, affine=False, track_running_stats=False) for _ in range(2))


@oddity()
class NormsWithoutState(Net):
    block = _Stateless


class _InPlace(Block):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


@oddity()
class BlocksInPlace(Net):
    block = _InPlace


class _Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@oddity()
class BlocksCheckpointed(Net):
    block = _Checkpointed


class _Bound(Block):
    def __init__(self) -> None:
        super().__init__()
        self.checkpoint = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.checkpoint(super().forward, x)


@oddity()
class BlocksCheckpointedByPartial(Net):
    block = _Bound


@oddity()
class BlocksScripted(Net):
    block = staticmethod(lambda: torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())))


@oddity()
class LayersLazy(Net):
    block = staticmethod(lambda: nn.LazyConv2d(8, 1))


@oddity()
class SpectralNorms(Net):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            nn.utils.parametrizations.spectral_norm(block.conv1)


@oddity()
class WeightNorms(Net):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            nn.utils.parametrizations.weight_norm(block.conv1)


class _Scaled(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(8, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.scales[0] * x + self.scales[1] * self.branch(x))


@oddity()
class ListsOfScales(Net):
    block = _Scaled


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.a(y), y + self.b(x)


@oddity()
class BlocksWithTwoOutputs(Net):
    block = _Two

    def features(self, x: Tensor) -> Tensor:
        x = y = self.stem(x)
        for block in self.blocks:
            x, y = block(x, y)
        return x + y


class _Unused(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor, masked: bool = False) -> Tensor:
        x = x * self.mask[:, None, None] if masked else x
        return super().forward(x) if x.mean().item() < 100 else x


@oddity()
class OpaqueWithUnusedParameters(Net):
    block = _Unused


# -- odd structure ----------------------------------------------------------------------------------------------------------
@oddity()
class OneBlockTwice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[3] = self.blocks[1]


@oddity()
class TiedWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[3].conv1.weight = self.blocks[1].conv1.weight


@oddity()
class HooksOnBlocks(Net):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.register_forward_hook(lambda _module, _inputs, output: output * 0.5)


@oddity(3, 32)
class Sequence(nn.Module):
    """One-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv1d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean(2))


class _Patches(nn.Module):
    """Patch embedding, blocks over tokens, linear."""

    block: Callable[[], nn.Module]

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(type(self).block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(1))


class _Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.norm2, self.channels = nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


@oddity()
class MlpMixer(_Patches):
    block = _Mixer


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


@oddity()
class MultiheadAttention(_Patches):
    block = _Attention


@oddity()
class TransformerEncoder(nn.Module):
    """torch's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


@oddity()
class DetectionTransformer(nn.Module):
    """A convolutional body, torch's transformer, learnt queries, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1))
        self.queries = nn.Parameter(torch.rand(6, 16))
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
        self.classes, self.boxes = nn.Linear(16, 5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.body(x).flatten(2).transpose(1, 2)
        found = self.transformer(tokens, self.queries.unsqueeze(0).expand(x.shape[0], -1, -1))
        return {"logits": self.classes(found), "boxes": self.boxes(found).sigmoid()}


@oddity()
class Fourier(Net):
    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        spectrum = torch.fft.rfft2(x)
        return self.blocks(x + torch.fft.irfft2(spectrum * spectrum.abs().sigmoid(), s=x.shape[-2:]))


@oddity()
class UNet(nn.Module):
    """Two levels down, two up, skip connections by concatenation; dense output."""

    def __init__(self) -> None:
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Sequential:
            first = (nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
            return nn.Sequential(*first, nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

        self.down1, self.down2, self.middle = double(3, 8), double(8, 16), double(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.decode2, self.decode1, self.head = double(32, 16), double(16, 8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.middle(F.max_pool2d(two, 2))
        x = self.decode2(torch.cat([self.up2(x), two], 1))
        return self.head(self.decode1(torch.cat([self.up1(x), one], 1)))


if importlib.util.find_spec("einops"):
    from einops import rearrange, reduce
    from einops.layers.torch import Rearrange, Reduce

    class _Einops(_Mixer):
        def forward(self, x: Tensor) -> Tensor:
            x = x + rearrange(self.tokens(rearrange(self.norm1(x), "n t c -> n c t")), "n c t -> n t c")
            return x + self.channels(self.norm2(x))

    @oddity()
    class EinopsFunctions(_Patches):
        block = _Einops

        def forward(self, x: Tensor) -> Tensor:
            x = rearrange(self.patch(x), "n c h w -> n (h w) c")
            for block in self.blocks:
                x = block(x)
            return self.fc(reduce(x, "n t c -> n c", "mean"))

    @oddity()
    class EinopsLayers(nn.Sequential):
        """Layers of einops in a Sequential."""

        def __init__(self) -> None:
            layers = (nn.Conv2d(3, 16, 4, 4), Rearrange("n c h w -> n (h w) c"), *(_Mixer() for _ in range(3)))
            super().__init__(*layers, Reduce("n t c -> n c", "mean"), nn.Linear(16, 5))
