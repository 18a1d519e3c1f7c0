"""What a bad disk, a kill and a diverging run do to a run's folder, and what becomes of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graphopt import GraphoptError, RunError
from graphopt.spec import Spec, from_table
from graphopt.train import Stopped, Summary, export_run, train
from graphopt.train.checkpoint import load_checkpoint
from graphopt.train.evaluation import Meter
from graphopt.train.folder import RunFolder
from graphopt.train.phase import Phase
from tests.train import small
from tests.train.passes import Hold

SETTINGS: dict[str, Any] = {"epochs": 3, "checkpoint_steps": 4, "ema": 0.9, "optimizer": {"name": "adamw", "lr": 0.01}}
PARTS = ("phase", "history", "buffers", "decisions", "phases")


def go(folder: Path, **more: Any) -> Summary:
    changes = {key: more.pop(key) for key in list(more) if key not in ("resume", "data", "console")}
    arguments = {"data": small.interrupting(10**9), **more}
    return train(small.plan(), folder, settings=small.settings(**{**SETTINGS, **changes}), **arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs of six steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    go(folder)
    return folder


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    with pytest.raises(Stopped):
        go(folder, data=small.interrupting(150))
    return folder


@pytest.fixture
def run(halfway: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halfway, tmp_path / "run"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flatten(part, f"{name}.{key}")
    else:
        yield name, value


def assert_same_result(one: Path, other: Path, name: str = "last.pt") -> None:
    first, second = (dict(flatten({part: load_checkpoint(folder / name)[part] for part in PARTS})) for folder in (one, other))
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key], key


# -- damaged checkpoints ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("others", [("previous.pt", "best.pt"), ("best.pt",)], ids=["previous", "best"])
def test_a_damaged_last_checkpoint_is_replaced_by_the_one_before(run: Path, finished: Path, others: tuple[str, ...]) -> None:
    zeroed = bytearray((run / "last.pt").read_bytes())
    zeroed[len(zeroed) // 2 :][:4096] = bytes(4096)
    (run / "last.pt").write_bytes(bytes(len(zeroed)))
    for path in run.glob("*.pt"):
        if path.name not in ("last.pt", *others):
            path.unlink()
    go(run, resume=True)
    (said,) = (record["message"] for record in small.records(run, "resume"))
    assert re.search(rf"last\.pt: is damaged.*; {others[0]} \(epoch 1, step \d\) is used in its place", said)
    assert_same_result(run, finished)


def test_a_run_whose_every_checkpoint_is_damaged_says_so_and_stays(run: Path) -> None:
    for path in run.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    before = files(run)
    with pytest.raises(RunError, match=r"last\.pt: is damaged") as raised:
        go(run, resume=True)
    assert "weights_only" not in str(raised.value)
    assert files(run) == before


@pytest.mark.parametrize("content", [b"", b"x", b"hello", b"PK\x03\x04 half an archive"])
def test_the_message_for_garbage_gives_no_advice_of_torch(run: Path, content: bytes) -> None:
    (run / "last.pt").write_bytes(content)
    with pytest.raises(RunError) as raised:
        load_checkpoint(run / "last.pt")
    assert str(raised.value) == f"{run}/last.pt: is damaged or not a checkpoint. Use previous.pt or best.pt in its place"


def test_a_flip_in_the_best_checkpoint_is_not_exported(run: Path, tmp_path: Path) -> None:
    content = bytearray((run / "best.pt").read_bytes())
    where = content.find(load_checkpoint(run / "best.pt")["phase"]["model"]["fc.weight"].numpy().tobytes())
    content[where + 5] ^= 64
    (run / "best.pt").unlink()
    (run / "best.pt").write_bytes(content)
    with pytest.warns(UserWarning, match=r"best\.pt: is damaged.*; last\.pt \(epoch 1, step \d\) is used in its place"):
        export_run(run, tmp_path / "model.safetensors", weights="model", plan=small.plan())
    assert small.same(load_file(tmp_path / "model.safetensors"), small.weights(run))


@pytest.mark.parametrize("change", [{"progress": {"epoch": -5}}, {"settings": None}, {}])
def test_a_checkpoint_that_was_edited_is_damaged(run: Path, change: dict[str, Any]) -> None:
    state = torch.load(run / "last.pt", weights_only=True)
    state = {**state, **change} if change else {"graphopt": state["graphopt"]}
    for path in run.glob("*.pt"):
        path.unlink()
    torch.save(state, run / "last.pt")
    with pytest.raises(RunError, match="its content is not what was written"):
        go(run, resume=True)


def test_a_checkpoint_of_another_spec_is_refused_by_its_digest(run: Path, tmp_path: Path) -> None:
    train(small.plan([Hold(when={"epoch": 9})]), tmp_path / "other", settings=small.settings(**{**SETTINGS, "epochs": 1}), data=small.DATA)
    shutil.copy(tmp_path / "other" / "last.pt", run / "last.pt")
    with pytest.raises(RunError, match=r"last\.pt: it was made with another spec"):
        go(run, resume=True)


# -- what is not finite ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", ["weights", "averaged", "optimizer"])
@pytest.mark.parametrize("step", [8, 18], ids=["before a checkpoint", "at the last step"])
def test_an_update_that_is_not_finite_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, step: int) -> None:
    original = Phase.step

    def spoiled(phase: Phase, batches: Any, done: int) -> Any:
        result = original(phase, batches, done)
        if done + 1 == step:
            weight = phase.plan.module.get_parameter("fc.weight")
            averaged = phase.ema.module.get_parameter("fc.weight") if phase.ema is not None else weight
            tensors = {"weights": weight.data, "averaged": averaged.data, "optimizer": phase.optimizer.state[weight]["exp_avg"]}
            tensors[part][0, 0] = float("nan")
        return result

    monkeypatch.setattr(Phase, "step", spoiled)
    name = {"weights": "fc.weight", "averaged": "averaged fc.weight", "optimizer": "optimizer state of fc.weight"}[part]
    with pytest.raises(RunError, match=f"not finite after step {step} .*: {name}.*the last checkpoint is from before"):
        go(tmp_path)
    for path in tmp_path.glob("*.pt"):
        state = load_checkpoint(path)
        assert state["progress"]["total"] < step
        assert all(v.isfinite().all() for _, v in flatten(state["phase"]) if isinstance(v, torch.Tensor))
    assert not (tmp_path / "summary.json").exists()


def test_a_loss_of_the_evaluation_that_is_not_finite_is_no_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    infinite = Meter(1, torch.tensor([float("inf"), 0.0, 1.0, 1.0]))
    monkeypatch.setattr("graphopt.train.run.evaluate", lambda *_, **__: infinite)
    with pytest.raises(RunError, match="the evaluation's loss became"):
        go(tmp_path, epochs=1, checkpoint_steps=None)
    assert not list(tmp_path.glob("*.pt"))


def test_buffers_may_hold_infinity_on_purpose(tmp_path: Path) -> None:
    plan = small.plan()
    plan.module.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    assert train(plan, tmp_path, settings=small.settings(epochs=1), data=small.DATA).epochs == 1


# -- killed and refused -----------------------------------------------------------------------------------------------------------
class _Killed(BaseException):
    """In place of SIGKILL: nothing but `finally` runs, and files stay as they are."""


def killing(monkeypatch: pytest.MonkeyPatch, call: str, accept: Callable[..., bool]) -> None:
    original = getattr(os, call)

    def die(*arguments: Any, **more: Any) -> Any:
        if accept(*arguments):
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
            raise _Killed
        return original(*arguments, **more)

    monkeypatch.setattr(os, call, die)


@pytest.mark.parametrize(
    ("call", "name"),
    [("link", "best.pt"), ("replace", "best.pt"), ("link", "previous.pt"), ("replace", "previous.pt"), ("replace", "last.pt")],
)
def test_killed_while_a_better_checkpoint_gets_its_names_the_best_is_right(tmp_path: Path, finished: Path, call: str, name: str) -> None:
    best = load_checkpoint(finished / "best.pt")["progress"]["best_epoch"]
    dead = False

    def last_improvement(source: Any, target: Any, *_: Any) -> bool:
        nonlocal dead
        at = os.path.basename(target).strip(".").removesuffix(".link") == name
        dead |= at and len(small.records(tmp_path, "epoch")) == best + 1
        return dead

    with pytest.MonkeyPatch.context() as patch:
        killing(patch, call, last_improvement)
        with pytest.raises(_Killed):
            go(tmp_path)
    go(tmp_path, resume=True)
    assert_same_result(tmp_path, finished)
    assert_same_result(tmp_path, finished, "best.pt")
    assert not list(tmp_path.glob(".*"))


def test_what_killed_processes_have_left_is_removed(run: Path) -> None:
    names = [
        ".last.pt.ab12_x9z",
        ".best.pt.link",
        ".epoch-0003.pt.link",
        ".spec.toml.12345678",
        ".summary.json.abcdefgh",
        ".run.json.abcdefgh",
    ]
    for name in (*names, ".hidden", "notes.txt", ".last.pt.of-somebody-else"):
        (run / name).write_text("x")
    go(run, resume=True)
    assert {path.name for path in run.glob(".*")} == {".hidden", ".last.pt.of-somebody-else"}
    assert (run / "notes.txt").exists()


def test_a_refused_resume_changes_nothing(run: Path) -> None:
    (run / ".last.pt.ab12_x9z").write_text("x")
    before = files(run)
    for changes in ({"optimizer": {"name": "adamw", "lr": 0.5}}, {"batch": 48}):
        with pytest.raises(RunError, match="can only be resumed with the settings") as refused:
            go(run, resume=True, **changes)
        assert ("train.optimizer.lr was 0.01 and is 0.5" in str(refused.value)) == ("optimizer" in changes)
        assert "{" not in str(refused.value), "only what differs, no whole tables"
        assert files(run) == before
    with pytest.raises(RunError, match="another spec"):
        train(small.plan([Hold()]), run, settings=small.settings(**SETTINGS), data=small.DATA, resume=True)
    with pytest.raises(RunError, match="holds a run already"):
        go(run)
    assert files(run) == before


def spec(**passes: Any) -> Spec:
    table = {
        "backbone": {"source": "cifar", "name": "resnet8", "input": [3, 8, 8]},
        "pass": [{"use": "freeze", **passes}],
        "data": {"name": "digits", "train_limit": 32, "eval_limit": 20},
        "train": {"epochs": 1, "batch": 16, "device": "cpu"},
    }
    return from_table(table)


def test_a_spec_that_does_not_compile_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="layer9"):
        train(spec(select="layer9"), tmp_path / "deep" / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(Exception, match="layer9"):
        train(spec(select="layer9"), tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert train(spec(select="layer1"), tmp_path / "mine").epochs == 1


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensorboard: bool) -> None:
    def fail(*_: Any) -> None:
        raise RunError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Phase, "step", fail)
        with pytest.raises(RunError, match="out of memory"):
            train(small.plan(), tmp_path / "run", settings=small.settings(epochs=1), data=small.DATA, tensorboard=tensorboard)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_checkpoint_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Phase, "not_finite", lambda _: ["fc.weight"])
        with pytest.raises(RunError, match="not finite after") as raised:
            go(tmp_path)
    assert "from before" not in str(raised.value)
    assert len(small.records(tmp_path, "step")) == 2, "steps were made: what they measured stays"
    train(small.plan([Hold()]), tmp_path, settings=small.settings(epochs=1), data=small.DATA)
    assert [record["step"] for record in small.records(tmp_path, "step")] == [2, 4, 6]


@pytest.mark.parametrize("content", [None, "{", '{"graphopt": 1}'])
def test_a_damaged_manifest_is_written_anew(run: Path, finished: Path, content: str | None) -> None:
    (run / "run.json").unlink() if content is None else (run / "run.json").write_text(content)
    with pytest.raises(RunError, match="Continue it with --resume" if content is not None else "not a run of graphopt"):
        go(run)
    with pytest.raises(RunError, match="another spec"):
        train(small.plan([Hold()]), run, settings=small.settings(**SETTINGS), data=small.DATA, resume=True)
    go(run, resume=True)
    assert json.loads((run / "run.json").read_text())["digest"] == small.plan().digest
    assert_same_result(run, finished)


@pytest.mark.parametrize("cut", [1, 10_000])
def test_metrics_cut_in_the_middle_of_a_line_are_repaired(run: Path, finished: Path, cut: int) -> None:
    content = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(content[: max(0, len(content) - cut)])
    go(run, resume=True)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["kind"] == "epoch"
    assert_same_result(run, finished)


def test_two_damaged_things_at_once(run: Path, finished: Path) -> None:
    (run / "run.json").write_text("")
    (run / "last.pt").write_bytes(b"")
    go(run, resume=True)
    assert_same_result(run, finished)


def test_best_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder = RunFolder.claim(tmp_path / "run", "digest", resume=False)
    (tmp_path / "run" / "best.pt").mkdir()
    with pytest.raises(RunError, match=r"run/best\.pt: could not be written: is a directory"):
        folder.save({"graphopt": 3}, best=True)
    folder.release()


def test_a_resumed_run_says_what_of_its_settings_has_changed(run: Path) -> None:
    go(run, resume=True, log_every=3)
    (record,) = small.records(run, "resume")
    assert record["message"] == "train.log_every was 2 and is 3"


def test_a_phase_that_cannot_train_on_cached_features_is_refused_before_the_first_step(tmp_path: Path) -> None:
    passes = [
        {"use": "drop", "cache": "disk", "force": True, "when": {"epoch": 1}, "upto": "bn1"},
        {"use": "supervise", "cuts": ["layer2"]},
    ]
    table = spec(select="layer1").resolved()
    table |= {"pass": passes, "train": {"epochs": 2, "batch": 16, "device": "cpu"}}
    with pytest.raises(GraphoptError, match=r"from epoch 1 on, .*removed the input of a locally supervised module"):
        train(from_table(table), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_killed_in_its_first_save_it_gets_all_names_of_that_checkpoint(tmp_path: Path) -> None:
    chosen = {"keep": 4, "log_every": 100}
    train(small.plan(), tmp_path, settings=small.settings(epochs=1, **chosen), data=small.DATA)
    for name in ("last.pt", "epoch-0000.pt"):
        (tmp_path / name).unlink()
    train(small.plan(), tmp_path, settings=small.settings(epochs=2, **chosen), data=small.DATA, resume=True)
    assert {path.name for path in tmp_path.glob("epoch-*.pt")} == {"epoch-0000.pt", "epoch-0001.pt"}


def _make_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("x")


ODD: dict[str, Callable[[Path], Any]] = {
    "a folder": _make_folder,
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to(path.parent.parent / "elsewhere"),
    "a file": lambda path: path.write_text("mine"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "a folder") for name in ("summary.json", "metrics.jsonl", "run.json", "spec.toml", "ledger.bin", "best.pt", "last.pt")),
        *(("summary.json", "a pipe"), ("last.pt", "a pipe"), ("metrics.jsonl", "a link"), ("best.pt", "a link")),
        *(("features", "a file"), ("parts", "a pipe")),
    ],
)
def test_what_no_run_has_under_a_name_is_refused_before_anything_changes(name: str, kind: str, run: Path) -> None:
    (run.parent / "elsewhere").write_text("mine")
    (run / name).unlink(missing_ok=True)
    ODD[kind](run / name)
    before = files(run), {path: path.lstat().st_mode for path in run.rglob("*")}
    with pytest.raises(RunError, match=rf"{re.escape(name)}: is {kind}.*, where a run has a .*Move it away"):
        go(run, resume=True)
    assert (files(run), {path: path.lstat().st_mode for path in run.rglob("*")}) == before
    assert (run.parent / "elsewhere").read_text() == "mine"
