"""What `graphopt check --time` says: how long an epoch of each phase takes, and whether the step or the loader binds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from graphopt.cli.screen import grid, show

if TYPE_CHECKING:
    from graphopt.cost import Rates
    from graphopt.cost.devices import Device
    from graphopt.cost.roofline import PeakRates
    from graphopt.planning.loading import LoaderRate, PhaseTime
    from graphopt.planning.run_cost import RunCost
    from graphopt.spec import Spec, TrainSpec


def rates_for(here: str | None, train: "TrainSpec", card: "Device | None") -> "Rates | PeakRates | None":
    """Measured on the device `here` for such a run, or a GPU's peak rates. Raises RunError if no steps can be timed."""
    from graphopt.cost.rates import rates_of
    from graphopt.cost.roofline import PeakRates
    from graphopt.errors import RunError

    if here is None:
        return PeakRates(card) if card is not None else None
    try:
        return rates_of(here, train.amp, train.channels_last)
    except RunError as error:
        raise error.with_location("--device") from error.__cause__


def measured_loader(spec: "Spec") -> "LoaderRate | None":
    """Of the spec's own data; None if the images are not here."""
    from graphopt.errors import RunError
    from graphopt.planning.loading import loader_rate

    try:
        return loader_rate(spec)
    except RunError:
        return None


class RunTime:
    """A run's phases in seconds: what `check --time` shows of them."""

    def __init__(self, spec: "Spec", work: "RunCost", rates: "Rates | PeakRates") -> None:
        from graphopt.cost.roofline import PeakRates
        from graphopt.planning.loading import phase_times

        self.rates, self.measured = rates, not isinstance(rates, PeakRates)
        self.loader = measured_loader(spec)
        self.phases = phase_times(work, spec.train.batch, self.loader)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        loader = self.loader
        found = (
            None
            if loader is None
            else {"images_per_second": loader.images_per_second, "later_images_per_second": loader.kept, "workers": loader.workers}
        )
        about = {"device": self.rates.device, "measured": self.measured, "loader": found}
        return {**about, "phases": [phase.to_dict() for phase in self.phases]}

    def show(self) -> None:
        """Prints a row per phase."""
        loader = self.loader
        where = f"timed on {self.rates.device}" if self.measured else f"at the peak rates of an NVIDIA {self.rates.device}, not measured"
        speed = "not measured: the images are not here" if loader is None else f"{loader.images_per_second:.0f} images/s, measured here"
        processes = f" with {loader.workers} processes" if loader is not None and loader.workers else ""
        show(f"an epoch; steps {where}; loader {speed}{processes}")
        if loader is not None and loader.kept is not None:
            show(f"  that is the first epoch, which decodes; the images stay in memory: {loader.kept:.0f} images/s later, as in the table")
        _show_phases(self.phases, "" if self.measured else "at least ")
        if loader is None:
            show("  without loading data")


def _show_phases(phases: "Sequence[PhaseTime]", least: str) -> None:
    from graphopt.units import show_time

    table = grid("from epoch", "steps", "loading", "an epoch", "binds", right=(1, 2, 3))
    for phase in phases:
        loading = "?" if phase.loading is None else show_time(phase.loading)
        times = (least + show_time(phase.step), loading, least + show_time(phase.length))
        table.add_row(f"{phase.epoch:.4g}", *times, phase.binds or "?")
    show(table)
