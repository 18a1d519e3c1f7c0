"""What the commands show of a GPU's memory."""

from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.screen import grid, show

if TYPE_CHECKING:
    from rich.table import Table

    from graphopt.cost.devices import Device
    from graphopt.cost.memory import Band, DeviceMemory
    from graphopt.planning.device import PhaseMemory

_HELP = "The GPU whose memory is forecast: A100, H100, H200, RTX 4090 or L4; none is needed. Default: A100."
DeviceOption = Annotated[str, typer.Option("--device", help=_HELP)]


#: kinds of devices that this machine may have, as torch names them
_KINDS = ("cpu", "cuda", "mps", "xpu")


def is_here(name: str) -> bool:
    """Whether a device is one of this machine's, as torch names it, and no GPU of the table."""
    return name.partition(":")[0] in _KINDS


def gpu(name: str) -> "Device":
    """The device of that name. Raises CostError, with the option's name, if the table has none."""
    from graphopt.cost.devices import find_device
    from graphopt.errors import CostError

    try:
        return find_device(name)
    except CostError as error:
        raise error.with_location("--device") from None


def band(value: "Band") -> str:
    """`8.13 MiB`, or `8.13 to 16.3 MiB` where the bounds differ."""
    from graphopt.units import show_size

    low, high = map(show_size, value)
    if low == high:
        return low
    return f"{low.removesuffix(high[-4:])} to {high}" if low[-4:] == high[-4:] else f"{low} to {high}"


def show_memory(before: "DeviceMemory", after: "DeviceMemory") -> None:
    """Prints what a step needs of a GPU, before and after, and the terms of the latter."""
    table = grid(f"on an NVIDIA {after.device.name}", "before", "after", right=(1, 2))
    for title, name in (("peak allocated", "allocated"), ("peak reserved", "reserved"), ("smallest capacity", "capacity")):
        table.add_row(title, band(getattr(before, name)), band(getattr(after, name)))
    table.add_row(_fits(after), *(_yes(memory.fits()) for memory in (before, after)))
    show(table)
    _show_terms(after)


def show_phases(phases: "tuple[PhaseMemory, ...]") -> None:
    """Prints what a step of each phase needs of a GPU, and the terms of the phase that needs most."""
    table = grid("from epoch", "peak allocated", "peak reserved", "smallest capacity", _fits(phases[0].memory), right=(1, 2, 3))
    for phase in phases:
        memory = phase.memory
        table.add_row(f"{phase.epoch:.4g}", *map(band, (memory.allocated, memory.reserved, memory.capacity)), _yes(memory.fits()))
    from graphopt.planning.device import neediest

    _show_simulated(table, neediest(phases).memory)


def show_neediest(phase: "PhaseMemory", count: int) -> None:
    """Prints what one phase of so many needs of a GPU (`forecast_neediest`). Without the smallest capacity, which takes longest to find."""
    memory = phase.memory
    table = grid("from epoch", "peak allocated", "peak reserved", _fits(memory), right=(1, 2))
    table.add_row(f"{phase.epoch:.4g}", *map(band, (memory.allocated, memory.reserved)), _yes(memory.fits()))
    _show_simulated(table, memory)
    each = "each phase" if count > 1 else "the step"
    show(f'  --device "{memory.device.name}" shows the smallest capacity at which {each} still runs')


def _show_simulated(table: "Table", most: "DeviceMemory") -> None:
    show(f"memory of a step on an NVIDIA {most.device.name}, simulated; no GPU was used")
    show(table)
    _show_terms(most)


def _fits(memory: "DeviceMemory") -> str:
    return f"fits into {_usable(memory)}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _usable(memory: "DeviceMemory") -> str:
    from graphopt.units import show_size

    return show_size(memory.device.usable)


def _show_terms(memory: "DeviceMemory") -> None:
    show("  what CUDA adds, the most at once; exact: by torch's own code, table: a published constant, band: between bounds, not measured")
    for term in memory.terms:
        show(f"  {term.basis:5}  {term.name}: {band(term.bytes)} ({term.why})")
