"""The files of cached features: what others do to them, and folders that are not ours."""

from __future__ import annotations

import os

import pytest
import torch
from PIL import Image

from graphopt.errors import RunError
from graphopt.spec import DataSpec
from graphopt.train.feature_cache.store import CacheDirectory, CacheEntry, EntryLayout
from graphopt.train.phase import Phase
from tests.data import formats
from tests.train.features import cache_of, equal, plan_of, run, weights


# -- bad input ------------------------------------------------------------------------------------------------------------------------
def test_a_limit_under_one_batch_is_an_error_before_the_first_step(tmp_path):
    with pytest.raises(RunError, match="smaller than one batch"):
        run(tmp_path, limit="4 KiB")


def test_the_cache_folder_of_another_run_is_left_alone(tmp_path):
    CacheDirectory(tmp_path / "cache", "another digest")
    with pytest.raises(RunError, match="features of another run"):
        run(tmp_path, cache="disk", folder=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(RunError, match="no features of graphopt"):
        run(tmp_path, cache="disk", folder=str(tmp_path / "photos"))


def test_a_second_process_waits_and_then_reads(tmp_path):
    """Two fills of one entry, the second begun while the first runs: the second finds it whole."""
    layout = EntryLayout("k", 8, (3,), torch.float32, 4)
    folder = CacheDirectory(tmp_path / "cache", "d")
    with folder.filling(layout) as fill:
        for number in range(2):
            fill.write(number, torch.full((4, 3), float(number)), torch.tensor([number] * 4))
        fill.finish()
    found = CacheDirectory(tmp_path / "cache", "d").open(layout)
    assert torch.equal(found.features[0:8][:, 0], torch.tensor([0.0] * 4 + [1.0] * 4))
    assert found.targets.tolist() == [0] * 4 + [1] * 4


# -- what others do to the files -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", ["content", "swapped", "same"])
def test_another_image_or_target_anywhere_fills_anew(tmp_path, change):
    """Neither is among the few samples that the transform is tried on."""
    formats.folders(tmp_path, classes=2, count=8)
    data = DataSpec(name="folder", root=str(tmp_path), train_limit=None, workers=0)
    first, second = sorted((tmp_path / "train").glob("*/2.*"))
    keys = []
    for turn in range(2):
        if turn and change == "content":
            Image.new("RGB", (40, 50), "red").save(first)
        elif turn and change == "swapped":
            first.rename(tmp_path / "held")
            second.rename(first)
            (tmp_path / "held").rename(second)
        plan = plan_of(when="start", upto="blocks.0", cache="disk")
        cache_of(tmp_path / "cache" / str(turn), plan, data).prepare(plan, {})
        keys += [path.stem for path in (tmp_path / "cache" / str(turn)).glob("*.rows")]
    assert len(set(keys)) == (1 if change == "same" else 2)


@pytest.mark.parametrize("how", ["short", "noise", "gone"])
def test_a_file_of_features_that_is_changed_under_the_run(tmp_path, monkeypatch, how):
    whole = weights(run(tmp_path, "whole", cache="disk"))
    step, kept = Phase.step, tmp_path / "kept"

    def changed(phase, batches, done):
        if done == 7:
            (rows,) = kept.glob("*.rows")
            if how == "short":
                os.truncate(rows, 100)
            elif how == "noise":
                with rows.open("r+b") as file:
                    file.write(os.urandom(rows.stat().st_size))
            else:
                rows.unlink()
        return step(phase, batches, done)

    with monkeypatch.context() as patch:
        patch.setattr(Phase, "step", changed)
        if how != "gone":
            with pytest.raises(RunError, match=r"kept/[0-9a-f]+\.rows: the file of features was changed"):
                run(tmp_path, cache="disk", folder=str(kept))
        else:
            run(tmp_path, cache="disk", folder=str(kept))
    assert equal(weights(run(tmp_path, resume=True, cache="disk", folder=str(kept))), whole)


def test_a_linked_folder_of_features_and_files_of_others_stay(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    step, written = Phase.step, []

    def noting(phase, batches, done):
        if done == 0:
            (tmp_path / "run" / "features").symlink_to(scratch)
        if done == 7:
            (scratch / "notes.txt").write_text("mine")
            written.extend(path.suffix for path in scratch.iterdir())
        return step(phase, batches, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Phase, "step", noting)
        run(tmp_path, cache="disk")
    assert ".rows" in written
    assert (tmp_path / "run" / "summary.json").exists()
    assert [path.name for path in scratch.iterdir()] == ["notes.txt"]


def test_who_waited_for_an_entry_leaves_no_room_reserved(tmp_path):
    layout = EntryLayout("0" * 32, 8, (3,), torch.float32, 4)
    directory = CacheDirectory(tmp_path / "cache", "d")
    with directory.filling(layout) as fill:
        for number in range(2):
            fill.write(number, torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
        fill.finish()
    (tmp_path / "cache" / f".{layout.key}.json.abcdefgh").write_text("by a killed process")
    with directory.filling(layout) as found:
        assert isinstance(found, CacheEntry)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".json", ".rows", ".targets"]
