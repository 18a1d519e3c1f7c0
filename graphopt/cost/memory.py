"""What a training step needs of a GPU, in figures: bounds of bytes, and the terms that they are made of."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from graphopt.cost.allocator import OutOfMemory
from graphopt.cost.devices import Device
from graphopt.cost.history import History, Usage, smallest_capacity, usage

Basis = Literal["exact", "table", "band"]


class Band(NamedTuple):
    """Two bounds in bytes; equal where the figure is known."""

    low: int
    high: int


@dataclass(frozen=True)
class Term:
    """What CUDA adds or does in another way: the most that it holds at once, and how that is known."""

    name: str
    basis: Basis
    bytes: Band
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"name": self.name, "basis": self.basis, "bytes": list(self.bytes), "why": self.why}


@dataclass(frozen=True)
class DeviceMemory:
    """What a step needs of a device.

    Attributes:
        terms: what CUDA adds, each with its bounds.
        least, most: allocations and releases of a few steps, with every term at its lower and at its upper bound.
    """

    device: Device
    terms: tuple[Term, ...]
    least: History = field(repr=False)
    most: History = field(repr=False)

    @cached_property
    def _usages(self) -> tuple[Usage, Usage]:
        least = usage(self.least)
        return least, least if self.least == self.most else usage(self.most)

    @property
    def allocated(self) -> Band:
        """Bytes: what `torch.cuda.max_memory_allocated` would show."""
        return _band(u.allocated for u in self._usages)

    @property
    def reserved(self) -> Band:
        """Bytes: what `torch.cuda.max_memory_reserved` would show, on a device where memory is not short."""
        return _band(u.reserved for u in self._usages)

    @cached_property
    def capacity(self) -> Band:
        """Bytes that the allocator must be able to get: see `smallest_capacity`."""
        least, most = self._usages
        low = smallest_capacity(self.least, reserved=least.reserved)
        return _band((low, low if self.least == self.most else smallest_capacity(self.most, reserved=most.reserved)))

    def fits(self, capacity: int | None = None) -> bool:
        """Whether the step runs, with every term at its upper bound, where so many bytes can be had; default: what the device can give."""
        capacity = self.device.usable if capacity is None else capacity
        if self.reserved.high <= capacity:
            return True
        try:
            usage(self.most, capacity)
        except OutOfMemory:
            return False
        return True

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. The two single figures are lower bounds: what is known to be needed."""
        bands = {f"{name}_band_bytes": list(getattr(self, name)) for name in ("allocated", "reserved", "capacity")}
        return {
            "peak_reserved_bytes": self.reserved.low,
            "capacity_bytes": self.capacity.low,
            "cuda": {"device": self.device.name, **bands, "fits": self.fits(), "terms": [term.to_dict() for term in self.terms]},
        }


def _band(figures: Iterable[int]) -> Band:
    found = sorted(figures)
    return Band(found[0], found[-1])
