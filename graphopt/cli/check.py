"""`graphopt check`: the dry run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.device import gpu, is_here, show_neediest, show_phases
from graphopt.cli.options import DataOption, JsonOption, SetOption, SpecArgument, TrustOption, check_choice, data_overrides, titled
from graphopt.cli.progress import Doing
from graphopt.cli.ranks import parse_link, show_chain, show_ranks
from graphopt.cli.screen import grid, show, show_error, show_json
from graphopt.cli.timing import RunTime, rates_for

if TYPE_CHECKING:
    from graphopt.compiler.pipeline import Matched
    from graphopt.compiler.plan import Phase, Plan
    from graphopt.compiler.triggers import Decision
    from graphopt.cost import Rates
    from graphopt.cost.devices import Device
    from graphopt.cost.roofline import PeakRates
    from graphopt.planning.device import PhaseMemory
    from graphopt.planning.modules import ChainCost
    from graphopt.planning.ranks import RanksCost
    from graphopt.planning.run_cost import DropPoint, RunCost
    from graphopt.spec import Spec


#: names of devices that steps can be timed on, as torch has them
_DEVICE = "The GPU whose memory is forecast (default: A100), with --time its least time, too; or where steps are timed: cpu, cuda."
_TIME = "Forecast how long the run takes, from a few seconds of steps timed here, and whether the step or the image loader binds."


def check(
    spec: SpecArgument,
    time: Annotated[bool, typer.Option("--time", help=_TIME)] = False,
    device: Annotated[str | None, typer.Option("--device", help=_DEVICE)] = None,
    ranks: Annotated[int | None, typer.Option("--ranks", min=1, help="Also forecast what each of so many processes needs.")] = None,
    strategy: Annotated[str, typer.Option("--strategy", help="Of --ranks: single, ddp, fsdp, modules, auto (default: the spec's).")] = "",
    link: Annotated[str | None, typer.Option("--link", help='Rate between ranks, for seconds: "10 GB/s", "100 Gbit/s".')] = None,
    data: DataOption = None,
    set_: SetOption = [],  # noqa: B006  # never changed
    trust: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what each pass of SPEC would act on, what it would skip and why, and what the run would compute. Changes nothing.

    SPEC may be the folder of a finished run: its decisions are then taken from it. Otherwise triggers that wait for measurements
    are left out.

    Examples:

        graphopt check quickstart

        graphopt check learn_and_drop/vgg11 --time

        graphopt check learn_and_drop/vgg11 --device "RTX 4090" --time --json

        graphopt check quickstart --ranks 8 --strategy ddp --link "10 GB/s"
    """
    from graphopt.spec import load

    rate = parse_link(link)
    here_named = device is not None and is_here(device)
    if strategy:
        check_choice("--strategy", strategy, ("auto", "single", "ddp", "fsdp", "modules"))
    loaded = load(spec, trust=trust, overrides=[*data_overrides(data, spec, trust=trust), *set_])
    strategy = strategy or loaded.train.strategy
    if ranks and strategy != "modules":
        loaded.train.micro_batch(ranks)  # refuses a batch that does not divide before any work

    from graphopt.compiler.plan import compile_phase
    from graphopt.driver import check_folders, prepare
    from graphopt.ir.collector import uncollected
    from graphopt.planning.run_cost import drop_points
    from graphopt.train.preflight import problems

    named = gpu(device) if device is not None and not here_named else None
    here = device if here_named else "cpu" if time and named is None else None
    _check_before_timing(loaded)
    with Doing() as doing, uncollected():
        doing("timing steps")
        rates = rates_for(here, loaded.train, named if time else None)
        doing("building and tracing the backbone")
        source = prepare(None, loaded, compare=loaded.verify != "off", trust=trust)
        check_folders(source, trust=trust)
        plan = compile_phase(source, verify="fast", costs=False, weights=False)
        count = len({0, *(decision.epoch for decision in plan.foreseen(loaded.train.epochs))})
        phases = tuple(doing.each("compiling phase", plan.each_phase(loaded.train.epochs, verify="fast"), count))
        doing("opening the data, trying the optimizer")
        refused = tuple(problems(plan, loaded.train, loaded.data, trust=trust))
        rows = [_row(item) for item in source.matched]
        caches = any(item.match.feature_options is not None for item in source.matched)
        points = drop_points(source.base) if caches else ()
        samples, work = _forecast(loaded, phases, Path(spec), rates, doing)
        timed = RunTime(loaded, work, rates) if work is not None and rates is not None else None
        needs = _forecast_memory(loaded, phases, work, Path(spec), named, doing)
        parallel: ChainCost | RanksCost | None = None
        doing("forecasting what each rank needs")
        if ranks and strategy == "modules":
            parallel = _forecast_chain(loaded, plan, Path(spec), ranks, rates)
        elif ranks:
            parallel = _forecast_ranks(loaded, plan, Path(spec), ranks, strategy)
    if as_json:
        opaque = [{"path": path, "reason": reason} for path, reason in source.base.opaque]
        run = {"drop_points": [_point(p, samples) for p in points], **(work.to_dict() if work else {})}
        run |= {"run_time": timed.to_dict()} if timed else {}
        run |= {"ranks": parallel.to_dict(rate)} if parallel else {}
        run |= {"device_memory": [phase.to_dict() for phase in needs]} if needs else {}
        head = {"name": loaded.name, "digest": loaded.digest, "refused": list(map(str, refused))}
        show_json({**head, "passes": rows, "opaque": opaque, **run})
    else:
        _show_passes(titled(loaded, spec), rows)
        _show_points(samples, points)
        published = any((error.where or "").startswith("data") for error in refused)
        _show_run(work, published, "time, a forecast" if timed is None or timed.measured else "least time, at peak rates")
        if timed:
            timed.show()
        _show_memory(needs, named, len(phases))
        _show_parallel(parallel, rate, (samples or 0) // loaded.train.batch)
    for error in refused[:-1]:
        show_error(str(error))
    if refused:
        raise refused[-1]


def _check_before_timing(spec: "Spec") -> None:
    """Raises RunError for settings that a chain of modules refuses, whose passes need timed steps: minutes, in float16 on a CPU."""
    from graphopt.train.modules import Modular

    if spec.train.strategy == "modules" and not spec.settled:
        Modular.of(spec.train)


def _forecast(
    spec: "Spec", phases: "tuple[Phase, ...]", path: Path, rates: "Rates | PeakRates | None", doing: Doing
) -> "tuple[int | None, RunCost | None]":
    """Images per epoch, and the cost of the run; None for what cannot be known here: the rest of the dry run is of use without."""
    from graphopt.errors import CostError, RunError
    from graphopt.planning.run_cost import counts, forecast_run

    decisions = _decisions(path)
    # A finished run has phases of its own; of any other, those that were compiled already are forecast.
    given: dict[str, Any] = {"decisions": decisions} if decisions is not None else {}
    given = given or {"phases": doing.each("forecasting a step of phase", phases, len(phases))}
    try:
        samples, evaluated = counts(spec.data)
        return samples, forecast_run(phases[0].plan, spec.train, samples=samples, evaluated=evaluated, rates=rates, **given)
    except (RunError, CostError):
        return None, None


def _forecast_memory(
    spec: "Spec", phases: "tuple[Phase, ...]", work: "RunCost | None", path: Path, named: "Device | None", doing: Doing
) -> "tuple[PhaseMemory, ...]":
    """What each phase needs of the GPU that is named; of any other, one phase (`forecast_neediest`). Nothing without a forecast."""
    from graphopt.errors import CostError
    from graphopt.planning.device import forecast_neediest, forecast_phases, neediest

    decisions = _decisions(path)
    try:
        known = phases if decisions is None else phases[0].plan.phases(spec.train.epochs, decisions)
        if named is None and work is not None:
            doing("forecasting a GPU's memory")
            return (forecast_neediest(known, [phase.step.peak_bytes for phase in work.phases], gpu("A100")),)
        found = forecast_phases(doing.each("forecasting a GPU's memory in phase", known, len(known)), named or gpu("A100"))
    except CostError:
        return ()
    return found if named else (neediest(found),)


def _forecast_ranks(spec: "Spec", plan: "Plan", path: Path, ranks: int, strategy: str) -> "RanksCost":
    from graphopt.errors import RunError
    from graphopt.planning.ranks import forecast_ranks
    from graphopt.planning.run_cost import counts

    chosen: Any = strategy
    try:
        samples: int | None = counts(spec.data)[0]
    except RunError:  # the files are not here
        samples = None
    return forecast_ranks(plan, spec.train, ranks=ranks, strategy=chosen, decisions=_decisions(path), samples=samples)


def _forecast_chain(spec: "Spec", plan: "Plan", path: Path, ranks: int, rates: "Rates | PeakRates | None") -> "ChainCost":
    from graphopt.cost.rates import Rates, rates_of
    from graphopt.planning.modules import forecast_chain

    known = rates if isinstance(rates, Rates) else rates_of(spec.train.device, spec.train.amp, spec.train.channels_last)
    return forecast_chain(plan, spec.train, ranks=ranks, rates=known, decisions=_decisions(path))


def _show_memory(needs: "tuple[PhaseMemory, ...]", named: "Device | None", phases: int) -> None:
    if named and needs:
        show_phases(needs)
    elif needs:
        show_neediest(needs[0], phases)


def _show_parallel(cost: "ChainCost | RanksCost | None", rate: int | None, steps: int) -> None:
    from graphopt.planning.ranks import RanksCost

    if isinstance(cost, RanksCost):
        show_ranks(cost, rate)
    elif cost is not None:
        show_chain(cost, rate, steps)


def _decisions(path: Path) -> "tuple[Decision, ...] | None":
    """Those of the finished run in this folder; None if it is none."""
    from graphopt.diff.render.run import read_run

    return tuple(read_run(path).decisions) if (path / "summary.json").is_file() else None


def _point(point: "DropPoint", samples: int | None) -> dict[str, Any]:
    sizes = {dtype: point.bytes_per_sample // share * (samples or 1) for dtype, share in (("float32", 1), ("float16", 2), ("bfloat16", 2))}
    return {"upto": point.name, "shape": list(point.shape), "bytes_per_sample": point.bytes_per_sample, "bytes": sizes}


def _row(item: "Matched") -> dict[str, Any]:
    value, match = item.instance.value, item.match
    diagnostics = [{"severity": str(d.severity), "location": d.location, "message": d.message} for d in match.diagnostics]
    head = {**value.table(), "line": item.instance.line, "regions": list(match.names)}
    return {**head, "diagnostics": diagnostics, "preserves": sorted(value.preserved_properties())}


def _show_passes(spec: "Spec", rows: list[dict[str, Any]]) -> None:
    from graphopt.cli.report import some

    show(f"{spec.name}  ({spec.backbone.source}/{spec.backbone.name}, digest {spec.digest})")
    for number, row in enumerate(rows, start=1):
        show(f"pass {number} {row['use']}" + (f", line {row['line']}" if row["line"] else ""))
        show(f"  would act on: {some(row['regions']) or 'nothing'}")
        for d in row["diagnostics"]:
            show(f"  {d['severity']} {d['location']}: {d['message']}")
        if row["preserves"]:
            show(f"  preserves: {', '.join(row['preserves'])}")
    show("no conflicts between passes" if rows else "no passes: the backbone trains as it is")


def _show_points(samples: int | None, points: "tuple[DropPoint, ...]") -> None:
    from graphopt.units import show_size

    table = grid("drop after", "features", "a sample, float32", "all in float32", "in 16 bits", right=(2, 3, 4))
    for point in points:
        size = point.bytes_per_sample
        all_of = (show_size(size * samples), show_size(size * samples // 2)) if samples else ("?", "?")
        table.add_row(point.name, "x".join(map(str, point.shape)), show_size(size), *all_of)
    if points:
        show(f"features that a drop would cache for {samples or 'an unknown number of'} samples, of one view and without crops")
        show(table)


def _show_run(work: "RunCost | None", published: bool, time: str) -> None:
    """`published`: the data could not be opened, so that the number of its images is the one its authors give. `time` names the seconds."""
    from graphopt.units import show_size, show_time

    if work is None:
        show("no costs of the run: its images cannot be counted here, or its step cannot be forecast")
        return
    before, run = work.before, work.run
    saved = f"{_less(work.forward_saved)}, averaged over the run; {_less(work.final_forward_saved)} in a step at its end"
    images = f"{work.samples:,} images{', as published' if published else ''}"
    show(f"run of {work.epochs} epochs of {images}:")
    if run == before:  # nothing to compare
        show(f"  forward {_flops(run.forward_flops)}, {_flops(run.evaluation_forward_flops)} of it in evaluation")
        show(f"  backward {_flops(run.backward_flops)}")
        show(f"  peak {show_size(run.peak_bytes)}")
    else:
        show(f"  forward {_flops(before.forward_flops)} -> {_flops(run.forward_flops)} ({saved})")
        show(f"  evaluation {_flops(run.evaluation_forward_flops)} and filling {_flops(run.filling_forward_flops)} of these")
        show(f"  backward {_flops(before.backward_flops)} -> {_flops(run.backward_flops)}")
        show(f"  peak {show_size(before.peak_bytes)} -> {show_size(run.peak_bytes)}, in the largest phase")
    if run.feature_bytes:
        show(f"  features {show_size(run.feature_bytes)} ({run.feature_bytes:,} bytes), in the phase that caches most")
    if run.seconds is not None and before.seconds is not None:
        more = f" -> {show_time(run.seconds)} ({run.seconds / before.seconds:.2f} of it; without loading data)"
        show(f"  {time}: {show_time(before.seconds)}{more if run != before else ' (without loading data)'}")
    if not work.complete:
        show("  a trigger waits for measurements and is left out; after training, check the run's folder")


def _flops(count: int) -> str:
    from graphopt.units import show_count

    text = show_count(count)
    return f"{text}FLOP" if text[-1].isalpha() else f"{text} FLOP"


def _less(share: float) -> str:
    return f"{abs(100 * share):.2f} % {'fewer' if share >= 0 else 'more'}"
