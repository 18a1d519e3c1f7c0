"""`graphopt fit`: the batch, or the passes, that fit a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.options import JsonOption, SetOption, SpecArgument, TrustOption, out_option
from graphopt.cli.screen import grid, show, show_json
from graphopt.errors import RunError
from graphopt.files import write_atomically

if TYPE_CHECKING:
    from graphopt.planning.budget import Fit

_FLOPS = "FLOPs of a step, as a fraction of the backbone's; with --suggest."


def fit(
    spec: SpecArgument,
    memory: Annotated[str | None, typer.Option("--memory", metavar="SIZE", help='Peak memory of a step: "8 GiB".')] = None,
    flops: Annotated[float | None, typer.Option("--flops", help=_FLOPS)] = None,
    suggest: Annotated[bool, typer.Option("--suggest", help="Find passes that fit at the spec's batch, instead of a batch.")] = False,
    allowance: Annotated[float, typer.Option("--allowance", help="Memory of a process per live byte. See tools/tables/cost_rss.md.")] = 1.0,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Batch for --suggest; default: the spec's.")] = None,
    out: Annotated[Path | None, out_option("Write the chosen spec there.")] = None,
    set_: SetOption = [],  # noqa: B006
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the largest batch that fits a budget, or the cheapest passes that do.

    Candidates are forecast; nothing trains. Memory means live bytes: leave room for the allocator. Examples:

        graphopt fit quickstart --memory "256 MiB"

        graphopt fit spec.toml --memory "8 GiB" --suggest -o fitted.toml

        graphopt fit spec.toml --flops 0.5 --suggest
    """
    from graphopt.planning.budget import Budget, Search
    from graphopt.spec import dumps, load
    from graphopt.units import parse_size

    try:
        budget = Budget(None if memory is None else parse_size(memory), flops, allowance)
    except ValueError as error:
        raise RunError(str(error), where="--memory") from error
    if out is not None and out.exists():
        raise RunError("the file exists", where=str(out), fix="Choose another name, or remove it")
    search = Search(load(spec, trust=trust, overrides=[*set_, *([f"train.batch={batch}"] if batch else [])]), trust=trust)
    found = search.suggest(budget) if suggest else search.largest_batch(budget)
    if out is not None and found.spec is not None:
        write_atomically(out, dumps(found.spec))
    if as_json:
        show_json(found.to_dict())
    else:
        _show(found, suggest)
        if out is not None and found.spec is not None:
            show(f"\nwritten: {out}")
    if found.chosen is None:
        raise RunError("nothing that was tried fits the budget", fix="Give more, or a smaller batch (--batch)")


def _show(found: "Fit", suggest: bool) -> None:
    from graphopt.units import show_count, show_size

    budget = found.budget
    limits = [f"memory {show_size(budget.memory)}"] if budget.memory is not None else []
    limits += [f"FLOPs {budget.flops:g} of the backbone's"] if budget.flops is not None else []
    limits += [f"allowance {budget.allowance:g}"] if budget.allowance != 1 else []
    show(f"budget: {', '.join(limits)}; batch {found.batch}")
    table = grid("", "candidate", "peak", "FLOPs a step", "of the backbone's", "untrained", "", right=(2, 3, 4, 5))
    for candidate in sorted(found.candidates, key=lambda c: (not c.best, c.price)):
        if candidate.cost is None:
            continue
        mark = ">" if candidate is found.chosen else "*" if candidate.best else ""
        verdict = ("fits" if candidate.fits else "too much") + (", verified" if candidate.verified else "")
        ratio = f"{candidate.cost.flops / found.backbone.flops:.3f}"
        peak, flops = show_size(candidate.cost.peak_bytes), show_count(candidate.cost.flops)
        table.add_row(mark, candidate.name, peak, flops, ratio, f"{100 * candidate.untrained:.0f} %", verdict)
    show(table)
    for candidate in found.candidates:
        if candidate.refused:
            show(f"left out {candidate.name}: {candidate.refused}")
    if suggest:
        show("> chosen   * no other candidate is better in peak, FLOPs and the share that trains")
    elif found.chosen is not None:
        show(f"largest batch that fits: {found.batch}")
