"""Lean operators against stock ones: equal outputs and input gradients, and less saved."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.passes.freeze import activations, operators
from graphopt.passes.freeze.lean import frozen_form

IMAGE = (2, 8, 13, 12)
TOKENS = (2, 10, 8)

#: module, input shape, saved bytes of the lean form at most this fraction of the input's (None: nothing promised)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float | None]] = {
    "conv1d": (lambda: nn.Conv1d(10, 6, 3, 2, 1), TOKENS, 0),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, 2, 1), IMAGE, 0),
    "conv2d without bias": (lambda: nn.Conv2d(8, 6, 1, bias=False), IMAGE, 0),
    "conv2d dilated, uneven": (lambda: nn.Conv2d(8, 6, (3, 2), (1, 2), (2, 0), (2, 1)), IMAGE, 0),
    "conv2d grouped": (lambda: nn.Conv2d(8, 16, 3, groups=4), IMAGE, 0),
    "conv2d depthwise": (lambda: nn.Conv2d(8, 8, 7, padding=3, groups=8), IMAGE, 0),
    "conv2d same": (lambda: nn.Conv2d(8, 8, 3, padding="same"), IMAGE, 0),
    "conv2d same, even kernel": (lambda: nn.Conv2d(8, 8, (4, 3), padding="same", dilation=(1, 2)), IMAGE, 0),
    "conv2d valid": (lambda: nn.Conv2d(8, 8, 3, padding="valid"), IMAGE, 0),
    "conv2d reflect": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), IMAGE, 0),
    "conv2d replicate": (lambda: nn.Conv2d(8, 8, 3, padding=(2, 1), padding_mode="replicate"), IMAGE, 0),
    "conv2d circular": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), IMAGE, 0),
    "conv2d same, dynamic (timm)": (lambda: timm.layers.Conv2dSame(8, 8, 3, stride=2), IMAGE, 0),
    "conv3d": (lambda: nn.Conv3d(3, 4, 3, padding=1), (2, 3, 4, 6, 5), 0),
    "conv transpose": (lambda: nn.ConvTranspose2d(8, 4, 3, 2, 1, 1, groups=2), IMAGE, 0),
    "conv unbatched": (lambda: nn.Conv2d(8, 6, 3), IMAGE[1:], None),
    "linear": (lambda: nn.Linear(8, 5), TOKENS, 0),
    "batch norm 1d": (lambda: nn.BatchNorm1d(8), (6, 8), 0),
    "batch norm 1d, sequence": (lambda: nn.BatchNorm1d(10), TOKENS, 0),
    "batch norm 2d": (lambda: nn.BatchNorm2d(8), IMAGE, 0),
    "batch norm 2d, not affine": (lambda: nn.BatchNorm2d(8, affine=False, eps=1e-3), IMAGE, 0),
    "batch norm 3d": (lambda: nn.BatchNorm3d(3), (2, 3, 4, 6, 5), 0),
    "sync batch norm": (lambda: nn.SyncBatchNorm(8), IMAGE, 0),
    "batch norm + act (timm)": (lambda: timm.layers.BatchNormAct2d(8), IMAGE, 1 / 64),
    "batch norm + SiLU in place (timm)": (lambda: timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU), IMAGE, 1),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), IMAGE, None),
    "instance norm, tracked": (lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), IMAGE, 0),
    "instance norm": (lambda: nn.InstanceNorm2d(8), IMAGE, None),
    "layer norm": (lambda: nn.LayerNorm(8), TOKENS, None),
    "group norm": (lambda: nn.GroupNorm(4, 8), IMAGE, None),
    "relu": (lambda: nn.ReLU(), IMAGE, 1 / 64),
    "relu in place": (lambda: nn.ReLU(inplace=True), IMAGE, 1 / 64),
    "relu6": (lambda: nn.ReLU6(inplace=True), IMAGE, 1 / 64),
    "hardtanh": (lambda: nn.Hardtanh(-0.2, 0.3), IMAGE, 1 / 64),
    "leaky relu": (lambda: nn.LeakyReLU(0.1, inplace=True), IMAGE, 1 / 64),
    "prelu": (lambda: nn.PReLU(), IMAGE, 1 / 64),
    "prelu per channel": (lambda: nn.PReLU(8), IMAGE, 1 / 64),
    "hardsigmoid": (lambda: nn.Hardsigmoid(), IMAGE, 1 / 64),
    "max pool": (lambda: nn.MaxPool2d(3, 2, 1), IMAGE, 1 / 16),
    "max pool, dilated, uneven": (lambda: nn.MaxPool2d((3, 2), (2, 3), (1, 0), 2, ceil_mode=True), IMAGE, 1 / 16),
    "max pool, wide": (lambda: nn.MaxPool2d(5, 1, 2), (2, 3, 70, 70), 1 / 4),
    "avg pool": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE, 0),
    "adaptive avg pool": (lambda: nn.AdaptiveAvgPool2d((3, None)), IMAGE, 0),
    "adaptive avg pool to one": (lambda: nn.AdaptiveAvgPool2d(1), IMAGE, 0),
}
ODD = (3, 5, 7, 3)


def pair(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The lean form, in train mode, and the plain frozen reference."""
    torch.manual_seed(0)
    module = make().to(dtype).requires_grad_(False)
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    for parameter in module.parameters():
        parameter.uniform_(-1, 1)
    reference = copy.deepcopy(module).eval()
    form = frozen_form(module, lean=True)
    return (module if form is None else form).train(), reference


def run(module: nn.Module, x: Tensor, **autocast: object) -> tuple[Tensor, Tensor, int]:
    """Output, gradient of the input, and saved bytes that are no parameter or buffer."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    leaf = x.detach().clone().requires_grad_()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        # Times one: an in-place activation cannot work on a leaf.
        y = module(leaf * 1)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    assert leaf.grad is not None
    return y.detach(), leaf.grad, sum(kept.values())


def sample(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).mul(3).to(dtype)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_frozen_module_and_saves_less(name: str, channels_last: bool) -> None:
    make, shape, share = CASES[name]
    if channels_last and len(shape) != 4:
        pytest.skip("a memory format of images")
    lean, stock = pair(make)
    x = sample(shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y, grad, saved = run(lean, x)
    expected, expected_grad, stock_saved = run(stock, x)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    assert (grad - expected_grad).abs().max() <= 1e-12 * expected_grad.abs().max()
    assert grad.stride() == expected_grad.stride()
    assert saved <= stock_saved
    if share is not None:
        assert saved <= share * x.untyped_storage().nbytes() + 64


@pytest.mark.parametrize("name", CASES)
def test_names_class_and_tensors_stay(name: str) -> None:
    lean, stock = pair(CASES[name][0])
    assert isinstance(lean, type(stock))
    assert list(lean.state_dict()) == list(stock.state_dict())
    copied = copy.deepcopy(lean)
    assert type(copied) is type(lean)
    assert all(a is not b for a, b in zip(copied.parameters(), lean.parameters(), strict=True))
    assert frozen_form(lean, lean=True) is None


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CASES)
def test_autocast_casts_as_stock_does(name: str) -> None:
    make, shape, _ = CASES[name]
    lean, stock = pair(make, torch.float32)
    x = sample(shape, torch.float32)
    for given_dtype in (torch.float32, torch.bfloat16):
        y, grad, saved = run(lean, x.to(given_dtype), autocast=True)
        expected, expected_grad, stock_saved = run(stock, x.to(given_dtype), autocast=True)
        assert y.dtype == expected.dtype
        assert torch.equal(y, expected)
        assert grad.dtype == expected_grad.dtype
        assert (grad - expected_grad).abs().max() <= 1e-2 * expected_grad.abs().max()
        assert saved <= stock_saved


@pytest.mark.parametrize("name", ["linear", "conv2d", "batch norm 2d"])
def test_autocast_saves_no_copies(name: str) -> None:
    make, shape, _ = CASES[name]
    lean, stock = pair(make, torch.float32)
    x = sample(shape, torch.bfloat16)
    assert run(lean, x, autocast=True)[2] < run(stock, x, autocast=True)[2]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_norms_that_autocast_widens_keep_the_narrow_input(affine: bool, channels_last: bool) -> None:
    x = sample((2, 8, 5, 8), torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight, bias = (sample((8,), torch.float32), torch.ones(8)) if affine else (None, None)
    pairs = [
        (operators.WidenedLayerNorm, ([8], weight, bias, 1e-5), F.layer_norm),
        (operators.WidenedGroupNorm, (4, weight, bias, 1e-5), F.group_norm),
    ]
    for lean, arguments, stock in pairs:
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.dtype), t)[1], lambda t: t):
            y = lean.apply(a, *arguments)
        expected = stock(b.float(), *arguments)
        upstream = sample(tuple(y.shape), torch.float32)
        y.backward(upstream)
        expected.backward(upstream)
        assert torch.equal(y, expected)
        assert torch.equal(a.grad, b.grad)
        assert torch.bfloat16 in saved


@pytest.mark.parametrize("name", CASES)
def test_works_on_fake_tensors(name: str) -> None:
    make, shape, _ = CASES[name]
    with FakeTensorMode():
        module = make().requires_grad_(False)
        module = frozen_form(module, lean=True) or module
        x = torch.empty(shape, requires_grad=True)
        y = module.train()(x * 1)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    "name", ["conv2d", "batch norm 2d", "relu", "relu6", "leaky relu", "prelu", "max pool", "avg pool", "conv2d reflect"]
)
def test_twice_in_one_graph_and_twice_backward(name: str) -> None:
    lean, _ = pair(CASES[name][0])
    x = sample((1, 8, 6, 5)).requires_grad_()

    def twice(x: Tensor) -> Tensor:
        return (lean(x * 1) + lean(2 * x)).square()

    assert torch.autograd.gradcheck(twice, x)
    assert torch.autograd.gradgradcheck(twice, x)


@pytest.mark.parametrize("name", CASES)
def test_records_nothing_where_nothing_is_wanted(name: str) -> None:
    make, shape, _ = CASES[name]
    lean, stock = pair(make)
    x = sample(shape)
    assert torch.equal(lean(x.clone()), stock(x.clone()))
    assert not lean(x.clone()).requires_grad
    with torch.no_grad():
        assert not lean(x.clone().requires_grad_() * 1).requires_grad


@pytest.mark.parametrize(
    "name", ["conv2d", "conv transpose", "linear", "batch norm 2d", "layer norm", "group norm", "prelu", "instance norm, tracked"]
)
def test_a_weight_that_trains_after_all_gets_its_gradient(name: str) -> None:
    make, shape, _ = CASES[name]
    lean, stock = pair(make)
    for module in (lean, stock):
        module.requires_grad_(True)
        run(module, sample(shape))
    for mine, theirs in zip(lean.parameters(), stock.parameters(), strict=True):
        assert mine.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("name", [n for n in CASES if "norm" in n])
@pytest.mark.parametrize("lean", [False, True])
def test_norms_do_not_move_in_train_mode(name: str, lean: bool) -> None:
    make, shape, _ = CASES[name]
    module = make().requires_grad_(False)
    form = frozen_form(module, lean=lean) or module
    before = copy.deepcopy(form.state_dict())
    form.train()
    for _ in range(2):
        form(sample(shape, torch.float32).requires_grad_() * 1)
    assert all(torch.equal(before[k], v) for k, v in form.state_dict().items())


class OwnNorm(nn.BatchNorm2d):
    """A user's norm whose forward we do not know."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Kept(nn.Module):
    """A module kept whole, with an in-place activation whose result is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.own = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), OwnNorm(8)
        self.act, self.inplace = nn.ReLU(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.act(self.norm(self.conv(x))))
        self.inplace(x)
        return x


@pytest.mark.parametrize("make", [lambda: OwnNorm(8), Kept])
def test_unknown_modules_keep_their_forward_and_get_eval_semantics(make: Callable[[], nn.Module]) -> None:
    lean, stock = pair(make)
    before = copy.deepcopy(lean.state_dict())
    y, grad, saved = run(lean, sample(IMAGE))
    expected, expected_grad, stock_saved = run(stock, sample(IMAGE))
    assert torch.equal(y, expected)
    assert torch.allclose(grad, expected_grad, rtol=1e-12, atol=0)
    assert saved <= stock_saved
    assert all(torch.equal(before[k], v) for k, v in lean.state_dict().items())


@pytest.mark.parametrize("function", [activations.relu, activations.relu6, activations.hardsigmoid, activations.leaky_relu])
def test_extreme_values_behave_as_in_stock(function: Callable[[Tensor], Tensor]) -> None:
    stock = getattr(F, function.__name__)
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.0, -3.0, 6.0, 1e-40, -1e-40])
    for upstream in (1.0, float("inf"), float("nan")):
        grads = []
        for f in (function, stock):
            leaf = x.clone().requires_grad_()
            f(leaf).backward(torch.full_like(x, upstream))
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0, equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=0, max_size=70))
def test_packing_is_lossless(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = activations.pack(mask.clone())
    assert packed.numel() == -(-len(bits) // 8)
    assert torch.equal(activations.unpack(packed, len(bits)) != 0, mask)


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    half=st.booleans(),
    ceil=st.booleans(),
    size=st.tuples(st.integers(8, 12), st.integers(8, 12)),
)
def test_windows_of_every_shape(kernel, stride, dilation, half, ceil, size) -> None:  # type: ignore[no-untyped-def]
    padding = tuple(k // 2 if half else 0 for k in kernel)
    x = sample((2, 3, *size))
    pool = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)
    conv = nn.Conv2d(3, 2, kernel, stride, padding, dilation).double().requires_grad_(False)
    for module in (pool, conv):
        lean = frozen_form(module, lean=True)
        assert lean is not None
        for mine, theirs in zip(run(lean, x)[:2], run(module, x)[:2], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["conv2d", "batch norm + act (timm)", "relu", "max pool", "conv2d reflect", "linear"])
@pytest.mark.parametrize("autocast", [False, True])
def test_traces_whole_under_compile(name: str, autocast: bool) -> None:
    make, shape, _ = CASES[name]
    lean, stock = pair(make, torch.float32)
    compiled = torch.compile(lean, backend="aot_eager", fullgraph=True)
    arguments = {"autocast": True} if autocast else {}
    for mine, theirs in zip(
        run(compiled, sample(shape, torch.float32), **arguments), run(stock, sample(shape, torch.float32), **arguments), strict=False
    ):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine.float(), theirs.float(), rtol=1e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-5)


def test_functional_forms_take_stock_arguments() -> None:
    x = sample(IMAGE).requires_grad_()
    w = sample((4, 8, 3, 3))
    assert torch.equal(operators.conv(x, weight=w, padding="same"), F.conv2d(x, w, padding="same"))
    assert torch.equal(operators.conv(input=x, weight=w, stride=[2], padding=[1]), F.conv2d(x, w, stride=[2], padding=[1]))
    assert torch.equal(activations.max_pool2d(x, kernel_size=2), F.max_pool2d(x, 2))
    assert activations.max_pool2d(x, 2, return_indices=True)[1].dtype == torch.int64
    assert torch.equal(activations.adaptive_avg_pool2d(x, (None, 2)), F.adaptive_avg_pool2d(x, (None, 2)))
