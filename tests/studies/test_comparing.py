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
    assert (plain.name, frozen.name, found.common) == ("plain", "frozen", plain)
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


def test_files_of_every_form(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["t.md", "t.csv", "t.tex", "t.html"]
    assert main(["compare", "runs/plain*", "--no-costs", *(part for name in names for part in ("-o", name))]) == 0
    assert "written: t.md, t.csv, t.tex, t.html" in capsys.readouterr().out
    starts = ["|  | seeds |", "row,baseline,seeds,", "\\begin{tabular}{lrrr", "<!doctype html>"]
    assert [Path(name).read_text()[: len(start)] for name, start in zip(names, starts, strict=True)] == starts


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t.pdf", "t.pdf: no form of a comparison ends in '.pdf'. End it in .md, .csv, .tex or .html"),
        ("table", "table: its name has no ending, which says the form. End it in .md"),
        ("runs", "runs: is a folder"),
        ("gone/t.md", "gone/t.md: its folder does not exist"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_anything_is(
    name: str, message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "runs/plain*", "-o", "first.md", "-o", name]) == 2
    assert message in capsys.readouterr().err
    assert not Path("first.md").exists()


def study(folder: Path, name: str, rows: Mapping[str, Mapping[int, str]], baseline: Mapping[str, str], **published: str) -> None:
    """The index of a study over runs that are in its folder."""
    runs = [{"folder": run, "row": row, "seed": seed} for row, by_seed in rows.items() for seed, run in by_seed.items()]
    figures = [{"variant": row, "figure": "memory", "against": None, "value": v, "source": "a paper"} for row, v in published.items()]
    index = {"study": 2, "name": name, "baselines": baseline, "published": figures, "runs": runs}
    (folder / "study.json").write_text(sealed(index))


def two_studies(runs: Path) -> None:
    """Both have a row `whole`, of other networks."""
    for name, network, accuracy in (("a", "resnet8", 0.9), ("b", "resnet14", 0.5)):
        folder = runs / name
        for seed in (0, 1):
            given = (f"backbone.name={network}",)
            write(folder / f"whole{seed}", seed, accuracy, "pass=[]", *given)
            write(folder / f"cold{seed}", seed, accuracy - 0.1, *given)
        rows = {row: {seed: f"{row}{seed}" for seed in (0, 1)} for row in ("whole", "cold")}
        study(folder, name, rows, {"whole": "whole", "cold": "whole"}, cold="-9 %")


def test_rows_of_one_name_in_two_studies_are_not_mixed(runs: Path) -> None:
    two_studies(runs)
    found = compare([str(runs / "a"), str(runs / "b")])
    assert [(row.name, row.mean("accuracy")) for row in found.rows] == [
        ("a: whole", 0.9),
        ("a: cold", pytest.approx(0.8)),
        ("b: whole", 0.5),
        ("b: cold", pytest.approx(0.4)),
    ]
    assert [found.baselines[row.name].name for row in found.rows] == ["a: whole"] * 2 + ["b: whole"] * 2
    assert found.common is None
    text = tables.markdown(found)
    assert "| b: cold | b: whole | 2 | 40.00 ± 0.00 | -10.00 ± 0.00 |" in text
    assert "| b: cold | memory | b: whole | -9 % | +0.0 % | a paper |" in text
    lines = list(csv.DictReader(tables.to_csv(found).splitlines()))
    assert [(line["row"], line["baseline"], line["published memory"]) for line in lines[2:]] == [
        ("b: whole", "b: whole", ""),
        ("b: cold", "b: whole", "-9 %"),
    ]
    assert tables.latex(found).count(r"\begin{tabular}") == 2
    other = compare([str(runs / "a"), str(runs / "b")], baseline="a: cold")
    assert other.common is not None
    assert other.common.name == "a: cold"
    assert other.beside == found.beside, "a published figure stays one against the study's own baseline"


def test_runs_of_a_study_and_the_same_spec_elsewhere_are_one_row(runs: Path) -> None:
    two_studies(runs)
    write(runs / "elsewhere", 2, 0.6, "pass=[]", "backbone.name=resnet14")
    (whole, cold) = compare([str(runs / "b"), str(runs / "elsewhere"), str(runs / "b" / "whole0")]).rows
    assert [result.seed for result in whole.results] == [0, 1, 2]
    assert cold.name == "cold"


def test_a_run_that_cannot_be_read_leaves_the_others(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "plain1" / "run.json").write_text(sealed({"graphopt": 99}))
    (runs / "plain2" / "summary.json").write_text("{")
    found = compare([str(runs / "plain*")])
    assert (len(found.rows[0].results), found.rows[0].missing) == (1, 2)
    assert main(["compare", "runs/plain*"]) == 0
    out = capsys.readouterr().out
    assert "Left out: runs/plain1/run.json" in out
    assert "runs/plain2/summary.json: is damaged" in out
    with pytest.raises(RunError, match=r"plain2/summary\.json: is damaged"):
        compare([str(runs / "plain*"), str(runs / "plain2")])


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
        (sealed({"study": 9, "members": []}), "study.json: has format 9, this version of graphopt reads format 2"),
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
