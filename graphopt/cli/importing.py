"""The command that brings a training run of timm's script here: `graphopt import`."""

from pathlib import Path
from typing import Annotated

import typer

from graphopt.cli.options import check_new, expanded, out_option
from graphopt.cli.screen import show, show_json, show_text
from graphopt.files import write_atomically


def import_(
    arguments: Annotated[
        Path | None, typer.Argument(metavar="[ARGS.yaml]", parser=expanded, help="What timm's train.py wrote into its output folder.")
    ] = None,
    out: Annotated[Path | None, out_option("Write the spec there; default: print it.")] = None,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="OPTION=VALUE", help="Set one option of the script: lr=0.1, model=resnet18.")
    ] = [],  # noqa: B006  # never changed
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Processes of that run: the script's batch is of each of them.")] = 1,
    teacher: Annotated[Path | None, typer.Option("--teacher", metavar="FILE", parser=expanded, help="Weights of kd_model_name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: the spec, and the notes on options without effect.")] = False,
) -> None:
    """Make a spec of the options of a training run of timm's train.py.

    Every option is mapped, refused by name with the reason, or noted in the spec where it has no effect. Examples:

        graphopt import output/train/mine/args.yaml -o mine.toml

        graphopt import --set model=resnet18 --set data_dir=imagenette2 --set epochs=20 -o mine.toml
    """
    from graphopt.timm_args import convert, read

    if out is not None:
        check_new(out, "spec.toml")
    made = convert(read(arguments, set_), ranks=ranks, teacher=None if teacher is None else str(teacher))
    if out is not None:
        write_atomically(out, made.text)
    if as_json:
        show_json({"spec": made.spec.resolved(), "notes": dict(made.notes), "file": None if out is None else str(out)})
    elif out is None:
        show_text(made.text)
    else:
        show(f"written: {out}")
        for name, why in made.notes.items():
            show(f"  {name}: {why}")
        show(f"graphopt check {out} tells what it costs, graphopt train {out} trains it.")
