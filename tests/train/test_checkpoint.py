from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from graphopt import RunError
from graphopt.train import train
from graphopt.train.checkpoint import FORMAT_VERSION, load_checkpoint
from graphopt.train.folder import RunFolder
from tests.support.ranks import run_process
from tests.train import small


def go_on_without_room(folder: Path, largest: int) -> None:
    """Goes on where no file may be larger than `largest` bytes; the error's text goes into `error.txt` beside the folder."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        train(small.plan(), folder, settings=small.settings(epochs=2), data=small.DATA, resume=True)
    except RunError as error:
        folder.with_suffix(".error").write_text(str(error))


@pytest.mark.slow
def test_a_disk_without_room_is_one_error_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(small.plan(), folder, settings=small.settings(epochs=1), data=small.DATA)
    before = (folder / "last.pt").read_bytes()
    assert run_process(go_on_without_room, folder, len(before) // 2) == 0
    assert "last.pt: could not be written: file too large. Make room" in folder.with_suffix(".error").read_text()
    assert (folder / "last.pt").read_bytes() == before
    assert not list(folder.glob(".*"))
    assert train(small.plan(), folder, settings=small.settings(epochs=2), data=small.DATA, resume=True).epochs == 2


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(RunError, match="not a run of graphopt"):
            RunFolder.claim(tmp_path, "digest", resume=resume)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(RunError, match="cannot be an output folder"):
        RunFolder.claim(tmp_path / "out", "digest", resume=False)


def begun(path: Path, digest: str = "digest", *, resume: bool = False) -> RunFolder:
    folder = RunFolder.claim(path, digest, resume=resume)
    folder.begin(digest, "")
    return folder


def test_a_run_is_continued_only_when_asked_and_only_by_its_spec(tmp_path: Path) -> None:
    folder = begun(tmp_path / "out")
    folder.save({"graphopt": FORMAT_VERSION})
    folder.release()
    with pytest.raises(RunError, match="--resume"):
        RunFolder.claim(tmp_path / "out", "digest", resume=False)
    with pytest.raises(RunError, match=r"another spec \(digest digest, yours is other\)"):
        RunFolder.claim(tmp_path / "out", "other", resume=True)
    RunFolder.claim(tmp_path / "out", "digest", resume=True).release()


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    first = begun(tmp_path)
    with pytest.raises(RunError, match="another process is training"):
        RunFolder.claim(tmp_path, "digest", resume=True)
    first.release()
    RunFolder.claim(tmp_path, "digest", resume=True).release()


def test_last_best_and_the_latest_epochs_stay(tmp_path: Path) -> None:
    two = {"last.pt", "previous.pt", "best.pt"}
    for keep, expected in ((1, {"last.pt"}), (2, two), (4, two | {"epoch-0004.pt", "epoch-0005.pt"})):
        folder = begun(tmp_path / str(keep))
        for epoch in range(1, 6):
            folder.save({"graphopt": FORMAT_VERSION, "epoch": epoch}, best=epoch == 3, keep=keep, epoch=epoch)
        assert {path.name for path in folder.path.glob("*.pt")} == expected
        assert load_checkpoint(folder.last)["epoch"] == 5
        if keep > 1:
            assert load_checkpoint(folder.best)["epoch"] == 3
            assert load_checkpoint(folder.previous)["epoch"] == 4
        folder.release()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half an archive"])
def test_damaged_checkpoints(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(RunError, match="damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last.pt")
    with pytest.raises(RunError, match="is a pipe or a device"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_checkpoint_cut_short(tmp_path: Path) -> None:
    torch.save({"graphopt": 1, "weights": torch.randn(1000)}, tmp_path / "last.pt")
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="damaged"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "last.pt")
    with pytest.raises(RunError, match="damaged or not a checkpoint"):
        load_checkpoint(tmp_path / "last.pt")


def test_another_format(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "last.pt")
    with pytest.raises(RunError, match="not a checkpoint of graphopt"):
        load_checkpoint(tmp_path / "last.pt")


def test_another_version_of_the_format_is_named(tmp_path: Path) -> None:
    torch.save({"graphopt": 7}, tmp_path / "last.pt")
    with pytest.raises(RunError, match="has format 7, this version of graphopt reads format 6"):
        load_checkpoint(tmp_path / "last.pt")


def test_checkpoints_of_a_run_hold_no_code(tmp_path: Path) -> None:
    train(small.plan(), tmp_path, settings=small.settings(epochs=1, ema=0.9), data=small.DATA)
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    assert {"spec", "digest", "decisions", "phase", "progress", "history", "buffers"} <= state.keys()
