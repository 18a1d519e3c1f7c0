"""`graphopt eval`: accuracy, loss and speed of a run, of a weights file, or of a spec's backbone."""

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli import options
from graphopt.cli.networks import is_weights
from graphopt.cli.screen import grid, show, show_error, show_json, show_text
from graphopt.errors import RunError, printable
from graphopt.files import write_atomically

if TYPE_CHECKING:
    from torch import nn

    from graphopt.spec import Spec
    from graphopt.train.scoring import Scores

#: classes in a confusion matrix that is printed as a table
_WIDEST = 12
_WHAT = "A run's folder or one of its checkpoints, a weights file, or a spec."
_SPEC = "Of a weights file: the spec that names its backbone and data."
_EPOCH = "Of a run: the end of this epoch (from 0); default: its best."
_CONFUSION = "Write the confusion matrix there (.csv or .json); - prints it."


def eval(
    what: Annotated[str, typer.Argument(metavar="RUN|WEIGHTS|SPEC", help=_WHAT, autocompletion=options.complete_network)],
    spec: Annotated[str | None, typer.Option("--spec", help=_SPEC, autocompletion=options.complete_spec)] = None,
    epoch: Annotated[int | None, typer.Option("--epoch", min=0, help=_EPOCH)] = None,
    data: options.DataOption = None,
    split: Annotated[str | None, typer.Option("--split", help="train, validation, test; default: the spec's data.eval_split.")] = None,
    weights: Annotated[str, typer.Option("--weights", help="Of a run: auto, model or ema (the averaged weights).")] = "auto",
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Images at once; default: the spec's batch.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: the spec's.")] = None,
    confusion: Annotated[Path | None, typer.Option("--confusion", metavar="FILE", parser=options.expanded, help=_CONFUSION)] = None,
    set_: options.SetOption = [],  # noqa: B006  # never changed
    trust: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Evaluate a network: accuracy (top-1, top-5), loss, images per second and, where asked for, the confusion matrix.

    A weights file that `graphopt export` wrote needs --spec; a run and a spec bring their own data. Examples:

        graphopt eval runs/quickstart

        graphopt eval model.safetensors --spec quickstart --confusion confusion.csv

        graphopt eval my.toml --data ~/imagenette2-160 --split validation
    """
    options.check_choice("--weights", weights, ("auto", "model", "ema"))
    if confusion is not None and str(confusion) != "-":
        options.check_target(confusion, "confusion.csv")
    given = {"data.eval_split": split, "train.batch": batch, "train.device": device}
    overrides = [*options.data_overrides(data, spec or what, trust=trust), *set_]
    overrides += [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    module, loaded = _network(what, spec, overrides, epoch=epoch, weights=weights, trust=trust)

    from graphopt.train.scoring import score

    scores = score(module, loaded, confusion=confusion is not None)
    if confusion is not None and str(confusion) != "-":
        write_atomically(confusion, _matrix(scores, confusion))
    if as_json:
        show_json({"name": loaded.name, "digest": loaded.digest, **scores.to_dict()})
        return
    _show(scores)
    if confusion is not None and str(confusion) == "-":
        _show_matrix(scores)
    elif confusion is not None:
        show(f"written: {confusion}")


def _network(
    what: str, spec: str | None, overrides: list[str], *, epoch: int | None, weights: str, trust: bool
) -> "tuple[nn.Module, Spec]":
    """The network that an argument means, and the spec that says how to evaluate it."""
    from graphopt.spec import installed, load

    path = options.expanded(what)
    is_run = path.is_dir() and _is_run(path)
    run = path if is_run else path.parent if path.suffix == ".pt" and (path.parent / "run.json").is_file() else None
    if epoch is not None and not is_run:
        raise RunError("only the folder of a run has epochs", where="--epoch", fix="Name the folder that `graphopt train` wrote")
    if spec is None and run is not None:
        loaded = load(run, trust=trust, overrides=overrides)
        _check_spec(run)
        return _of_run(path, epoch, weights, trust), loaded
    if is_weights(what):
        return _of_file(path, spec, overrides, trust)
    if spec is not None:
        raise RunError("belongs to a weights file", where="--spec", fix="Leave it out: a run and a spec have their own")
    if not path.exists() and what not in installed():
        raise RunError("no such run, weights file or spec", where=what, fix="`graphopt specs` lists the installed specs")
    loaded = load(what, trust=trust, overrides=overrides)
    if loaded.backbone.weights is None:
        show_error("no weights are named (backbone.weights): the network is as it was initialised", "note")
    return options.seeded_plan(loaded, trust=trust, costs=False).module, loaded


def _is_run(path: Path) -> bool:
    from graphopt.diff.render.run import is_run

    return is_run(path)


def _check_spec(run: Path) -> None:
    """Refuses a spec that was changed since: its data may be others. What is scored is changed by `--set`."""
    from graphopt.diff.render.run import check_spec
    from graphopt.train.folder import read_manifest

    manifest = read_manifest(run)
    if manifest is not None:  # a run that has lost it is scored all the same
        check_spec(run, manifest)


def _of_run(path: Path, epoch: int | None, weights: str, trust: bool) -> "nn.Module":
    from graphopt.train.export import load_run

    chosen: Any = weights
    return load_run(path, epoch=epoch, weights=chosen, trust=trust).module


def _of_file(path: Path, spec: str | None, overrides: list[str], trust: bool) -> "tuple[nn.Module, Spec]":
    """The network of a weights file: a plan's own, or the backbone of `spec` with these weights."""
    from graphopt.plan_file import is_plan_file, read_plan_file
    from graphopt.spec import dumps, load, loads

    if path.suffix == ".safetensors" and is_plan_file(path):
        plan = read_plan_file(path, trust=trust)
        assert plan.spec is not None  # one that was compiled by hand is refused
        if spec is None:
            return plan.module, loads(dumps(plan.spec), trust=trust, overrides=overrides)
        return plan.module, load(spec, trust=trust, overrides=overrides)
    if spec is None:
        fix = "Name the spec that it was trained with: --spec SPEC"
        raise RunError("a weights file does not say which backbone and data it belongs to", where=str(path), fix=fix)
    loaded = load(spec, trust=trust, overrides=[*overrides, f"backbone.weights={json.dumps(str(path.resolve()))}"])

    from graphopt.driver import build_backbone, located_backbone

    with located_backbone(loaded):
        return build_backbone(loaded.backbone, trust=trust), loaded


def _show(scores: "Scores") -> None:
    show(f"{scores.samples:,} images of {scores.data} ({scores.split}), batch {scores.batch}, on {scores.device}")
    table = grid("figure", "value", right=(1,))
    table.add_row("accuracy, top-1", f"{100 * scores.accuracy:.2f} %")
    table.add_row("accuracy, top-5", f"{100 * scores.top5_accuracy:.2f} %")
    table.add_row("loss", f"{scores.loss:.4f}")
    table.add_row("images per second", f"{scores.images_per_second:,.0f}")
    if scores.network_images_per_second is not None:
        table.add_row("of the network alone", f"{scores.network_images_per_second:,.0f}")
    show(table)


def _show_matrix(scores: "Scores") -> None:
    """Prints the confusion matrix: as a table, or as CSV where that would be wider than a terminal."""
    counts = scores.confusion or ()
    if len(counts[0]) > _WIDEST:
        show_text(_matrix(scores, Path("-")))
        return
    table = grid("class \\ predicted", *_columns(scores), right=tuple(range(1, len(counts[0]) + 1)))
    for name, row in zip(scores.classes, counts, strict=True):
        table.add_row(name, *map(str, row))
    show(table)


def _classes(scores: "Scores") -> list[str]:
    """The names of the classes, as folders have them, in what a file can hold."""
    return [printable(name) for name in scores.classes]


def _columns(scores: "Scores") -> list[str]:
    """The names of the classes, and of outputs that are no class of the data."""
    width = len((scores.confusion or ((),))[0])
    return [*_classes(scores), *(f"output {number}" for number in range(len(scores.classes), width))]


def _matrix(scores: "Scores", path: Path) -> str:
    """The confusion matrix as CSV, or as JSON where the file's name says so: a row per class in the data."""
    assert scores.confusion is not None
    names = _columns(scores)
    if path.suffix.lower() == ".json":
        return json.dumps({"classes": names, "counts": scores.confusion}, ensure_ascii=False) + "\n"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class \\ predicted", *names])
    writer.writerows([name, *row] for name, row in zip(_classes(scores), scores.confusion, strict=True))
    return text.getvalue()
