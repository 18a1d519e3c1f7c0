"""The commands that write and read runs: `graphopt train`, `report` (a run as one HTML page) and `export` (its ordinary model)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import options
from graphopt.cli.screen import console, show, show_json
from graphopt.errors import GraphoptError, RunError, silenced
from graphopt.files import write_atomically

if TYPE_CHECKING:
    from graphopt.spec import TrainSpec

_RUN = "The folder that `graphopt train` wrote."
_SAVED = "A run's folder, or one of its checkpoints."


def train(
    spec: options.SpecArgument,
    out: Annotated[Path | None, options.out_option("The run's folder; default: runs/<spec>.", "RUN")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    data: options.DataOption = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="train.seed: of the initial weights, the order of images, and all chance.")
    ] = None,
    set_: options.SetOption = [],  # noqa: B006  # never changed
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files into RUN/tensorboard too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Processes on this machine; on CUDA, each takes a GPU.")] = 1,
    trust: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Train SPEC into a folder: checkpoints, metrics.jsonl, summary.json.

    Ctrl-C stops after the current step and writes a checkpoint; --resume continues from there. Examples:

        graphopt train quickstart

        graphopt train spec.toml -o runs/first --set train.epochs=3

        graphopt train spec.toml -o runs/first --resume

        graphopt train spec.toml --data ~/imagenette2-160

        graphopt train spec.toml --ranks 2

    On several machines, or for restarts after a failure: torchrun ... -m graphopt train SPEC.
    """
    from dataclasses import asdict

    from graphopt.spec import load

    set_ = [*options.data_overrides(data, spec, trust=trust), *([f"train.seed={seed}"] if seed is not None else []), *set_]
    with _said_once():
        loaded = load(spec, trust=trust, overrides=set_)
        if ranks > 1:
            _check_ranks(loaded.train, ranks)
        if not out and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            raise RunError("processes on several machines have to be told the run's folder", where="--out", fix="Name one that all see")

    from graphopt.driver import located_backbone
    from graphopt.train import train as run
    from graphopt.train.meeting import place
    from graphopt.train.ranks import restarted

    folder, screen = out or _folder(spec, resume or restarted()), None if quiet or as_json else console()
    if resume and screen is not None and "WORLD_SIZE" not in os.environ and not folder.exists():
        show(f"there is no run in {folder} yet: it begins")
    if ranks > 1:
        from graphopt.train.launch import launch

        flags = {"--resume": resume, "--tensorboard": tensorboard, "--quiet": quiet, "--trust": trust, "--json": as_json}
        settings = [argument for value in set_ for argument in ("--set", value)]
        chosen = [flag for flag, given in flags.items() if given]
        return launch(ranks, ["train", spec, "--out", str(folder), *settings, *chosen])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from graphopt.train.launch import end_with_launcher

        end_with_launcher()
    with located_backbone(loaded):
        summary = run(loaded, folder, resume=resume, trust=trust, tensorboard=tensorboard, console=screen)
    if place()[0]:
        return  # rank 0 speaks
    if as_json:
        show_json(asdict(summary))
    elif not quiet:
        best = f"best {100 * summary.best_accuracy:.2f} % in epoch {summary.best_epoch}"
        show(f"accuracy {100 * summary.accuracy:.2f} % ({best}) after {summary.seconds:.0f} s on {summary.device}")
        show(f"run: {summary.folder}   export it: graphopt export {summary.folder} -o model.safetensors")


def _check_ranks(spec: "TrainSpec", ranks: int) -> None:
    """Raises RunError where so many processes cannot train, before any of them is started."""
    if "WORLD_SIZE" in os.environ:
        raise RunError("torchrun has started the processes already", where="--ranks", fix="Leave --ranks out")
    if spec.strategy == "single":
        raise RunError(f'strategy = "single" is one process, not {ranks}', where="--ranks", fix='Use strategy = "auto"')
    if spec.strategy != "modules":
        spec.micro_batch(ranks)


@contextmanager
def _said_once() -> Iterator[None]:
    """Silences an error that another process has reported: of what they do before they meet, all may find it, or one alone."""
    try:
        yield
    except GraphoptError as error:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            from graphopt.train.meeting import reports_first

            if not reports_first():
                silenced(error)
        raise


def _folder(spec: str, resume: bool) -> Path:
    """`runs/<spec>`, or the next free `runs/<spec>-2` if that exists; with `resume`, the newest that exists."""
    path = Path(spec)
    name = path.parent.name if path.name == "spec.toml" else path.name if path.is_dir() else path.stem
    newest = folder = Path("runs", name)
    for number in count(2):
        if not folder.exists():
            break
        newest, folder = folder, Path("runs", f"{name}-{number}")
    return newest if resume else folder


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=options.expanded, help=_RUN, autocompletion=options.complete_run)],
    out: Annotated[Path | None, options.out_option("The page; default: report.html in the folder.")] = None,
    costs: options.CostsOption = True,
    trust: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Write one HTML page about a run: curves, phases and decisions, memory and step time, and the diff.

    Of a run with `train.ledger = true`, says of each epoch whether it took each sample exactly once; the exit status is 1 if one did not.
    The page needs no network and no other files. Examples:

        graphopt report runs/quickstart

        graphopt report runs/quickstart -o quickstart.html
    """
    options.check_run(run)

    from graphopt.diff.render.run import read_run, to_report
    from graphopt.spec import load

    found = read_run(run)
    target = out or run / "report.html"
    options.check_target(target, "report.html")
    write_atomically(target, to_report(found, options.seeded_plan(load(run, trust=trust), trust=trust, costs=costs)))
    if as_json:
        show_json({"written": str(target), "ledger": [{"epoch": epoch.epoch, "right": epoch.right} for epoch in found.ledger]})
    else:
        show(f"written: {target}")
        for epoch in found.ledger:
            show(str(epoch))
    if not all(epoch.right for epoch in found.ledger):
        raise typer.Exit(1)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=options.expanded, help=_SAVED, autocompletion=options.complete_run)],
    out: Annotated[Path, options.out_option("The file to write: .safetensors, or .pt for torch.load.")],
    which: Annotated[str, typer.Option("--which", help="best or last checkpoint.")] = "best",
    weights: Annotated[str, typer.Option("--weights", help="auto, model or ema (the averaged weights).")] = "auto",
    trust: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Write a run's weights under the backbone's own keys; they load strictly into the untouched backbone.

    Example:

        graphopt export runs/quickstart -o model.safetensors
    """
    options.check_choice("--which", which, ("best", "last"))
    options.check_choice("--weights", weights, ("auto", "model", "ema"))
    options.check_run(run)

    from graphopt.plan_file import is_plan_file
    from graphopt.train.export import export_run
    from graphopt.units import show_size

    chosen: dict[str, Any] = {"which": which, "weights": weights}
    written = export_run(run, out, **chosen, trust=trust)
    size, whole = written.stat().st_size, is_plan_file(written)
    if as_json:
        show_json({"written": str(written), "bytes": size, "form": "plan" if whole else "weights"})
        return
    show(f"written: {written} ({show_size(size)})")
    if whole:
        show("it holds the rewritten model and its spec: the backbone's architecture cannot express it. Load it with graphopt.load(file)")
