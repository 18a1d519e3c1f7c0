"""A step that allocates what CUDA's kernels would."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from graphopt.cost import forecast
from graphopt.cost.devices import DEVICES
from graphopt.cost.kernels import as_on_cuda

A100 = DEVICES["A100"]


def saved(module, *shape, **options):
    return forecast(module, shape, 4, device=A100, **options).saved_activation_bytes


class Attention(nn.Module):
    """One attention over the rows of its input; `mask` is added to the scores."""

    def __init__(self, width, mask=None, dropout=0.0):
        super().__init__()
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.mask, self.dropout = mask, dropout

    def forward(self, x):
        q, k, v = (t.unsqueeze(1) for t in self.project(x).chunk(3, dim=-1))
        mask = None if self.mask is None else torch.zeros(x.shape[1], x.shape[1], dtype=self.mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout).squeeze(1)[:, 0]


def test_dropout_keeps_one_byte_per_element():
    plain, dropped = nn.Sequential(nn.Linear(8, 512)), nn.Sequential(nn.Linear(8, 512), nn.Dropout(0.5))
    assert saved(dropped, 8) - saved(plain, 8) == 4 * 512
    assert forecast(dropped, (8,), 4).saved_activation_bytes - forecast(plain, (8,), 4).saved_activation_bytes == 4 * 4 * 512


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_that_drops_nothing_or_all_is_no_kernel(p):
    terms = forecast(nn.Sequential(nn.Linear(8, 16), nn.Dropout(p)), (8,), 4, device=A100).cuda.terms
    assert "dropout masks" not in {term.name for term in terms}


@pytest.mark.parametrize("rows", [50, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mask", [None, torch.float32, torch.bool])
def test_memory_efficient_attention_saves_no_scores(rows, dropout, mask):
    module = Attention(16, mask, dropout)
    qkv, out, sums = 4 * 4 * rows * 48, 4 * 4 * rows * 16, 4 * 4 * (-(-rows // 32) * 32)
    x = 4 * 4 * rows * 16
    bias = 0 if mask is None else 4 * rows * (rows + -rows % 16)
    # What is left is the loss's, and the random state of the kernel.
    assert saved(module, rows, 16, optimizer=None) - x - qkv - out - sums - bias <= 400


def test_flash_attention_takes_16_bit_types_and_pads_heads_to_8():
    cost = forecast(Attention(20), (50, 20), 4, device=A100, amp="bfloat16")
    kept = {term.name: term.bytes for term in cost.cuda.terms}
    assert kept["attention"] == (2 * 4 * 50 * 24 + 4 * 4 * 50,) * 2
    assert kept["attention backward"] == (4 * 4 * 128 * (1 + 32),) * 2


def test_what_a_checkpoint_runs_again_in_the_backward_is_as_on_cuda_too():
    class Recomputed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    cost = forecast(nn.Sequential(Recomputed(nn.Linear(8, 64), nn.Dropout(0.5)), nn.Linear(64, 2)), (8,), 4, device=A100)
    assert {term.name: term.bytes.low for term in cost.cuda.terms}["dropout masks"] == 2 * 4 * 64


def test_attention_inside_torch_code_is_as_on_cuda_too():
    encoder = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.5, batch_first=True)
    kept = {term.name: term.bytes.low for term in forecast(encoder, (10, 32), 2, device=A100, loss=lambda y, _: y.sum()).cuda.terms}
    # The masks of three dropouts; that of the scores is the kernel's own.
    assert kept["dropout masks"] == 2 * 10 * (32 + 64 + 32)
    assert kept["attention"] == 4 * 2 * 10 * 32 + 4 * 2 * 2 * 32


def test_norms_run_in_float32_under_autocast():
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
    cpu, cuda = (forecast(module, (64,), 256, amp="bfloat16", device=d).saved_activation_bytes for d in (None, A100))
    # The norm saves its input and statistics in float32; what it gives is cast for the next layer.
    assert cuda - cpu == 256 * 64 * 2 + 2 * 256 * 2


def test_optimizers_make_temporary_results_for_all_parameters_at_once():
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    weights = 8 * 64 * 64 * 4
    temporary = {
        name: {t.name: t.bytes.low for t in forecast(module, (64,), 1, optimizer=name, device=A100, **more).cuda.terms}
        for name, more in {"adamw": {}, "momentum": {"optimizer_options": {"weight_decay": 0.1}}}.items()
    }
    assert temporary["momentum"]["optimizer's temporary results"] == weights
    assert weights <= temporary["adamw"]["optimizer's temporary results"] < weights + 1024


def replaced():
    """What torch has where `as_on_cuda` puts something else."""
    from torch.optim import optimizer

    devices = optimizer._get_foreach_kernels_supported_devices()
    return F.dropout, F.scaled_dot_product_attention, nn.Module.__call__, devices, [*optimizer._foreach_supported_types]


def test_torch_is_left_as_it_was():
    before = replaced()
    with pytest.raises(ZeroDivisionError), as_on_cuda():
        raise ZeroDivisionError
    assert replaced() == before
    assert torch.equal(F.dropout(torch.ones(3), 0.5, False), torch.ones(3))


def test_the_step_computes_what_it_computes_on_the_cpu():
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2, drop_rate=0.1, proj_drop_rate=0.1)
    cpu, cuda = (forecast(module, (3, 32, 32), 2, device=device) for device in (None, A100))
    assert (cpu.forward_flops, cpu.backward_flops, cpu.parameters) == (cuda.forward_flops, cuda.backward_flops, cuda.parameters)
