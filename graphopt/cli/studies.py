"""The commands for many runs: `graphopt study` makes them, `compare` puts them side by side."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli import options
from graphopt.cli.screen import grid, show, show_columns, show_json, show_text
from graphopt.errors import RunError, did_you_mean
from graphopt.files import write_atomically

if TYPE_CHECKING:
    from graphopt.studies.comparing import Comparison
    from graphopt.studies.running import Outcome
    from graphopt.studies.study import Member


def complete_study(incomplete: str) -> list[str]:
    """Names of installed studies that begin so, for the shell."""
    from graphopt.studies.study import installed

    whole = [name for name in installed() if name.startswith(incomplete)]
    return whole or [short for name in installed() if (short := name.removeprefix("studies/")).startswith(incomplete)]


_STUDY = "A TOML file with a base spec, what to vary, and seeds; or an installed study's name."
_ROW = "Train only rows of this name, or of names like it: --row 'K = 4*'; may be given several times."
_DEVICE = "train.device of the runs, in turn: --device cuda:0 --device cuda:1."


def study(
    study: Annotated[str, typer.Argument(metavar="STUDY", help=_STUDY, autocompletion=complete_study)],
    out: Annotated[Path | None, options.out_option("The study's folder; default: runs/<study>.", "DIR")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Runs at a time; default: one, or one for each device.")] = None,
    device: Annotated[list[str], typer.Option("--device", help=_DEVICE)] = [],  # noqa: B006  # never changed
    row: Annotated[list[str], typer.Option("--row", metavar="ROW", help=_ROW)] = [],  # noqa: B006  # never changed
    only_list: Annotated[bool, typer.Option("--list", help="List the runs and what is done; train nothing.")] = False,
    data: options.DataOption = None,
    set_: options.SetOption = [],  # noqa: B006  # never changed
    trust: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Train every run of STUDY that is missing, and compare them.

    A run that is done is never repeated, and one that was stopped goes on: repeat the command after Ctrl-C, or with another file that
    has more rows or seeds. A run that fails stops no other; the exit status is then 1. Examples:

        graphopt study studies/share-digits --list

        graphopt study my-study.toml -o runs/my-study --jobs 2

        graphopt study my-study.toml --device cuda:0 --device cuda:1

        graphopt study drop-cifar10 --data cifar10=~/cifar --row "VGG-11*"
    """
    from graphopt.studies.study import members, read_study

    if "WORLD_SIZE" in os.environ:
        raise RunError("a study starts its own processes", where="torchrun", fix="Start graphopt study itself, with --jobs")
    read, path = read_study(study)
    overrides = [*(options.data_overrides(data, read.spec or "", trust=trust)), *set_]
    runs = members(read, path, overrides=overrides, trust=trust)
    folder = out or Path("runs", path.stem)
    chosen = _chosen(runs, row)
    if only_list:
        _show_members(chosen, folder, as_json)
        return

    from graphopt.studies.running import run_study

    say = (lambda _: None) if as_json else show
    outcomes = run_study(read, runs, folder, only=chosen, jobs=jobs or max(1, len(device)), devices=device, trust=trust, say=say)
    _finish(outcomes, folder, as_json, trust)


def _chosen(runs: "list[Member]", patterns: list[str]) -> "list[Member]":
    """The runs of the rows that --row names; all without it."""
    from fnmatch import fnmatchcase

    names = list(dict.fromkeys(run.row for run in runs))
    for pattern in patterns:
        if pattern not in names and not any(fnmatchcase(name, pattern) for name in names):
            fix = did_you_mean(pattern, names) or f"There are {', '.join(names)}"
            raise RunError(f"there is no row {pattern!r}", where="--row", fix=fix)
    return [run for run in runs if not patterns or any(run.row == p or fnmatchcase(run.row, p) for p in patterns)]


def _finish(outcomes: "list[Outcome]", folder: Path, as_json: bool, trust: bool) -> None:
    """Shows what there is, and ends with the status that says whether that is all."""
    from graphopt.studies.comparing import compare as compared

    states = [outcome.state for outcome in outcomes]
    if "done" in states:
        _show(compared([str(folder)], trust=trust), as_json)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    what = f"{len(failed)} of {len(outcomes)} runs failed: " + ", ".join(outcome.folder.name for outcome in failed)
    if "stopped" in states:
        what = f"stopped with {states.count('done')} of {len(outcomes)} runs done"
        error = RunError(what, where=str(folder), fix="The same command continues it")
        error.exit_code = 130
        raise error
    if failed:
        error = RunError(what, where=str(folder), fix="The same command tries them again")
        error.exit_code = 1
        raise error
    if not as_json:
        show(f"runs: {folder}   the page: graphopt compare {folder} -o comparison.html")


def _show_members(runs: "list[Member]", folder: Path, as_json: bool) -> None:
    from graphopt.studies.running import folder_of, summary_of

    found = [(run, place := folder_of(run, folder), summary_of(place) is not None) for run in runs]
    if as_json:
        plain = [{"row": r.row, "seed": r.seed, "set": r.changes, "folder": str(place), "done": done} for r, place, done in found]
        show_json(plain)
        return
    rows = grid("row", "seed", "folder", "", right=(1,))
    for run, place, done in found:
        rows.add_row(run.row, str(run.seed), str(place), "done" if done else "")
    show(rows)


_HTML = "Write one page: curves, accuracy against memory and time, and the diffs side by side."
_OUT = "Write a file of the form that its ending names: .md, .csv, .tex (booktabs) or .html; may be given several times."
_RUNS = "Folders of runs and of studies, or globs."
_BASELINE = "The row that the others are compared with; default: the study's, else the first."


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help=_RUNS, autocompletion=options.complete_run)],
    baseline: Annotated[str | None, typer.Option("--baseline", metavar="ROW", help=_BASELINE)] = None,
    metric: Annotated[
        str, typer.Option("--metric", help="accuracy (of the last epoch), best_accuracy, top5_accuracy or ema_accuracy.")
    ] = "accuracy",
    out: Annotated[list[Path], options.out_option(_OUT)] = [],  # noqa: B006  # never changed
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", parser=options.expanded, help=_HTML)] = None,
    md: Annotated[bool, typer.Option("--md", help="Print Markdown.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV, with plain numbers.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print a LaTeX tabular (booktabs).")] = False,
    costs: options.CostsOption = True,
    trust: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Compare runs in a table: accuracy over seeds, differences paired by seed, parameters, FLOPs, memory and time.

    Runs of one spec with several seeds are one row. Examples:

        graphopt compare runs/first runs/second

        graphopt compare runs/my-study --baseline end-to-end -o comparison.html

        graphopt compare "runs/*" -o table.tex -o table.csv
    """
    from graphopt.studies.comparing import METRICS, compare

    options.check_choice("--metric", metric, METRICS)
    if sum((md, csv, latex, as_json)) > 1:
        raise RunError("one form at a time", where="--md, --csv, --latex, --json", fix="Call it again for another form")
    for path in (files := [*out, *([html] if html is not None else [])]):
        options.check_target(path, "comparison.html")
    _check_endings(out)
    found = compare(runs, baseline=baseline, metric=metric, trust=trust)
    for path in files:
        write_atomically(path, _written(found, ".html" if path is html else path.suffix, trust, costs))
    if md or csv or latex:
        from graphopt.studies import tables

        show_text(tables.markdown(found) if md else tables.to_csv(found) if csv else tables.latex(found))
        return
    _show(found, as_json)
    if files and not as_json:
        show(f"written: {', '.join(map(str, files))}")


def _check_endings(files: list[Path]) -> None:
    from graphopt.studies.tables import FORMS

    for path in files:
        if path.suffix not in FORMS and path.suffix != ".html":
            what = f"no form of a comparison ends in {path.suffix!r}" if path.suffix else "its name has no ending, which says the form"
            raise RunError(what, where=str(path), fix=f"End it in {', '.join(FORMS)} or .html")


def _written(comparison: "Comparison", ending: str, trust: bool, costs: bool) -> str:
    if ending == ".html":
        from graphopt.studies.page import to_page

        return to_page(comparison, trust=trust, costs=costs)
    from graphopt.studies.tables import FORMS

    return FORMS[ending](comparison)


def _show(comparison: "Comparison", as_json: bool) -> None:
    """Prints a comparison."""
    from graphopt.studies import tables

    if as_json:
        show_json(comparison.to_dict())
        return
    show(f"{comparison.title}")
    show_columns(*tables.table(comparison))
    show(tables.note(comparison))
    beside = tables.published(comparison)
    if beside is not None:
        show()
        show_columns(*beside)
