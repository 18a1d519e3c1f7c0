"""Arguments and options that commands share, checks of them, and the plan of a spec."""

import json
import os
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.errors import GraphoptError, RunError

if TYPE_CHECKING:
    from graphopt.compiler.pipeline import Verify
    from graphopt.compiler.plan import Plan
    from graphopt.spec import Spec


def expanded(text: str) -> Path:
    """A path on the command line, with `~` expanded. Raises BadParameter for an option, which a forgotten path would swallow."""
    if text.startswith("--"):
        raise typer.BadParameter(f"expected a path, found the option {text}; a file of that name is ./{text}")
    return Path(os.path.expanduser(text))


def out_option(help: str, metavar: str = "FILE") -> Any:
    """The option --out of a command."""
    return typer.Option("--out", "-o", metavar=metavar, parser=expanded, help=help)


def complete_spec(incomplete: str) -> list[str]:
    """Names of installed specs that begin so, for the shell."""
    from graphopt.spec import installed

    return [name for name in installed() if name.startswith(incomplete)]


def complete_pass(incomplete: str) -> list[str]:
    """Names of installed passes that begin so, for the shell."""
    from graphopt.compiler.registry import names

    return [name for name in names() if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Folders of runs and studies that begin so, and folders that may hold some, with a slash; for the shell."""
    found = [path for path in sorted(glob(f"{expanded(incomplete)}*")) if os.path.isdir(path)]
    known = [any(os.path.isfile(os.path.join(path, name)) for name in ("run.json", "study.json")) for path in found]
    return [path if is_known else f"{path}/" for path, is_known in zip(found, known, strict=True)]


def complete_network(incomplete: str) -> list[str]:
    """Runs, weights files and installed specs that begin so, for the shell."""
    files = [path for path in sorted(glob(f"{expanded(incomplete)}*")) if path.endswith((".safetensors", ".pt", ".pth", ".toml"))]
    return [*complete_run(incomplete), *files, *complete_spec(incomplete)]


def complete_backbone(incomplete: str) -> list[str]:
    """Backbones (`timm/resnet50`) and installed specs that begin so, for the shell; before the slash, the sources."""
    from graphopt.models.catalog import SOURCES, names

    source, slash, name = incomplete.partition("/")
    if slash and source in SOURCES:
        return [f"{source}/{other}" for other in names(source) if other.startswith(name)]
    return [f"{other}/" for other in SOURCES if other.startswith(incomplete)] + complete_spec(incomplete)


def complete_any(incomplete: str) -> list[str]:
    """Runs, weights files, specs and backbones that begin so, for the shell."""
    return list(dict.fromkeys([*complete_network(incomplete), *complete_backbone(incomplete)]))


SpecArgument = Annotated[
    str, typer.Argument(metavar="SPEC", help="A TOML file, or an installed spec's name.", autocompletion=complete_spec)
]
SetOption = Annotated[
    list[str], typer.Option("--set", "-s", metavar="KEY=VALUE", help="Set one key of the spec: train.epochs=1, pass.0.when.epoch=3.")
]
_DATA = "Folder of the images: DIR, or NAME=DIR with the data set's name (cifar10, folder, ...; default: the spec's)."
DataOption = Annotated[str | None, typer.Option("--data", metavar="DIR", help=_DATA)]
InputOption = Annotated[str | None, typer.Option("--input", metavar="C,H,W", help="One sample's shape; default: the model's.")]
TrustOption = Annotated[bool, typer.Option("--trust", help="Run the Python code that the spec names.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BatchOption = Annotated[int | None, typer.Option("--batch", min=1, help="Samples per step that costs are given for; default: the spec's.")]
CostsOption = Annotated[bool, typer.Option("--costs/--no-costs", help="Forecast a training step before and after.")]


def data_overrides(data: str | None, spec: str, *, trust: bool) -> list[str]:
    """What --data sets of a spec. Where that trains on digits, which are in no folder, a DIR without a name has a folder per class."""
    if data is None:
        return []
    from graphopt.spec import load

    name, equals, folder = data.partition("=")
    if not equals:
        name, folder = "", data
        with suppress(GraphoptError):  # the command itself reports it
            name = "folder" if load(spec, trust=trust).data.name == "digits" else ""
    root = json.dumps(str(expanded(folder).absolute()), ensure_ascii=False)
    return [*([f"data.name={json.dumps(name)}"] if name else []), f"data.root={root}"]


def titled(spec: "Spec", source: str) -> "Spec":
    """A spec for showing: one without a name has that of its file."""
    return spec if spec.name else spec.model_copy(update={"name": Path(source).stem})


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """`"3,224,224"` as (3, 224, 224); raises RunError for a text that is no shape."""
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = (0,)
    if min(shape) < 1:
        raise RunError(f"expected one sample's shape such as 3,224,224, found {text!r}", where="--input")
    return shape


def check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    """Refuses a value of `option` that is not one of `known`."""
    if value not in known:
        raise RunError(f"expected {', '.join(known[:-1])} or {known[-1]}, found {value!r}", where=option)


def check_target(path: Path, name: str) -> None:
    """Refuses, before any work, a `path` at which no file can be written; `name` is a file name to suggest where it is a folder."""
    if path.is_dir():
        raise RunError("is a folder", where=str(path), fix=f"Name a file in it: {path / name}")
    if not path.parent.is_dir():
        raise RunError("its folder does not exist", where=str(path), fix="Make the folder first")


def check_new(path: Path, name: str) -> None:
    """Refuses what `check_target` does, and a file that is there: people write specs, and this one would be lost."""
    check_target(path, name)
    if path.exists():
        raise RunError("the file exists", where=str(path), fix="Choose another name, or remove it")


def check_run(path: Path) -> None:
    """Refuses a run, or a checkpoint of one, that is not there."""
    if not path.exists():
        raise RunError("no such file or folder", where=str(path), fix="Name the folder that `graphopt train` wrote")


def check_epoch(spec: "Spec", epoch: int | None) -> None:
    """Refuses an --epoch that the run does not have."""
    if epoch is not None and epoch >= spec.train.epochs:
        raise RunError(f"the run has epochs 0 to {spec.train.epochs - 1}, not {epoch}", where="--epoch")


def seeded_plan(spec: "Spec", *, trust: bool, verify: "Verify" = "off", batch: int | None = None, costs: bool = True) -> "Plan":
    """The plan of a spec in its first phase, with the initial weights of a run."""
    import torch

    import graphopt

    torch.manual_seed(spec.train.seed)
    return graphopt.compile(None, spec, batch=batch, verify=verify, costs=costs, trust=trust)
