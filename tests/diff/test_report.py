"""A run's page: what it tells, what it makes of an unfinished or a foreign folder, and that it opens clean."""

from __future__ import annotations

import base64
import csv
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest

from graphopt.cli import main
from graphopt.diff.render.chain import chain_section
from graphopt.diff.render.page import escaped
from graphopt.diff.render.run import charts, is_run, read_run
from graphopt.files import sealed
from graphopt.hashing import hash_parts

SPEC = """\
name = "a small <run>"
[backbone]
source = "cifar"
name = "resnet8"
arguments = { in_chans = 1 }
input = [1, 8, 8]
[[pass]]
use = "freeze"
select = ["conv1", "bn1"]
when = { epoch = 1 }
[train]
epochs = 3
batch = 8
"""


def records(epochs: int = 3, steps: int = 4) -> list[dict[str, Any]]:
    """What the runner writes."""
    decision = {"index": 0, "epoch": 1, "action": "apply", "regions": None, "pass": "freeze"}
    found: list[dict[str, Any]] = [
        {"kind": "phase", "step": 0, "epoch": 0, "phase": 0, "decisions": [], "parameters": 100, "trainable_parameters": 100},
        {"kind": "phase", "step": steps, "epoch": 1, "phase": 1, "decisions": [decision], "parameters": 100, "trainable_parameters": 60},
    ]
    for epoch in range(epochs):
        for step in range(2, steps + 1, 2):
            at = epoch * steps + step
            found.append({"kind": "step", "step": at, "epoch": epoch, "phase": 0, "loss": 2 / at, "accuracy": 0.5, "lr": 0.1})
            found[-1] |= {"step_seconds": 0.01, "samples_per_second": 800.0, "peak_bytes": 2**30}
        end = {"kind": "epoch", "epoch": epoch, "step": (epoch + 1) * steps, "phase": 0, "train_loss": 1.0, "train_accuracy": 0.5}
        found.append({**end, "loss": 0.9, "accuracy": 0.1 * epoch, "seconds": 1.0, "samples_per_second": 32.0, "peak_bytes": 2**30})
    return found


def chain(epoch: int, *spent: tuple[float, float, float]) -> dict[str, Any]:
    """The record of an epoch of two ranks, from rank 0 on."""
    ranks = [
        {"modules": modules, "work_seconds": work, "receive_seconds": receiving, "send_seconds": sending, "bytes": 3 * 2**20}
        for modules, (work, receiving, sending) in zip(([1, 4], [0, 1]), spent, strict=True)
    ]
    return {"kind": "epoch", "epoch": epoch, "step": 4 * epoch + 4, "phase": min(epoch, 1), "train_loss": 1.0, "chain": ranks}


def test_the_table_of_a_chain_has_the_last_epoch_of_each_phase() -> None:
    records = [
        chain(0, (3.0, 1.0, 0.0), (2.0, 0.0, 2.0)),
        chain(1, (1.0, 1.0, 0.0), (1.0, 0.0, 1.0)),
        chain(2, (9.0, 1.0, 0.0), (5.0, 0.0, 5.0)),
    ]
    page = chain_section(records)
    rows = [re.findall(r"<td>(?:<div[^>]*?aria-label=\"([^\"]*)\".*?</div>|([^<]*))</td>", row) for row in page.split("<tr>")[2:]]
    assert [["".join(cell) for cell in row] for row in rows] == [
        ["0", "1", "1", "50 % work", "3.00 MiB"],
        ["0", "0", "2 to 4", "75 % work", "3.00 MiB"],
        ["2", "1", "1", "50 % work", "3.00 MiB"],
        ["2", "0", "2 to 4", "90 % work", "3.00 MiB"],
    ]
    assert not chain_section([{"epoch": 0, "phase": 0}])


def write_run(folder: Path, lines: list[Any], *, finished: bool = True) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(sealed({"graphopt": 2, "digest": "d", "spec": hash_parts(SPEC.encode())}))
    (folder / "spec.toml").write_text(SPEC)
    (folder / "metrics.jsonl").write_text("".join(f"{x if isinstance(x, str) else sealed(x)}\n" for x in lines))
    if finished:
        summary = {"accuracy": 0.2, "loss": 0.9, "best_accuracy": 0.25, "best_epoch": 1}
        summary |= {"seconds": 200.0, "peak_bytes": 2**30, "device": "cpu"}
        (folder / "summary.json").write_text(sealed(summary))
    return folder


def test_a_run_is_read_with_its_decisions(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [*records(), '{"kind": "st']))  # the last line was never finished
    assert is_run(run.path)
    assert [(d.index, d.epoch, d.action) for d in run.decisions] == [(0, 1, "apply")]
    assert (len(run.epochs), len(run.steps), len(run.phases)) == (3, 6, 2)


def test_curves_lie_over_epochs(tmp_path: Path) -> None:
    found = charts(read_run(write_run(tmp_path / "run", records())))
    assert found["time"]["x"] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert found["time"]["series"] == [{"name": "step", "y": [10.0] * 6, "points": True}]
    assert [s["name"] for s in found["loss"]["series"]] == ["training", "evaluation"]
    assert found["accuracy"]["series"][1]["y"] == [None, 0.0, None, 10.0, None, 20.0]


def test_a_run_too_short_for_records_of_steps_shows_the_means_of_its_epochs(tmp_path: Path) -> None:
    lines = [record for record in records() if record["kind"] != "step"]
    found = charts(read_run(write_run(tmp_path / "run", lines)))["time"]
    assert found["x"] == [1.0, 2.0, 3.0]
    assert found["series"] == [{"name": "step", "y": [250.0] * 3, "points": True}], "1 s for 4 steps"


def test_memory_is_shown_with_its_forecast_in_one_unit(tmp_path: Path) -> None:
    found = charts(read_run(write_run(tmp_path / "run", records())), [(0, 2**28), (1, 2**27)])["memory"]
    measured, forecast = ({x: y for x, y in zip(found["x"], s["y"], strict=True) if y is not None} for s in found["series"])
    assert set(measured.values()) == {1024}
    assert forecast == {0: 256, 0.9999: 256, 1: 128, 3: 128}
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    tile = page.partition('<div class="what">peak memory</div>')[2][:120]
    assert "1.00 GiB" in tile
    assert "forecast " in tile
    assert "in epoch 1" in page, "counted from 0, as in a spec"


def test_long_runs_are_thinned_and_strange_numbers_left_out(tmp_path: Path) -> None:
    lines = [{"kind": "step", "step": i, "epoch": 0, "loss": float("nan") if i % 2 else 1.0, "step_seconds": 1} for i in range(1, 9001)]
    found = charts(read_run(write_run(tmp_path / "run", lines)))
    assert 1000 < len(found["time"]["x"]) <= 1500
    assert set(found["loss"]["series"][0]["y"]) == {1.0}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, ["no such file or folder", "graphopt train"]),
        (lambda p: p.write_text("x"), ["a file, not the folder of a run"]),
        (lambda p: p.mkdir(), ["no run of graphopt", "graphopt train"]),
        (lambda p: (write_run(p, [], finished=False) / "metrics.jsonl").write_bytes(b"\xff"), ["metrics.jsonl", "it is no UTF-8 text"]),
        (lambda p: write_run(p, ['{"no": "kind"}']), ["metrics.jsonl:1", "not a line of metrics"]),
        (lambda p: write_run(p, 2 * ["[" * 200_000]), ["metrics.jsonl:1", "not a line of metrics"]),
        (lambda p: os.mkfifo(write_run(p, [], finished=False) / "summary.json"), ["summary.json", "a pipe or a device"]),
        (lambda p: os.mkfifo(write_run(p, [], finished=False) / "ledger.bin"), ["ledger.bin", "a pipe or a device"]),
        (lambda p: (write_run(p, [], finished=False) / "summary.json").mkdir(), ["summary.json", "a folder"]),
    ],
)
def test_a_folder_that_is_no_run_gets_one_error(make: Any, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert all(word in error for word in words)
    assert not (tmp_path / "page.html").exists()


def test_the_page_says_what_the_run_was_trained_with(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records())
    summary = {"versions": {"torch": "2.14.1", "timm": "<1>"}, "data": "0123abcd", "device": "cpu"}
    (folder / "summary.json").write_text(sealed(summary))
    assert main(["report", str(folder), "--no-costs"]) == 0
    page = (folder / "report.html").read_text().partition("<iframe")[0]
    rows = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", page))
    expected = {"train.epochs": "3", "train.batch": "8", "train.optimizer.name": "sgd", "train.seed": "0", "data.name": "digits"}
    assert {key: rows[key] for key in expected} == expected
    assert {key: rows[key] for key in ("torch", "timm", "digest of the data")} == {
        "torch": "2.14.1",
        "timm": "&lt;1&gt;",
        "digest of the data": "0123abcd",
    }
    assert "train.clip" not in rows, "neither a main setting nor another value than usual"
    assert escaped(SPEC) in page


def test_the_page_holds_its_figures_as_csv(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records())
    assert main(["report", str(folder), "--no-costs"]) == 0
    links = re.findall(r'<a download="(\w+).csv" href="data:text/csv;charset=utf-8;base64,([^"]*)"', (folder / "report.html").read_text())
    tables = {name: list(csv.DictReader(io.StringIO(base64.b64decode(data).decode()))) for name, data in links}
    assert [row["epoch"] for row in tables["epochs"]] == ["0", "1", "2"]
    assert [row["step"] for row in tables["steps"]] == ["2", "4", "6", "8", "10", "12"]
    assert float(tables["epochs"][2]["accuracy"]) == 0.2


@pytest.mark.browser
@pytest.mark.parametrize("finished", [True, False])
def test_the_page_opens_clean_and_tells_the_run(browse: Any, finished: bool, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(), finished=finished)
    assert main(["report", str(folder), "--no-costs"]) == 0
    for width in (1280, 390):
        page = browse(folder / "report.html", width=width)
        assert page.locator("h1").text_content() == "a small <run>"
        assert page.locator(".chart canvas").count() == 4
        assert page.locator(".phases tbody tr").count() == 2
        assert "freeze" in page.locator(".phases").text_content()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert (page.locator(".note").count() == 0) == finished
        inner = page.frame_locator("iframe")
        assert inner.locator("[data-id]").count() > 2
        assert inner.locator(".phases button").count() == 2
        assert inner.locator("[data-do=theme]").is_hidden(), "the page has that button already"
        assert "–" not in page.locator(".chart").first.text_content(), "the legend shows the last values"
        page.locator(".theme").click()
        assert page.locator(".chart canvas").count() == 4


@pytest.mark.browser
def test_a_run_that_has_only_begun_has_a_page(browse: Any, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(0), finished=False)
    assert main(["report", str(folder), "--no-costs"]) == 0
    page = browse(folder / "report.html")
    assert page.locator(".empty").count() == 4


def test_diff_takes_a_run_and_its_own_decisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", records())
    assert main(["diff", str(folder), "--no-costs"]) == 0
    assert "phase 1, from epoch 1: freeze all   (shown)" in capsys.readouterr().out
