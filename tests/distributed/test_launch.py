"""What starts the ranks: `graphopt train --ranks`, and torchrun's agents on two machines, here both on the loopback."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from graphopt import GraphoptError
from graphopt.cli import main
from graphopt.data.loader import Data
from graphopt.passes.freeze import Freeze
from graphopt.train import train
from graphopt.train.launch import end_with_launcher, launch
from graphopt.train.ledger import check_ledger
from tests.distributed import cases
from tests.support.ranks import loaded, run_process, run_ranks
from tests.train import small

#: rank 0 sends the second signal when the launcher has passed the first one on
_TWICE = """
[ $RANK = 1 ] && trap '' INT && touch ${0%/*}/ready && exec sleep 3
trap 'kill -INT $PPID; exit 130' INT
until [ -e ${0%/*}/ready ]; do sleep 0.05; done
kill -INT $PPID
sleep 5 &
wait
"""
#: what a rank does in the place of graphopt, and how the launcher ends: exit status, silent, message
RANKS: dict[str, tuple[str, list[Any]]] = {
    "finished": ("exit 0", [0, None, ""]),
    "refused": ("exit 2", [2, True, ""]),
    "killed": ("[ $RANK = 0 ] && exec sleep 60; kill -9 $$", [2, False, "rank 1 was ended by signal 9"]),
    "ended": ("[ $RANK = 0 ] && exec sleep 60; exit 7", [2, False, "rank 1 ended by itself, with status 7"]),
    "terminated": ("[ $RANK = 0 ] && kill -TERM $PPID; exec sleep 60", [143, True, ""]),
    "interrupted": ("[ $RANK = 0 ] && kill -INT $PPID; exec sleep 60", [130, True, ""]),
    "twice": (_TWICE, [130, False, "interrupted"]),
}


def _launch(folder: Path) -> None:
    found: dict[str, list[Any]] = {}
    sys.executable = str(folder / "python")
    for name, (action, _) in RANKS.items():
        (folder / "python").write_text(f"#!/bin/sh\necho $@ > {folder}/$RANK\n{action}\n")
        (folder / "python").chmod(0o700)
        try:
            launch(2, ["train", "spec.toml"])
            found[name] = [0, None, ""]
        except GraphoptError as error:
            found[name] = [error.exit_code, error.silent, error.what]
    (folder / "found").write_text(json.dumps(found))
    (folder / "python").write_text(f"#!/bin/sh\necho $@ > {folder}/$RANK\n")
    assert main(["train", "quickstart", "--ranks", "2", "-q", "--json", "--out", "RUN", "--set", "train.batch=8", "--resume"]) == 0


def test_the_launcher_ends_as_the_ranks_did(tmp_path: Path) -> None:
    process = loaded().Process(target=_launch, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    found = json.loads((tmp_path / "found").read_text())
    for name, (_, (code, silent, message)) in RANKS.items():
        assert found[name][:2] == [code, silent], name
        assert message in found[name][2]
    for rank in "01":
        told = (tmp_path / rank).read_text().split()
        assert told == ["-m", "graphopt", "train", "quickstart", "--out", "RUN", "--set", "train.batch=8", "--resume", "--quiet", "--json"]


SPEC = """
[backbone]
source = "cifar"
name = "resnet8"
input = [1, 8, 8]
arguments = { in_chans = 1 }
[data]
name = "digits"
train_limit = 24
eval_limit = 10
[train]
epochs = 1
batch = 12
device = "cpu"
"""
#: further arguments, and whether they are refused
SAID = {"json": (["--json"], False), "quiet": (["--quiet"], False), "wrong": (["--json", "--set", "train.batch=13"], True)}


def _say(rank: int, folder: Path) -> None:
    for name, (arguments, refused) in SAID.items():
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
            code = main(["train", str(folder / "spec.toml"), "--out", str(folder / name), *arguments])
        assert code == (2 if refused else 0), errors.getvalue()
        (folder / f"{name}-{rank}").write_text(json.dumps([out.getvalue(), errors.getvalue()]))


def test_one_rank_speaks(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(SPEC)
    run_ranks(_say, tmp_path)
    said = {name: [json.loads((tmp_path / f"{name}-{rank}").read_text()) for rank in (0, 1)] for name in SAID}
    summary = json.loads(said["json"][0][0])
    assert summary["steps"] == 2
    assert summary["peak_bytes"] >= max(record["peak_bytes"] for record in small.records(tmp_path / "json", "epoch")), "of all ranks"
    assert said["json"][1] == ["", ""]
    assert said["quiet"] == [["", ""], ["", ""]]
    assert ["", ""] in said["wrong"]
    assert sum("a batch of 13 does not divide" in "".join(of) for of in said["wrong"]) == 1


def _orphan(told: Path) -> None:
    """Starts a process that ends with this one, and ends without a word to it."""
    ready, end = os.pipe()
    if os.fork():
        os.read(ready, 1)
        os._exit(0)
    signal.signal(signal.SIGTERM, lambda *_: (told.write_text("ended"), os._exit(0)))
    end_with_launcher()
    os.write(end, b".")
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells no process of its parent's end")
def test_a_rank_ends_with_its_launcher(tmp_path: Path) -> None:
    assert run_process(_orphan, tmp_path / "told") == 0
    end = time.monotonic() + 20
    while not (tmp_path / "told").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert (tmp_path / "told").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "99"], "a batch of 12 does not divide into 99 processes"),
        (["--ranks", "0"], "greater than or equal to 1"),
        (["--ranks", "2", "--set", "train.strategy=single"], 'strategy = "single" is one process, not 2'),
    ],
)
def test_what_so_many_processes_cannot_do_starts_none(tmp_path: Path, capsys: Any, arguments: list[str], message: str) -> None:
    (tmp_path / "spec.toml").write_text(SPEC)
    assert main(["train", str(tmp_path / "spec.toml"), "--out", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def _data() -> Data:
    return cases.data(training=26)


def _train(folder: Path) -> None:
    plan = cases.plan((Freeze(select="blocks.0", when={"epoch": 1}),), norm=nn.BatchNorm2d, drop=0.3)
    data = _data()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and os.environ["RANK"] == "1":
        data.train.transform = small.Counting(data.train.transform, 17, signal.SIGKILL)  # in the third step, of the second epoch
    train(plan, folder, settings=small.settings(epochs=2, batch=12, checkpoint_steps=1, timeout=60), data=data)


def _undisturbed(_: int, folder: Path) -> None:
    _train(folder)


def _agent(port: int, folder: Path, number: int, failed: list[BaseException]) -> None:
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        run_id="two",
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        max_restarts=1,
        monitor_interval=0.05,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / f"logs-{number}")),
    )
    try:
        elastic_launch(config, _train)(folder / "run")
    except BaseException as error:
        failed.append(error)


@pytest.mark.filterwarnings("ignore")
def test_agents_of_two_machines_start_their_ranks_again(tmp_path: Path) -> None:
    run_ranks(_undisturbed, tmp_path / "whole")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failed: list[BaseException] = []
    agents = [threading.Thread(target=_agent, args=(port, tmp_path, number, failed), daemon=True) for number in range(2)]
    for agent in agents:
        agent.start()
    for agent in agents:
        agent.join(120)
    assert not failed
    whole, run = cases.content(tmp_path / "whole"), cases.content(tmp_path / "run")
    for part in ("phase", "history", "buffers", "decisions"):
        assert cases.distance(whole[part], run[part])[0] == 0, part
    assert all(epoch.right for epoch in check_ledger(tmp_path / "run" / "ledger.bin", 4))
