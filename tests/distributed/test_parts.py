"""Checkpoints in parts: each rank writes its own, they hold what a whole file holds, and damage is found by name."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter  # type: ignore[attr-defined]  # re-exported without saying so

from graphopt import GraphoptError, RunError
from graphopt.hashing import content_digest
from graphopt.passes.freeze import Freeze
from graphopt.train import export_run
from graphopt.train.checkpoint import load_checkpoint
from graphopt.train.parts import FOLDER, folder_of, remove_unused
from tests.distributed import runs
from tests.support.ranks import run_ranks

PASSES = [Freeze(select=("blocks.1",), when={"epoch": 1})]
COMMON: dict[str, Any] = {
    "epochs": 2,
    "keep": 3,
    "ema": 0.9,
    "eval_every": 1,
    "optimizer": {"name": "adamw", "lr": 0.002},
    "scheduler": "constant",
}
RUNS: dict[str, dict[str, Any]] = {
    "parts": {"strategy": "fsdp", "checkpoint_format": "sharded"},
    "parts, async": {"strategy": "fsdp", "checkpoint_format": "sharded", "checkpoint_async": True},
    "replicated": {"strategy": "ddp", "checkpoint_format": "sharded", "checkpoint_async": True},  # there are no parts
}


def _write(rank: int, folder: str) -> None:
    for name, options in RUNS.items():
        runs.run(Path(folder) / name, PASSES, **COMMON, **options)
    for name in ("parts", "parts, async"):
        with pytest.raises(GraphoptError) as failed, _full_disk_on(1, rank):
            runs.run(Path(folder) / f"{name}, full disk", PASSES, **COMMON, **RUNS[name])
        assert "the part of rank 1 could not be written: no space left on device" in str(failed.value)


class _full_disk_on:
    """Inside, the second part that a rank writes finds no room."""

    def __init__(self, which: int, rank: int) -> None:
        self.left, self.write = 2 if rank == which else 10**9, HuggingFaceStorageWriter.write_data

    def __enter__(self) -> None:
        HuggingFaceStorageWriter.write_data = self._refusing

    def __exit__(self, *_: object) -> None:
        HuggingFaceStorageWriter.write_data = self.write

    @property
    def _refusing(self) -> Any:
        def write(writer: Any, *arguments: Any) -> Any:
            self.left -= 1
            if not self.left:
                raise OSError(28, "No space left on device")
            return self.write(writer, *arguments)

        return write


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process, and by two ranks with each kind of checkpoint."""
    folder = tmp_path_factory.mktemp("written")
    for name, epochs in (("whole", 2), ("longer", 3)):
        runs.run(folder / name, PASSES, **{**COMMON, "epochs": epochs})
    run_ranks(_write, str(folder))
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / "parts", tmp_path / "run"))


def parts_of(checkpoint: Path) -> list[Path]:
    name = folder_of(checkpoint)
    assert name is not None
    return sorted((checkpoint.parent / FOLDER / name).iterdir())


def test_parts_hold_what_a_whole_file_holds(written: Path) -> None:
    whole = load_checkpoint(written / "whole" / "last.pt")
    found = {name: load_checkpoint(written / name / "last.pt") for name in RUNS}
    for name, content in found.items():
        assert content.keys() == whole.keys()
        for part in ("model", "optimizer", "ema"):
            assert runs.distance(content["phase"][part], whole["phase"][part]) <= runs.EXACT, (name, part)
    assert content_digest(found["parts"]["phase"]) == content_digest(found["parts, async"]["phase"])


def test_each_rank_writes_its_part_and_none_is_left_over(written: Path) -> None:
    for name in RUNS:
        checkpoints = sorted((written / name).glob("*.pt"))
        assert {path.name for path in checkpoints} == {"last.pt", "previous.pt", "best.pt", "epoch-0001.pt"}
        used = {folder_of(path) for path in checkpoints}
        assert (written / name / FOLDER).exists() == name.startswith("parts")
        if name.startswith("parts"):
            assert used == set(os.listdir(written / name / FOLDER))
            sizes = [path.stat().st_size for path in parts_of(written / name / "last.pt")]
            assert len(sizes) == 2
            assert max(sizes) < 0.75 * sum(sizes)


def test_a_part_that_one_rank_cannot_write_leaves_the_checkpoint_before(written: Path) -> None:
    for name in ("parts", "parts, async"):
        folder = written / f"{name}, full disk"
        assert load_checkpoint(folder / "last.pt")["progress"]["total"] == 2, "of the epoch before"
        assert set(os.listdir(folder / FOLDER)) == {folder_of(path) for path in folder.glob("*.pt")}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flip": (_flip, r"step-\d+\S*/shard-00002\S*: is damaged: its content is not what was written"),
    "cut": (lambda path: os.truncate(path, 500), r"shard-00002\S*: is damaged"),
    "missing": (Path.unlink, r"step-\d+\S*: 1 of the 2 parts that 2 ranks wrote are missing: shard-00002"),
    "added": (lambda path: shutil.copy(path, path.with_name("more.safetensors")), r"no parts of the checkpoint: more\.safetensors"),
    "folder": (lambda path: shutil.rmtree(path.parent), "2 of the 2 parts that 2 ranks wrote are missing"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_taken(run: Path, written: Path, tmp_path: Path, how: str) -> None:
    spoil, message = DAMAGE[how]
    spoil(parts_of(run / "last.pt")[1])
    with pytest.raises(RunError, match=message) as raised:
        load_checkpoint(run / "last.pt")
    with pytest.warns(UserWarning, match=rf"{message}.*; previous\.pt \(epoch 1, step 0\) is used in its place"):
        export_run(run, tmp_path / "model.pt", which="last", plan=runs.plan(PASSES))
    if how != "flip":
        return
    assert "previous.pt" in str(raised.value)
    (run / FOLDER / "step-00000099").mkdir()  # of a save that was interrupted
    runs.run(run, PASSES, **COMMON, resume=True)
    for part in ("model", "optimizer", "ema"):
        assert runs.distance(runs.saved(run)[part], runs.saved(written / "whole")[part]) <= runs.EXACT
    assert set(os.listdir(run / FOLDER)) <= {folder_of(path) for path in run.glob("*.pt")}, "only those that are still kept"


def _resume(rank: int, folder: str, strategies: tuple[str, ...]) -> None:
    for strategy in strategies:
        runs.run(Path(folder) / strategy / f"{rank}", PASSES, resume=True, **COMMON | {"epochs": 3, "strategy": strategy})


@pytest.mark.parametrize(("ranks", "strategies"), [(2, ("fsdp", "ddp")), (3, ("fsdp",))])
def test_each_part_is_read_by_one_rank_alone(written: Path, tmp_path: Path, ranks: int, strategies: tuple[str, ...]) -> None:
    """Each rank finds nothing in its folder but what it has to read."""
    for strategy, rank in itertools.product(strategies, range(ranks)):
        copied = Path(shutil.copytree(written / "parts", tmp_path / strategy / f"{rank}"))
        for path in (*copied.glob("*.pt"), *copied.glob(f"{FOLDER}/*/*")):
            if not (path.name.startswith(f"shard-{rank + 1:05d}-") or (rank == 0 and path.suffix == ".pt")):
                path.unlink()
    run_ranks(_resume, str(tmp_path), strategies, ranks=ranks)
    for strategy in strategies:
        found, expected = (runs.saved(folder) for folder in (tmp_path / strategy / "0", written / "longer"))
        for part in ("model", "optimizer", "ema"):
            assert runs.distance(found[part], expected[part]) <= runs.EXACT, (strategy, part)


def _close_again(_rank: int, folder: str) -> None:
    """An epoch, and its end once more from the checkpoint after its last step, by processes that have taken none."""
    settings: dict[str, Any] = {"epochs": 1, "checkpoint_steps": 2, "scheduler": "cosine", **RUNS["parts"]}
    whole, again = Path(folder) / "whole", Path(folder) / "again"
    runs.run(whole, PASSES, **settings)
    if not _rank:
        shutil.copytree(whole, again)
        for name in ("last.pt", "best.pt"):
            (again / name).unlink()
        (again / "previous.pt").rename(again / "last.pt")
    runs.run(again, PASSES, resume=True, **settings)


def test_the_end_of_an_epoch_is_the_same_without_a_step_before_it(tmp_path: Path) -> None:
    run_ranks(_close_again, str(tmp_path))
    whole, again = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "again"))
    assert whole["progress"]["total"] == load_checkpoint(tmp_path / "whole" / "previous.pt")["progress"]["total"] == 2
    assert content_digest(whole["phase"]) == content_digest(again["phase"])


def _resume_damaged(_rank: int, folder: str) -> None:
    runs.run(Path(folder), PASSES, **COMMON, **RUNS["parts"], resume=True)


def test_ranks_agree_on_the_checkpoint_before_a_damaged_part(run: Path, written: Path) -> None:
    _flip(parts_of(run / "last.pt")[1])
    run_ranks(_resume_damaged, str(run))
    assert content_digest(runs.saved(run)) == content_digest(load_checkpoint(written / "parts" / "last.pt")["phase"])


def test_parts_stay_while_a_checkpoint_cannot_be_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(os.listdir(run / FOLDER))

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(torch, "load", refused)
    remove_unused(run, list(run.glob("*.pt")))
    assert set(os.listdir(run / FOLDER)) == before
    monkeypatch.undo()
    for path in run.glob("*.pt"):
        path.write_bytes(b"damaged")
    remove_unused(run, list(run.glob("*.pt")))
    assert not (run / FOLDER).exists()


def test_a_backbone_is_exported_from_parts(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "model.pt", which="last", weights="model", plan=runs.plan(PASSES))
    exported = torch.load(tmp_path / "model.pt", weights_only=True)
    runs.Net().double().load_state_dict(exported)
    assert torch.equal(exported["fc.weight"], load_checkpoint(run / "last.pt")["phase"]["model"]["fc.weight"])
