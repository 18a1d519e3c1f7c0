"""`graphopt compare`: means, deviations and paired differences, in every form; and the page, in a browser."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from graphopt.cli import main
from graphopt.errors import RunError
from graphopt.files import sealed
from graphopt.hashing import hash_parts
from graphopt.spec import dumps, load
from graphopt.studies import tables
from graphopt.studies.comparing import compare
from graphopt.studies.page import charts, to_page
from tests.cli.spec import SPEC

#: accuracies of each seed
PLAIN, FROZEN = {0: 0.90, 1: 0.92, 2: 0.97}, {1: 0.90, 2: 0.96, 3: 0.5}


def write(folder: Path, seed: int, accuracy: float, *overrides: str, **changes: Any) -> None:
    """A run's folder, as the runner leaves it: three epochs, in two phases."""
    folder.mkdir(parents=True)
    source = folder.parent / "s.toml"
    source.write_text(SPEC)
    spec = load(source, overrides=[f"train.seed={seed}", "train.accumulate=2", *overrides])
    text = dumps(spec)
    (folder / "spec.toml").write_text(text)
    (folder / "run.json").write_text(sealed({"graphopt": 2, "digest": spec.digest, "spec": hash_parts(text.encode())}))
    phases = [{"kind": "phase", "epoch": 0, "step": 0, "phase": 0, "decisions": []}]
    epochs = [
        {"kind": "epoch", "epoch": n, "step": 4 * n + 4, "phase": 0, "train_loss": 2.0 - n, "accuracy": accuracy * (n + 1) / 3}
        for n in range(3)
    ]
    (folder / "metrics.jsonl").write_text("".join(sealed(record) + "\n" for record in [*phases, *epochs]))
    cost = {"forward_flops": 10, "backward_flops": 20, "peak_bytes": 1000}
    made = [{"step": 0, "forecast": cost}, {"step": 8, "forecast": {**cost, "backward_flops": 10, "peak_bytes": 600}}]
    summary = {
        "epochs": 3,
        "steps": 12,
        "accuracy": accuracy,
        "best_accuracy": accuracy,
        "top5_accuracy": 1.0,
        "ema_accuracy": None,
        "seconds": 100.0 + seed,
        "peak_bytes": 2000,
        "parameters": 50,
        "trainable_parameters": 40,
        "phases": made,
        "spec": spec.resolved(),
        "device": "cpu",
        **changes,
    }
    (folder / "summary.json").write_text(sealed(summary))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, accuracy in PLAIN.items():
        write(tmp_path / "runs" / f"plain{seed}", seed, accuracy, "pass=[]", "name=plain")
    for seed, accuracy in FROZEN.items():
        half = {"peak_bytes": 1000, "seconds": 50.0}
        write(tmp_path / "runs" / f"frozen{seed}", seed, accuracy, "name=frozen", **half)
    return tmp_path / "runs"


def test_the_figures(runs: Path) -> None:
    found = compare([str(runs / "plain*"), str(runs / "frozen*")])
    plain, frozen = found.rows
    assert (plain.name, frozen.name, found.baseline.name) == ("plain", "frozen", "plain")
    assert [result.seed for result in frozen.results] == [1, 2, 3]
    assert plain.mean("accuracy") == pytest.approx(statistics.fmean(PLAIN.values()))
    assert plain.deviation("accuracy") == pytest.approx(statistics.stdev(PLAIN.values()))
    less = frozen.less(plain)
    assert less is not None
    assert less.pairs == 2, "seeds 1 and 2; nothing is paired with seed 0 or 3"
    assert less.mean == pytest.approx(-0.015)
    assert less.error == pytest.approx(statistics.stdev([-0.02, -0.01]) / math.sqrt(2))
    assert plain.mean("flops") == 8 * 30 + 4 * 20
    assert plain.mean("forecast_bytes") == 1000
    assert frozen.ratio(plain, "measured_bytes") == 0.5
    assert compare([str(runs / "plain0"), str(runs / "frozen3")]).rows[1].less(plain) is None


def test_runs_of_one_name_with_other_settings_are_other_rows(runs: Path) -> None:
    write(runs / "slow", 0, 0.8, "pass=[]", "name=plain", "train.optimizer.lr=0.01")
    assert [row.name for row in compare([str(runs / "plain*"), str(runs / "slow")]).rows] == ["plain0", "slow"]


def test_a_run_that_goes_on_is_missing(runs: Path) -> None:
    (runs / "plain1" / "summary.json").unlink()
    row = compare([str(runs / "plain*")]).rows[0]
    assert (len(row.results), row.missing) == (2, 1)
    assert tables.table(compare([str(runs / "plain*")])).rows[0][1] == "2 of 3"


def test_every_form(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*flags: str) -> str:
        status = main(["compare", "runs/plain*", "runs/frozen*", *flags])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    assert "-1.50 ± 0.50" in printed()
    assert "| frozen | 3 | 78.67 ± 25.01 | -1.50 ± 0.50 | 50 (1.00) | 320 (1.00) | 1000 B (1.00) |" in printed("--md")
    (plain, frozen) = csv.DictReader(printed("--csv").splitlines())
    assert float(plain["accuracy"]) == pytest.approx(0.93)
    assert plain["difference"] == ""
    assert float(frozen["standard_error"]) == pytest.approx(0.005)
    assert float(frozen["seconds"]) == 50
    assert r"frozen & 3 & 78.67 $\pm$ 25.01 & $-$1.50 $\pm$ 0.50 &" in printed("--latex")
    rows = json.loads(printed("--json", "--baseline", "frozen"))["rows"]
    assert rows[0]["difference"]["mean"] == pytest.approx(0.015)
    assert rows[1]["difference"] is None


def test_latex_escapes_what_it_reads() -> None:
    table = tables.Table(("a",), (("50 % of x_1 & {y}", "-0.5"),))
    assert tables._tex(table.rows[0]) == r"50 \% of x\_1 \& \{y\} & $-$0.5 \\"


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        (["gone"], {}, "gone: no such folder"),
        (["runs"], {}, "is not the folder of a run or a study"),
        (["runs/plain0"], {"baseline": "plan"}, "there is no row 'plan'. Did you mean 'plain'?"),
        (["runs/plain0"], {"metric": "ema_accuracy"}, "the run has no ema_accuracy"),
    ],
)
def test_what_cannot_be_compared(runs: Path, what: list[str], options: Mapping[str, str], message: str) -> None:
    with pytest.raises(RunError) as caught:
        compare(what, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "study.json: is damaged"),
        (sealed({"study": 9, "members": []}), "study.json: has format 9, this version of graphopt reads format 1"),
    ],
)
def test_an_index_that_cannot_be_read_is_named(runs: Path, content: str, message: str) -> None:
    (runs / "study.json").write_text(content)
    for what in (runs, runs / "plain0"):  # the folder of a study, and of a run in it
        with pytest.raises(RunError, match=message):
            compare([str(what)])


def test_no_run_has_finished(runs: Path) -> None:
    (runs / "plain0" / "summary.json").unlink()
    with pytest.raises(RunError, match="no run has finished yet"):
        compare([str(runs / "plain0")])


def test_what_the_charts_draw(runs: Path) -> None:
    found = charts(compare([str(runs / "plain*"), str(runs / "frozen*")]).rows)
    assert [round(point["y"], 2) for point in found["time"]["points"]] == [93.0, 78.67]
    assert found["time"]["points"][0]["dx"] == pytest.approx(1.0)
    plain = found["accuracy"]["series"][0]
    assert found["accuracy"]["x"] == [1, 2, 3]
    assert plain["y"][-1] == pytest.approx(93.0)
    assert plain["high"][-1] - plain["y"][-1] == pytest.approx(100 * statistics.stdev(PLAIN.values()))


@pytest.mark.browser
def test_the_page_in_a_browser(browse: Any, runs: Path) -> None:
    path = runs.parent / "c.html"
    path.write_text(to_page(compare([str(runs / "plain*"), str(runs / "frozen*")]), costs=False))
    page = browse(path)
    assert page.locator("canvas").count() == 4
    assert page.locator("iframe").count() == 2
    assert page.locator("table.figures tbody tr").count() == 2
    page.click(".theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    narrow = browse(path, width=390, dark=True)
    assert narrow.evaluate("document.documentElement.scrollWidth <= innerWidth")
