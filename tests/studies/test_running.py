"""`graphopt study`: what is done stays, what is missing is trained, what fails stops nothing, and a stop leaves what goes on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graphopt.cli import main
from graphopt.files import lock_folder, unlock_folder
from graphopt.spec import load
from graphopt.studies import running
from graphopt.studies.comparing import compare
from graphopt.studies.study import Member
from tests.cli.spec import SPEC
from tests.support.ranks import serve

STUDY = """\
name = "small study"
spec = "s.toml"
seeds = [0, 1]
baseline = "whole"
set = { train = { epochs = 1 } }
[[variant]]
name = "whole"
set = { pass = [] }
[[variant]]
name = "frozen"
[[published]]
variant = "frozen"
figure = "memory"
value = "-9 %"
source = "a paper"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    serve()
    Path("s.toml").write_text(SPEC)
    Path("t.toml").write_text(STUDY)
    return tmp_path


def times() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path("runs/t").glob("*/summary.json")}


def test_it_trains_what_is_missing_and_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "t.toml", "--row", "frozn"]) == 2
    assert "--row: there is no row 'frozn'. Did you mean 'frozen'?" in capsys.readouterr().err
    assert main(["study", "t.toml", "--jobs", "2", "--row", "fro*"]) == 0
    out = capsys.readouterr().out
    assert "2 runs: 0 done, 2 to train" in out
    assert main(["study", "t.toml", "--jobs", "2"]) == 0
    out = capsys.readouterr().out
    assert "4 runs: 2 done, 2 to train" in out
    assert "small study" in out
    before = times()
    assert len(before) == 4
    Path("t.toml").write_text(
        STUDY.replace("[0, 1]", "[0, 1, 2]").replace('name = "frozen"', 'name = "cold"').replace('"frozen"', '"cold"')
    )
    assert main(["study", "t.toml", "--list"]) == 0
    assert capsys.readouterr().out.count(" done") == 4
    assert main(["study", "t.toml"]) == 0
    assert "6 runs: 4 done, 2 to train" in capsys.readouterr().out
    after = times()
    assert {path: after[path] for path in before} == before, "what was done is as it was, under its row's new name too"

    found = compare(["runs/t"])
    assert [(row.name, len(row.results), row.missing) for row in found.rows] == [("whole", 3, 0), ("cold", 3, 0)]
    assert found.common is not None
    assert found.common.name == "whole"
    assert found.beside[0]["ours"].endswith(" %")
    log = next(Path("runs/t").glob("*.log")).read_text()
    assert "epoch 0/0" in log


def test_a_run_that_fails_is_reported_and_stops_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    # The first row cannot train: its batch is larger than the data.
    Path("t.toml").write_text('spec = "s.toml"\nset = { train = { epochs = 1 } }\n[grid]\ntrain.batch = [64, 20]\n')
    assert main(["study", "t.toml"]) == 1
    out, err = capsys.readouterr()
    assert "batch=64, seed 0: error: train.batch: one training step takes 64 images, the training set has 40" in out
    assert "batch=20, seed 0: accuracy" in out
    assert "1 of 2 runs failed: batch=64-seed0-" in err
    rows = json.loads(_output(["compare", "runs/t", "--json"], capsys))["rows"]
    assert [(row["name"], row["missing"]) for row in rows] == [("batch=64", 1), ("batch=20", 0)]


def test_a_stop_leaves_what_the_same_command_finishes(capsys: pytest.CaptureFixture[str]) -> None:
    # One run is long enough to be stopped; it writes its first checkpoint when it is.
    Path("t.toml").write_text('spec = "s.toml"\nseeds = [0, 1]\n')
    long, stop = ["--set", "train.epochs=400"], threading.Event()

    def interrupt() -> None:
        while not stop.is_set() and not any(Path("runs/t").glob("*/last.pt")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status = main(["study", "t.toml", *long])
    stop.set()
    thread.join()
    assert status == 130
    out, err = capsys.readouterr()
    assert "stopped; the same command continues it" in out
    assert "stopped with 0 of 2 runs done. The same command continues it" in err
    (begun,) = {path.parent for path in Path("runs/t").glob("*/last.pt")}
    assert not (begun / "summary.json").exists()
    # The run goes on from its checkpoint: its folder says it has resumed.
    thread = threading.Thread(target=_stop_again, args=(begun,))
    thread.start()
    assert main(["study", "t.toml", *long]) == 130
    thread.join()
    capsys.readouterr()
    kinds = [json.loads(line)["kind"] for line in (begun / "metrics.jsonl").read_text().splitlines()]
    assert "resume" in kinds


def _stop_again(begun: Path) -> None:
    while '"resume"' not in (begun / "metrics.jsonl").read_text():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def _output(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    status = main(arguments)
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def test_when_a_study_is_killed_its_runs_stop_with_checkpoints(folder: Path) -> None:
    member = Member("row", 0, load("s.toml", overrides=["train.epochs=100000"]), {})
    pool = running._Pool([], 1, (), False, lambda _: None, lambda: 0)
    pool._start(member, folder / "run")
    while not (folder / "run" / "metrics.jsonl").exists():
        time.sleep(0.02)
    pool._held.close()  # as the system does when this process is killed
    (run,) = pool.running
    run.process.join(60)
    assert run.process.exitcode == 128 + signal.SIGTERM
    assert (folder / "run" / "last.pt").exists()


@pytest.mark.parametrize(("log", "state"), [("", "stopped"), ("error: it broke\n", "failed")])
def test_a_run_that_is_interrupted_before_it_has_begun_is_stopped(folder: Path, log: str, state: str) -> None:
    """Python's own answer to Ctrl-C is status 1, as of a run that fails."""
    said: list[str] = []
    pool = running._Pool([], 1, (), False, said.append, lambda: signal.SIGINT)
    (folder / "run.log").write_text(log)
    item = running._Running(Member("row", 0, load("s.toml"), {}), folder / "run", 0, SimpleNamespace(exitcode=1), 0.0)
    pool.running.append(item)
    pool._end(item)
    assert [outcome.state for outcome in pool.outcomes] == [state]
    assert said[0].endswith("the same command continues it" if state == "stopped" else "error: it broke")


def test_a_run_waits_for_the_one_that_leaves_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.toml").write_text('spec = "s.toml"\nset = { train = { epochs = 1 } }\n')
    (row,) = json.loads(_output(["study", "t.toml", "--list", "--json"], capsys))
    Path(row["folder"]).mkdir(parents=True)
    lock = lock_folder(Path(row["folder"]))
    # The log appears when the run's process has begun; a moment later it is at the lock.
    thread = threading.Thread(target=_leave, args=(Path(f"{row['folder']}.log").absolute(), lock))
    thread.start()
    assert main(["study", "t.toml"]) == 0
    thread.join()


def _leave(log: Path, lock: int | None) -> None:
    while not log.exists():
        time.sleep(0.02)
    time.sleep(0.3)
    unlock_folder(lock)


def test_a_second_study_in_a_folder_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/study.json").write_text("of the first")
    lock = lock_folder(Path("out"))
    try:
        assert main(["study", "t.toml", "-o", "out"]) == 2
    finally:
        unlock_folder(lock)
    assert "another process is running a study in this folder" in capsys.readouterr().err
    assert Path("out/study.json").read_text() == "of the first"


@pytest.mark.parametrize("text", ["x = " + 2000 * "[", "x = 1" + 5000 * "0", "x = ["])
def test_a_study_that_is_no_toml_is_one_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.toml").write_text(text)
    assert main(["study", "t.toml", "--list"]) == 2
    assert capsys.readouterr().err.startswith("error: t.toml:")
