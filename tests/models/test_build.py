"""Backbones by name, what they refuse, and weights that fit or say how they do not."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graphopt.driver import build_backbone as build
from graphopt.errors import BackboneError, WeightsError
from graphopt.models.catalog import CIFAR_DEPTHS, names
from graphopt.models.cifar_resnet import CifarResNet
from graphopt.models.weights import load_weights, to_safetensors
from graphopt.spec import BackboneSpec, WeightsSpec, resolve


def spec(source: str, name: str, **arguments: Any) -> BackboneSpec:
    return BackboneSpec(source=source, name=name, arguments=arguments, input=(3, 32, 32))  # type: ignore[arg-type]


@pytest.mark.parametrize(("depth", "parameters"), [(20, 272_474), (32, 466_906), (44, 661_338), (56, 855_770), (110, 1_730_714)])
def test_cifar_resnets_have_the_published_size(depth: int, parameters: int) -> None:
    module = build(spec("cifar", f"resnet{depth}"))
    assert sum(p.numel() for p in module.parameters()) == parameters
    blocks = [name for name, inner in module.named_modules() if type(inner).__name__ == "BasicBlock"]
    assert len(blocks) == (depth - 2) // 2
    assert blocks[0] == "layer1.0"


@pytest.mark.parametrize(("depth", "classes", "channels", "size"), [(20, 7, 1, 16), (8, 10, 3, 32), (14, 2, 4, 8)])
def test_cifar_resnets_of_other_shapes(depth: int, classes: int, channels: int, size: int) -> None:
    module = CifarResNet(depth, classes, channels)
    assert module(torch.zeros(2, channels, size, size)).shape == (2, classes)


def test_every_published_depth_is_listed() -> None:
    assert names("cifar") == [*(f"resnet{depth}" for depth in CIFAR_DEPTHS), "vgg11", "vgg13", "vgg16", "vgg19"]


@pytest.mark.parametrize(
    ("text", "kind", "shape"),
    [
        ("timm/resnet18", "ResNet", (3, 224, 224)),
        ("torchvision/mobilenet_v3_small", "MobileNetV3", (3, 224, 224)),
        ("cifar/resnet20", "CifarResNet", (3, 32, 32)),
    ],
)
def test_source_and_name(text: str, kind: str, shape: tuple[int, ...]) -> None:
    found = resolve(text)
    assert found.input == shape
    module = build(found)
    assert type(module).__name__ == kind
    assert module.training


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segmentation builder of torchvision downloads its backbone's weights by default."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("downloaded")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert isinstance(build(spec("torchvision", "lraspp_mobilenet_v3_large")), nn.Module)


#: (source, name, arguments, what the message must contain)
REFUSED = [
    ("timm", "resnet5o", {}, ["timm has no model 'resnet5o'", "'resnet50'"]),
    ("torchvision", "resnet27", {}, ["Did you mean 'resnet"]),
    ("torchvision", "resnet26d", {}, ['source = "timm"']),
    ("cifar", "alexnet", {}, ["cifar has no model 'alexnet'"]),
    ("cifar", "resnet21", {}, ["6n+2", "110"]),
    ("timm", "hf-hub:timm/resnet18", {}, ["would be downloaded", "weights ="]),
    ("timm", "local-dir:/tmp", {}, ["would be downloaded"]),
    ("timm", "resnet18", {"pretrained": True}, ["'pretrained' would download weights", "weights ="]),
    ("torchvision", "resnet18", {"weights": "DEFAULT"}, ["'weights' would download"]),
    ("timm", "resnet18", {"num_clases": 3}, ["takes no argument 'num_clases'", "Did you mean 'num_classes'", "in_chans"]),
    ("torchvision", "resnet18", {"num_clases": 3}, ["takes no argument 'num_clases'", "Did you mean 'num_classes'", "norm_layer"]),
    ("cifar", "resnet20", {"width": 3}, ["takes no argument 'width'", "It takes num_classes, in_chans"]),
    ("cifar", "resnet20", {"num_classes": "ten"}, ["does not take arguments", "ten", "num_classes"]),
    ("python", "backbones_of_mine:make", {}, ["Python code", "--trust"]),
]


@pytest.mark.parametrize(("source", "name", "arguments", "parts"), REFUSED, ids=[f"{c[0]}/{c[1]} {list(c[2])}" for c in REFUSED])
def test_refused(source: str, name: str, arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(BackboneError) as caught:
        build(spec(source, name, **arguments))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet50", "source/name"),
        ("tim/resnet50", "Did you mean 'timm'"),
        ("timm/resnet5o", "'resnet50'"),
        ("python/a.b:c", "--input"),
    ],
)
def test_shorthand_that_is_none(text: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        resolve(text)


FACTORY = """
from torch import nn
def small(classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
class Holder:
    @staticmethod
    def make():
        return nn.Linear(2, 2)
number = 3
def text():
    return "no module"
def broken():
    raise RuntimeError("out of luck")
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of factories in the working directory."""
    (tmp_path / "backbones_of_mine.py").write_text(FACTORY)
    (tmp_path / "broken_of_mine.py").write_text("import nothing_of_that_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("backbones_of_mine", "broken_of_mine"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("factories")
def test_a_factory_from_the_working_directory() -> None:
    module = build(spec("python", "backbones_of_mine:small", classes=3), trust=True)
    assert module(torch.zeros(1, 3, 2, 2)).shape == (1, 3)
    assert isinstance(build(spec("python", "backbones_of_mine:Holder.make"), trust=True), nn.Linear)
    assert isinstance(build(spec("python", "backbones_of_mine.py:Holder.make"), trust=True), nn.Linear)


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("backbones_of_mine", {}, "is not package.module:name or file.py:name"),
        ("nowhere_at_all:make", {}, "working directory"),
        ("nowhere_at_all.py:make", {}, "no file 'nowhere_at_all.py'"),
        ("broken_of_mine:make", {}, "does not import"),
        ("broken_of_mine.py:make", {}, "does not import"),
        ("backbones_of_mine:smal", {}, "Did you mean 'small'"),
        ("backbones_of_mine:number", {}, "not a factory"),
        ("backbones_of_mine:text", {}, "not a torch.nn.Module"),
        ("backbones_of_mine:broken", {}, "out of luck"),
        ("backbones_of_mine:small", {"clases": 2}, "Did you mean 'classes'"),
    ],
)
def test_a_factory_that_is_none(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        build(spec("python", name, **arguments), trust=True)


def other() -> CifarResNet:
    torch.manual_seed(1)
    return CifarResNet(8)


@pytest.mark.parametrize("form", ["safetensors", "pt", "nested", "state_dict", "ddp", "compiled", "lightning"])
def test_weights_in_every_form(form: str, tmp_path: Path) -> None:
    state = other().state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        forms = {
            "pt": state,
            "nested": {"model": state, "epoch": 3},
            "state_dict": {"state_dict": state},
            "ddp": {f"module.{key}": value for key, value in state.items()},
            "lightning": {"state_dict": {f"model.{key}": value for key, value in state.items()}, "pytorch-lightning_version": "2.5"},
            "compiled": {f"module._orig_mod.{key}": value for key, value in state.items()},
        }
        torch.save(forms[form], path)
    named = BackboneSpec(source="cifar", name="resnet8", input=(3, 32, 32), weights=str(path))
    module = build(named)
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key])
    # A plan whose state comes from a checkpoint does not need the file any more.
    path.unlink()
    build(named, weights=False)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = CifarResNet(14, num_classes=7).state_dict()
    del state["conv1.weight"]
    save_file(state, tmp_path / "w.safetensors")
    module = CifarResNet(8)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(module, tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "1 missing (conv1.weight)" in message
    assert "36 unexpected (layer1.1." in message
    assert "and 31 more" in message
    assert "2 of another shape (fc.weight (7, 64), the backbone's is (10, 64)" in message
    assert "w.safetensors" in message
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_flipped_bit_of_a_weight_is_refused(name: str, tmp_path: Path) -> None:
    state, path = other().state_dict(), tmp_path / name
    if name == "w.pt":
        torch.save(state, path)
    else:
        path.write_bytes(to_safetensors(state, {"format": "pt"}))
    content = bytearray(path.read_bytes())
    content[content.find(state["fc.weight"].numpy().tobytes()) + 5] ^= 64
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}: is damaged"):
        load_weights(CifarResNet(8), path)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def test_no_code_from_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Evil()}, tmp_path / "w.pt")
    with pytest.raises(BackboneError, match="runs no code"):
        load_weights(CifarResNet(8), tmp_path / "w.pt")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"junk", "cannot be read as weights"),
        ("w.pt", b"junk", "weights"),
        ("w.pt", b"", "cannot be read as weights"),
        ("w.pt", None, "no such weights file"),
    ],
)
def test_files_that_are_no_weights(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match=message):
        load_weights(CifarResNet(8), tmp_path / name)


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "w.pt")
    with pytest.raises(BackboneError, match="holds no state dict"):
        load_weights(CifarResNet(8), tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("source", "name", "arguments"),
    [("cifar", "resnet6000002", {}), ("timm", "vit_tiny_patch16_224", {"depth": 100_000}), ("cifar", "resnet8", {"num_classes": 10**10})],
)
def test_a_network_beyond_the_machine_is_refused_while_it_is_built(source: str, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(BackboneError, match=r"more than 10,000 modules|take more than .* half of the memory|can't allocate memory"):
        build(spec(source, name, **arguments))
    assert build(spec("cifar", "resnet8")) is not None  # nothing is counted afterwards


# -- fine-tuning ------------------------------------------------------------------------------------------------------------
def test_a_new_head(tmp_path: Path) -> None:
    state = CifarResNet(8, num_classes=7).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.manual_seed(5)
    expected = CifarResNet(8).state_dict()
    torch.manual_seed(5)
    given = WeightsSpec(file=str(tmp_path / "w.safetensors"), reset=("fc",))
    module = build(BackboneSpec(source="cifar", name="resnet8", input=(3, 32, 32), weights=given))
    for key, value in module.state_dict().items():
        assert torch.equal(value, expected[key] if key.startswith("fc.") else state[key]), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r'To train a new head: weights = \{ file = "w.safetensors", reset = \["fc"\] \}; else check num_classes'),
        ({"reset": ("head",)}, "has no module 'head' with weights to reset"),
        ({"reset": ("fcc",)}, "Did you mean 'fc'"),
        ({"reset": ("layer1",)}, r'reset = \["layer1", "fc"\]'),
        ({"entry": "model"}, "holds no state dict under 'model'"),
    ],
)
def test_weights_of_another_number_of_classes(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file(CifarResNet(8, num_classes=7).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=message):
        load_weights(CifarResNet(8), tmp_path / "w.safetensors", **changes)


def test_a_file_without_a_head_names_the_option_too(tmp_path: Path) -> None:
    state = {key: value for key, value in CifarResNet(8).state_dict().items() if not key.startswith("fc.")}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r'2 missing .*reset = \["fc"\]'):
        load_weights(CifarResNet(8), tmp_path / "w.safetensors")
    load_weights(CifarResNet(8), tmp_path / "w.safetensors", reset=["fc"])


def test_checkpoints_of_the_training_scripts_of_timm_and_torchvision(tmp_path: Path) -> None:
    plain, averaged = CifarResNet(8).state_dict(), other().state_dict()
    options = argparse.Namespace(model="resnet8", lr=0.1, mean=None, opt_betas=[0.9, 0.999])
    timm = {"epoch": 3, "arch": "resnet8", "state_dict": plain, "state_dict_ema": averaged, "args": options, "version": 2}
    # torchvision averages with torch's AveragedModel.
    ema = {"n_averaged": torch.tensor(3), **{f"module.{key}": value for key, value in averaged.items()}}
    torchvision = {"model": plain, "model_ema": ema, "optimizer": {"state": {}}, "args": options}
    for name, content, entry in (("timm", timm, "state_dict"), ("torchvision", torchvision, "model")):
        torch.save(content, tmp_path / "w.pt")
        for chosen, expected in ((None, averaged), (entry, plain)):
            module = CifarResNet(8)
            load_weights(module, tmp_path / "w.pt", entry=chosen)
            assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items()), (name, chosen)
    torch.save({"teacher": plain, "epoch": 1}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r'Name one of its entries: .*entry = "teacher"'):
        load_weights(CifarResNet(8), tmp_path / "w.pt")
    load_weights(CifarResNet(8), tmp_path / "w.pt", entry="teacher")


VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3, "patch_size": 8}


def test_weights_of_another_input_size_are_adapted_by_the_library(tmp_path: Path) -> None:
    import timm
    from torchvision.models import VisionTransformer

    def of_timm(size: int) -> nn.Module:
        return timm.create_model("vit_tiny_patch16_224", img_size=size, **VIT)

    def of_torchvision(size: int) -> nn.Module:
        return VisionTransformer(image_size=size, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16, num_classes=3)

    for make, key in ((of_timm, "pos_embed"), (of_torchvision, "encoder.pos_embedding")):
        small, large = make(32), make(48)
        save_file(small.state_dict(), tmp_path / "w.safetensors")
        load_weights(large, tmp_path / "w.safetensors")
        found, given = large.state_dict(), small.state_dict()
        assert found[key].shape[1] == 37
        assert found[key].std() == pytest.approx(float(given[key].std()), rel=0.5)
        assert all(torch.equal(found[name], value) for name, value in given.items() if name != key)
    torch.manual_seed(0)
    head = timm.create_model("vit_tiny_patch16_224", img_size=48, **{**VIT, "num_classes": 5})
    save_file(of_timm(32).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r'reset = \["head"\]'):
        load_weights(head, tmp_path / "w.safetensors")
    load_weights(head, tmp_path / "w.safetensors", reset=["head"])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({3: torch.zeros(1)}, "holds no state dict"),
        ({"0.weight": torch.zeros(2, 2).to_sparse()}, "0.weight is sparse"),
        ({"0.weight": torch.zeros(2, 2, device="meta")}, "without values"),
        ({"0.weight": torch.zeros(2, 2, dtype=torch.complex64)}, "1 complex, the backbone's are not"),
    ],
)
def test_weights_that_are_no_plain_tensors_are_refused(changed: dict[Any, torch.Tensor], says: str, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    torch.save({**module.state_dict(), **changed}, tmp_path / "w.pt")
    with pytest.raises(BackboneError, match=says):
        load_weights(module, tmp_path / "w.pt")
