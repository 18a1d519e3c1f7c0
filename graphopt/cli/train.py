"""`graphopt train`: train a spec."""

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.options import JsonOption, SetOption, SpecArgument, TrustOption, expanded, load_spec


def train(
    spec: SpecArgument,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="RUN", parser=expanded, help="The run's folder; default: runs/<spec>.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    set_: SetOption = [],  # noqa: B006
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files into RUN/tensorboard too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train SPEC into a folder: checkpoints, metrics.jsonl, summary.json.

    Ctrl-C stops after the current step and writes a checkpoint; --resume continues from there. Examples:

        graphopt train quickstart

        graphopt train spec.toml -o runs/first --set train.epochs=3

        graphopt train spec.toml -o runs/first --resume
    """
    from dataclasses import asdict

    from graphopt.cli.screen import console, show, show_json
    from graphopt.driver import located_backbone
    from graphopt.train import train as run

    loaded = load_spec(spec, set_, trust)
    folder = out or _folder(spec, resume)
    silent = quiet or as_json
    with located_backbone(loaded):
        summary = run(loaded, folder, resume=resume, trust=trust, tensorboard=tensorboard, console=None if silent else console())
    if as_json:
        show_json(asdict(summary))
    elif not quiet:
        best = f"best {100 * summary.best_accuracy:.2f} % in epoch {summary.best_epoch + 1}"
        show(f"accuracy {100 * summary.accuracy:.2f} % ({best}) after {summary.seconds:.0f} s on {summary.device}")
        show(f"run: {summary.folder}   export it: graphopt export {summary.folder} -o model.safetensors")


def _folder(spec: str, resume: bool) -> Path:
    """`runs/<spec>`, or the next free `runs/<spec>-2` if that exists; with `resume`, the newest that exists."""
    path = Path(spec)
    name = path.parent.name if path.name == "spec.toml" else path.name if path.is_dir() else path.stem
    taken: Path | None = None
    number = 1
    while True:
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            return (taken or folder) if resume else folder
        taken, number = folder, number + 1
