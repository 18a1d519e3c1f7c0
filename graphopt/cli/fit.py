"""`graphopt fit`: the batch, or the passes, that fit a budget of memory, FLOPs or time."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.device import gpu
from graphopt.cli.options import JsonOption, SetOption, SpecArgument, TrustOption, check_new, out_option
from graphopt.cli.screen import grid, show, show_json
from graphopt.errors import RunError
from graphopt.files import write_atomically

if TYPE_CHECKING:
    from graphopt.compiler.plan import Plan
    from graphopt.cost import Rates
    from graphopt.planning.budget import Budget, Fit
    from graphopt.planning.quicker import SpeedPlan
    from graphopt.spec import Spec, TrainSpec

_ALLOWANCE = "Memory of a process per byte that is forecast: 1.09 to 1.35 in measured CPU processes, so 1.45 is safe there."
_DEVICE = "Fit the memory of this GPU as its allocator needs it: A100, H100, H200, RTX 4090 or L4; none is needed."
_TIME = 'Time of the whole run: "30 min". Settings and schedules of passes are searched.'
_SPEEDUP = "As --time: the run as it is, divided by this."
_HOLD = "Points of held-out accuracy that the passes of --time or --speedup may cost (default: 1); in the run, they are undone beyond it."
_KEEP = "With --time or --speedup: leave the memory format (channels_last) and the precision (amp) as they are."
_FLOPS = "FLOPs of a step, as a fraction of the backbone's; with --suggest."


def fit(
    spec: SpecArgument,
    memory: Annotated[str | None, typer.Option("--memory", metavar="SIZE", help='Peak memory of a step: "8 GiB".')] = None,
    device: Annotated[str | None, typer.Option("--device", help=_DEVICE)] = None,
    flops: Annotated[float | None, typer.Option("--flops", help=_FLOPS)] = None,
    time: Annotated[str | None, typer.Option("--time", metavar="TIME", help=_TIME)] = None,
    speedup: Annotated[float | None, typer.Option("--speedup", metavar="FACTOR", help=_SPEEDUP)] = None,
    hold: Annotated[float | None, typer.Option("--hold", metavar="POINTS", min=0.01, max=100, help=_HOLD)] = None,
    keep_settings: Annotated[bool, typer.Option("--keep-settings", help=_KEEP)] = False,
    suggest: Annotated[bool, typer.Option("--suggest", help="Find passes that fit at the spec's batch, instead of a batch.")] = False,
    allowance: Annotated[float, typer.Option("--allowance", help=_ALLOWANCE)] = 1.0,
    everything: Annotated[bool, typer.Option("--all", help="With --suggest: try all candidates, not only what the choice takes.")] = False,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Batch for --suggest; default: the spec's.")] = None,
    out: Annotated[Path | None, out_option("Write the chosen spec there.")] = None,
    set_: SetOption = [],  # noqa: B006  # never changed
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the largest batch that fits a budget, or the cheapest passes that do; or schedules of passes for a run of a given time.

    Candidates are forecast; nothing trains. Memory means live bytes: leave room for the allocator. With --device it means what the
    allocator of that GPU must be able to get, by default all that the driver leaves. Examples:

        graphopt fit quickstart --memory "256 MiB"

        graphopt fit spec.toml --memory "8 GiB" --suggest -o fitted.toml

        graphopt fit spec.toml --device "RTX 4090" --suggest

        graphopt fit spec.toml --flops 0.5 --suggest

        graphopt fit spec.toml --speedup 2 -o faster.toml
    """
    from graphopt.spec import dumps, load
    from graphopt.units import parse_size

    try:
        size = None if memory is None else parse_size(memory)
    except ValueError as error:
        raise RunError(str(error), where="--memory") from error
    if out is not None:
        check_new(out, "spec.toml")
    loaded = load(spec, trust=trust, overrides=[*set_, *([f"train.batch={batch}"] if batch else [])])

    if time is not None or speedup is not None:
        others = {"--memory": memory, "--flops": flops, "--suggest": suggest, "--all": everything, "--allowance": allowance != 1.0}
        _refuse({**others, "--time": time is not None and speedup is not None}, "a search for time has no use for it")
        _fit_time(loaded, time, speedup, 1.0 if hold is None else hold, keep_settings, device, trust, out, as_json)
        return
    _refuse({"--hold": hold, "--keep-settings": keep_settings}, "it belongs to a search for time (--time, --speedup)")

    from graphopt.planning.budget import Budget, Search

    card = gpu(device) if device is not None else None
    budget = Budget(size, flops, allowance, card)
    if not suggest:
        budget.check_for_batch()
    search = Search(loaded, device=card, trust=trust)
    found = search.suggest(budget, everything=everything) if suggest else search.largest_batch(budget)
    if out is not None and found.spec is not None:
        write_atomically(out, dumps(found.spec, defaults=False))
    if as_json:
        show_json(found.to_dict())
    else:
        _show(found, suggest)
        if out is not None and found.spec is not None:
            show(f"\nwritten: {out}")
    if found.chosen is None:
        raise RunError("nothing that was tried fits the budget", fix="Give more, or a smaller batch (--batch)")


def _refuse(options: dict[str, object], why: str) -> None:
    """Raises RunError for options that were given and mean nothing here."""
    if given := [name for name, value in options.items() if value]:
        raise RunError(why, where=" and ".join(given), fix="Leave that out")


def _fit_time(
    spec: "Spec",
    time: str | None,
    speedup: float | None,
    hold: float,
    keep_settings: bool,
    device: str | None,
    trust: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    from graphopt.cli.device import is_here
    from graphopt.cli.timing import measured_loader, rates_for
    from graphopt.compiler.emit import emit
    from graphopt.cost.rates import calibrated
    from graphopt.cost.roofline import PeakRates
    from graphopt.planning.speed import SpeedSearch
    from graphopt.spec import dumps
    from graphopt.units import parse_time

    if speedup is not None and not 1 < speedup < 1000:
        raise RunError(f"a speed-up is a factor above 1 and below 1000, found {speedup:g}", where="--speedup")
    try:
        limit = parse_time(time) if time is not None else None
    except ValueError as error:
        raise RunError(str(error), where="--time") from error
    here = device is None or is_here(device)
    card = None if here else gpu(str(device))

    def rates_of(plan: "Plan", train: "TrainSpec") -> "Rates | PeakRates":
        rates = rates_for(device or "cpu" if here else None, train, card)
        assert rates is not None
        if isinstance(rates, PeakRates):
            return rates
        whole, batch = plan.sizes.whole, train.micro_batch()
        return calibrated(rates, emit(whole), whole.input, batch, amp=train.amp, channels_last=train.channels_last)

    loader = measured_loader(spec) if here else None
    search = SpeedSearch(spec, rates_of, hold=hold, keep_settings=keep_settings, loader=loader, trust=trust)
    own = search.own.seconds
    assert own is not None
    found = search.suggest(limit if limit is not None else own / (speedup or 1))
    if out is not None and found.spec is not None:
        write_atomically(out, dumps(found.spec, defaults=False))
    if as_json:
        show_json(found.to_dict())
    else:
        name = search.rates.device
        loading = "without loading" if loader is None else "with loading its images"
        _show_speed(found, own, f"on {name}, {loading}" if here else f"at the peak rates of an NVIDIA {name}, {loading}")
        if out is not None and found.spec is not None:
            show(f"\nwritten: {out}")
    if found.chosen is None:
        raise RunError("nothing that was tried is quick enough", fix="Give more time, fewer epochs, or a smaller backbone")


def _show_speed(found: "SpeedPlan", own: float, where: str) -> None:
    from graphopt.units import show_time

    show(f"the run as it is: {show_time(own)} {where}; asked for: at most {show_time(found.limit)}")
    table = grid("", "changes", "run", "times as fast", "updates kept", "images kept", "pixels kept", right=(2, 3, 4, 5, 6))
    for trial in sorted(found.tried, key=lambda trial: trial.seconds or 0.0):
        if trial.seconds is not None and trial.refused is None:
            mark = ">" if trial is found.chosen else ""
            kept = (f"{100 * share:.0f} %" for share in (trial.updates, trial.images, trial.pixels))
            table.add_row(mark, trial.name, show_time(trial.seconds), f"{own / trial.seconds:.2f}", *kept)
    show(table)
    for trial in found.tried:
        if trial.refused is not None:
            show(f"left out {trial.title}: {trial.refused}")
    if found.base.settings:
        show(f"schedules and fewer epochs are with {found.base.name}")
    show("> chosen: the mildest settings if they are quick enough; else what takes least from training, with the quickest settings")
    if found.snippet:
        show(f"\nto paste into the spec:\n\n{found.snippet}")


def _limits(budget: "Budget") -> list[str]:
    from graphopt.units import show_size

    limits = [f"NVIDIA {budget.device.name}"] if budget.device is not None else []
    limits += [f"memory {show_size(budget.memory)}"] if budget.memory is not None else []
    limits += [f"FLOPs {budget.flops:g} of the backbone's"] if budget.flops is not None else []
    return limits + ([f"allowance {budget.allowance:g}"] if budget.allowance != 1 else [])


def _show_notes(found: "Fit") -> None:
    """What was left out, and what memory means."""
    for candidate in found.candidates:
        if candidate.refused:
            show(f"left out {candidate.name}: {candidate.refused}")
    if found.budget.device is not None:
        show("memory is simulated, with unmeasured terms at their upper bounds; what reserves more may fit, by giving free segments back")
    elif found.budget.memory is not None and found.budget.allowance == 1:
        show("memory is live bytes; a CPU process takes 1.09 to 1.35 times as much: see --allowance. For a GPU: --device")


def _show(found: "Fit", suggest: bool) -> None:
    from graphopt.planning.budget import peak
    from graphopt.units import show_count, show_size

    budget = found.budget
    if suggest and found.chosen is not None and not found.chosen.added:
        show("fits as it is: nothing needs to be added")
    show(f"budget: {', '.join(_limits(budget))}; batch {found.batch}")
    title = "peak" if budget.device is None else "peak reserved"
    table = grid("", "candidate", title, "FLOPs a step", "of the backbone's", "stays exact", "untrained", "", right=(2, 3, 4, 6))
    for candidate in sorted(found.candidates, key=lambda c: (not c.best, c.price)):
        if candidate.cost is None:
            continue
        mark = ">" if candidate is found.chosen else "*" if candidate.best else ""
        verdict = ("fits" if candidate.fits else "too much") + (", verified" if candidate.verified else "")
        ratio = f"{candidate.cost.flops / found.backbone.flops:.3f}"
        size, flops = show_size(peak(candidate.cost)), show_count(candidate.cost.flops)
        table.add_row(mark, candidate.name, size, flops, ratio, str(candidate.exact), f"{100 * candidate.untrained:.0f} %", verdict)
    show(table)
    _show_notes(found)
    if suggest:
        show("> chosen: the most of training stays exact, then the most trains, then the fewest FLOPs")
        show("* no other one that was tried is better in peak, FLOPs, what stays exact, and the share that trains")
        if found.snippet:
            show(f"\nto paste into the spec:\n\n{found.snippet}")
    elif found.chosen is not None:
        show(f"largest batch that fits: {found.batch}")
