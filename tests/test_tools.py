"""The measuring scripts: each imports, so that a renamed name is noticed; what they measure is in tools/tables."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from graphopt.passes.supervise import Supervise
from graphopt.spec import BackboneSpec
from graphopt.studies.study import installed, read_study
from tests.support.ranks import run_process

TOOLS = sorted((Path(__file__).parents[1] / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_it_imports(tool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tool.parent)
    names = runpy.run_path(str(tool), run_name="imported")
    assert names["__doc__"]


def test_published_figures_are_those_of_the_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    import replicate  # type: ignore[import-not-found]  # a script, found by the path above

    rows = replicate.all_rows()
    found = ((name, item) for name in installed() for item in read_study(name)[0].published)
    published = {(name, row, item.figure, item.value) for name, item in found for row in item.variant}
    assert {(row.study, row.member.row, row.figure, row.published) for row in rows if row.source} == published
    (row,) = (row for row in rows if (row.study, row.member.row) == ("studies/replacement-resnet32", "k = 4"))
    assert (row.published, row.ours()) == ("-4.9 %", "-4.9 %")
    assert row.command == """apply replacement/resnet32 --set 'pass=[{ use = "share", every = 4 }]'"""


def test_the_runner_is_compared_with_a_loop_epoch_by_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    import runner_bench  # type: ignore[import-not-found]  # a script, found by the path above

    found = runner_bench.measured("ResNet-20, 8 px, batch 64", 1, 1)
    assert [len(found[what]) for what in ("runner", "loop")] == [1, 1]
    assert min(found["runner"] + found["loop"]) > 0


def test_kept_features_are_timed_in_ram_and_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    import drop_cache  # type: ignore[import-not-found]  # a script, found by the path above

    lines = drop_cache.table(BackboneSpec(source="cifar", name="resnet8", input=(3, 8, 8)), batch=2, rows=4, repeats=1, every=9)
    assert [line.split(" | ")[1] for line in lines] == ["float32", "float16"]


def test_the_gpu_s_table_runs_dry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    import gpu_passes  # type: ignore[import-not-found]  # a script, found by the path above

    monkeypatch.setattr(gpu_passes, "variants", lambda _: [("none", ()), ("supervise", (Supervise(modules=2),))])
    assert gpu_passes.main(["--dry", "--device", "L4", "--out", str(tmp_path / "table.md")]) == 0
    title, *_, plain, supervised = (tmp_path / "table.md").read_text().splitlines()
    assert "nothing was measured" in title
    assert plain.startswith("| resnet20 | 4 | none | - | - |")
    assert supervised.count("|") == 1 + len(gpu_passes.COLUMNS)


def test_the_gpu_s_chain_runs_dry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "tools")
    import gpu_modules  # type: ignore[import-not-found]  # a script, found by the path above

    assert run_process(gpu_modules.main, ["--dry", "--out", str(tmp_path / "table.md")]) == 0
    title, *_, alone, second, first = (tmp_path / "table.md").read_text().splitlines()
    assert "nothing was measured" in title
    assert [row.split(" | ")[4:6] for row in (alone, second, first)] == [["0", "one process"], ["0", "1"], ["0", "0"]]
