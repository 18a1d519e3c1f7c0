"""Backbones whose modules hang together in a way that a tracer or a rewrite can trip over."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from oddity import Block, Net, oddity
from torch import Tensor, nn


@oddity()
class OneBlockTwice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[3] = self.blocks[1]


@oddity()
class TiedWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        last, earlier = self.blocks[3], self.blocks[1]
        assert isinstance(last, Block)
        assert isinstance(earlier, Block)
        last.conv1.weight = earlier.conv1.weight


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
