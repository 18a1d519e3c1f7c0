from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import graphopt
from graphopt import BackboneError, GraphoptError, RunError
from graphopt.models.weights import to_safetensors
from graphopt.plan_file import FORMAT_KEY, FORMAT_VERSION
from graphopt.spec import from_table
from graphopt.train import export_run, load_run, train
from tests.support.backbones import Small
from tests.train import small
from tests.train.passes import Extra, Hold

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def run(folder: Path, passes: list[Any] | None = None, **changes: Any) -> Any:
    plan = small.plan(passes or [], drop=0.0)
    train(plan, folder, settings=small.settings(**changes), data=small.DATA)
    return plan


def output(state: dict[str, torch.Tensor]) -> torch.Tensor:
    net = Small(drop=0.0)
    net.load_state_dict(state, strict=True)
    return net.eval()(IMAGES)


def test_it_loads_strictly_into_the_untouched_backbone(tmp_path: Path) -> None:
    spec = from_table(
        {
            "name": "walks away",
            "backbone": {"source": "torchvision", "name": "resnet18", "arguments": {"num_classes": 10}, "input": [3, 32, 32]},
            "data": {"name": "digits", "train_limit": 32, "eval_limit": 20},
            "train": {"epochs": 1, "batch": 16, "device": "cpu"},
        }
    )
    train(spec, tmp_path / "run")
    path = export_run(tmp_path / "run", tmp_path / "model.safetensors")
    import torchvision

    net = torchvision.models.resnet18(num_classes=10)
    net.load_state_dict(load_file(path), strict=True)
    with safe_open(path, "pt") as file:
        found = file.metadata()
        assert len(found.pop("checksum")) == 32
        assert found == {"format": "pt", "name": "walks away", "digest": spec.digest, "epochs": "1", "weights": "model"}
        assert list(file.keys()) == sorted(net.state_dict())


def test_it_gives_the_output_that_was_evaluated(tmp_path: Path) -> None:
    plan = run(tmp_path / "run", [Hold(select="blocks.0", when={"epoch": 1})])
    state = load_file(export_run(tmp_path / "run", tmp_path / "m.safetensors", which="last", plan=plan))
    assert small.same(state, small.weights(tmp_path / "run"))
    trained = load_run(tmp_path / "run", which="last", plan=plan)
    assert len(trained.decisions) == 1
    assert torch.equal(output(state), trained.module.eval()(IMAGES))


def test_parameters_of_a_pass_stay_behind(tmp_path: Path) -> None:
    plan = run(tmp_path / "run", [Extra(when={"epoch": 1})])
    state = load_file(export_run(tmp_path / "run", tmp_path / "m.safetensors", which="last", plan=plan))
    assert "blocks.0.extra" in small.weights(tmp_path / "run")
    assert state.keys() == Small().state_dict().keys()


def test_a_run_loads_as_a_module(tmp_path: Path) -> None:
    plan = run(tmp_path / "run", [Extra(when={"epoch": 1})])
    for source, expected in ((tmp_path / "run", "best.pt"), (tmp_path / "run" / "last.pt", "last.pt")):
        module = graphopt.load(source, plan=plan)
        assert not module.training
        assert small.same(module.state_dict(), small.weights(tmp_path / "run", expected))
    with pytest.raises(RunError, match="compiled by hand"):
        graphopt.load(tmp_path / "run")


def test_best_last_and_averaged(tmp_path: Path) -> None:
    plan = run(tmp_path / "run", ema=0.5, keep=9)
    made = {
        (which, kind): load_file(export_run(tmp_path / "run", tmp_path / "m.safetensors", which=which, weights=kind, plan=plan))
        for which in ("best", "last")
        for kind in ("model", "ema", "auto")
    }
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert small.same(made["last", "ema"], last["phase"]["ema"])
    assert small.same(made["last", "model"], last["phase"]["model"])
    assert small.same(made["last", "auto"], last["phase"][last["progress"]["weights"]])
    one = load_file(export_run(tmp_path / "run" / "epoch-0000.pt", tmp_path / "m.safetensors", weights="model", plan=plan))
    assert not small.same(one, made["last", "model"])


def test_the_file_is_what_its_name_says(tmp_path: Path) -> None:
    plan = run(tmp_path / "run", epochs=1)
    state = load_file(export_run(tmp_path / "run", tmp_path / "m.safetensors", plan=plan))
    assert small.same(torch.load(export_run(tmp_path / "run", tmp_path / "m.pt", plan=plan), weights_only=True), state)
    for name in ("m.onnx", "m.bin"):
        with pytest.raises(RunError, match=r"Name it m\.safetensors"):
            export_run(tmp_path / "run", tmp_path / name, plan=plan)
    with pytest.raises(RunError, match="not be what its name says"):
        graphopt.save(plan, tmp_path / "plan.pt")


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run"):
        export_run(tmp_path / "nowhere", tmp_path / "m.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no checkpoint yet"):
        export_run(tmp_path / "empty", tmp_path / "m.safetensors")
    plan = run(tmp_path / "run", epochs=1)
    with pytest.raises(RunError, match="has no averaged weights"):
        export_run(tmp_path / "run", tmp_path / "m.safetensors", weights="ema", plan=plan)
    with pytest.raises(RunError, match="compiled by hand"):
        export_run(tmp_path / "run", tmp_path / "m.safetensors")
    with pytest.raises(RunError, match="another spec"):
        export_run(tmp_path / "run", tmp_path / "m.safetensors", plan=small.plan([Hold()]))
    with pytest.raises(RunError, match="no such folder"):
        export_run(tmp_path / "run", tmp_path / "no" / "m.safetensors", plan=plan)
    with pytest.raises(RunError, match="is a folder"):
        export_run(tmp_path / "run", tmp_path / "empty", plan=plan)
    assert not (tmp_path / "m.safetensors").exists()


def test_a_run_of_code_is_exported_with_trust_only(tmp_path: Path) -> None:
    spec = from_table(
        {
            "name": "code",
            "backbone": {"source": "python", "name": "tests.support.backbones:Small", "input": [3, 8, 8]},
            "data": {"name": "digits", "train_limit": 32, "eval_limit": 20},
            "train": {"epochs": 1, "batch": 16, "device": "cpu"},
        }
    )
    with pytest.raises(BackboneError, match="trust"):
        train(spec, tmp_path / "untrusted")
    train(spec, tmp_path / "run", trust=True)
    with pytest.raises(GraphoptError, match="trust"):
        export_run(tmp_path / "run", tmp_path / "m.safetensors")
    assert load_file(export_run(tmp_path / "run", tmp_path / "m.safetensors", trust=True)).keys() == Small().state_dict().keys()


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that has kept the checkpoints of all three epochs, and its plan."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    plan = run(folder, keep=5, log_every=100)
    (folder / "epoch-0002.pt").unlink()  # a further name of the last one
    return folder, plan


@pytest.mark.parametrize(
    ("lost", "damaged", "which", "used"),
    [
        ((), (), "last", "last"),
        (("best", "last"), (), "best", "previous"),
        (("best",), ("last",), "best", "previous"),
        ((), ("best",), "best", "last"),
        ((), ("last",), "last", "previous"),
        (("last", "best"), ("previous", "epoch-0001"), "last", "epoch-0000"),
        ((), ("last", "best", "previous", "epoch-0001", "epoch-0000"), "last", None),
    ],
    ids=str,
)
def test_the_newest_whole_checkpoint_is_used_where_one_is_lost_or_damaged(
    kept: tuple[Path, Any], lost: tuple[str, ...], damaged: tuple[str, ...], which: Any, used: str | None, tmp_path: Path, recwarn: Any
) -> None:
    folder, plan = Path(shutil.copytree(kept[0], tmp_path / "run")), kept[1]
    for name in lost:
        (folder / f"{name}.pt").unlink()
    for name in damaged:
        (folder / f"{name}.pt").write_bytes((folder / f"{name}.pt").read_bytes()[:-100])
    if used is None:
        with pytest.raises(RunError, match=r"last\.pt: is damaged.*There is no other checkpoint that is whole"):
            load_run(folder, which=which, plan=plan)
        return
    expected = small.weights(folder, f"{used}.pt")
    assert small.same(load_run(folder, which=which, plan=plan).module.state_dict(), expected)
    said = [str(warning.message) for warning in recwarn]
    assert bool(said) == bool(lost or damaged)
    assert all(f"; {used}.pt (epoch " in text and ("last.pt: " in text or "best.pt: " in text) for text in said), said


def test_a_damaged_checkpoint_that_was_named_is_an_error_with_the_whole_ones(kept: tuple[Path, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kept[0], tmp_path / "run"))
    for name in ("last.pt", "best.pt"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(RunError, match=r"best\.pt: is damaged or not a checkpoint\. Use previous\.pt or epoch-"):
        load_run(folder / "best.pt", plan=kept[1])


def test_the_end_of_an_epoch_is_found_beside_damaged_checkpoints(kept: tuple[Path, Any], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kept[0], tmp_path / "run"))
    for name in ("last.pt", "best.pt", "previous.pt"):
        (folder / name).write_bytes(b"x")
    assert small.same(load_run(folder, epoch=0, plan=kept[1]).module.state_dict(), small.weights(folder, "epoch-0000.pt"))
    with pytest.raises(RunError, match=r"no checkpoint of the end of epoch 2\. There are those of epoch 0, 1; .*damaged: .*last\.pt"):
        load_run(folder, epoch=2, plan=kept[1])


@pytest.mark.parametrize("decisions", [None, "{", "3", "null", '[{"a": 1}]', "[" * 100_000])
def test_a_plan_file_that_does_not_say_which_plan_it_holds_is_one_error(decisions: str | None, tmp_path: Path) -> None:
    about = {FORMAT_KEY: FORMAT_VERSION, "digest": "", "spec": ""} | ({} if decisions is None else {"decisions": decisions})
    (tmp_path / "plan.safetensors").write_bytes(to_safetensors({"w": torch.zeros(1)}, about))
    with pytest.raises(RunError, match="does not say which plan"):
        graphopt.load(tmp_path / "plan.safetensors")
