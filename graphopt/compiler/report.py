"""The report of a compilation: its figures, whole and per pass."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.compiler.pass_base import Diagnostic, PassInstance
from graphopt.compiler.verify import Checked
from graphopt.cost import Advice, Cost, advise, where_memory_is
from graphopt.ir.graph import Opaque


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        active: whether its trigger has fired. regions: names of the regions it changed. verified: the properties that were checked.
        before, after: costs of one training step around this pass; None if costs were not asked for. figures: of the pass's own.
    """

    instance: PassInstance
    active: bool
    regions: tuple[str, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()
    verified: tuple[Checked, ...] = ()
    before: Cost | None = None
    after: Cost | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def advice(self) -> tuple[Advice, ...]:
        """Warnings about wasted memory or compute, from the costs around this pass; none without costs."""
        return advise(self.before, self.after) if self.before is not None and self.after is not None else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **self.instance.value.table(),
            "active": self.active,
            "regions": list(self.regions),
            "diagnostics": [{"severity": str(d.severity), "location": d.location, "message": d.message} for d in self.diagnostics],
            "verified": [asdict(c) for c in self.verified],
            **_costs(self.before, self.after, self.advice),
            "line": self.instance.line,
            "figures": dict(self.figures),
        }


@dataclass(frozen=True)
class Report:
    """A compiled plan in figures: the backbone before, the plan after, and each pass between.

    Attributes:
        batch: samples in the training step that the costs are of.
        opaque: modules that were not traced into, as (path, reason). unused: parameters that the backbone's step gives no gradient.
        no_costs: why there are none, although they were asked for.
    """

    name: str
    digest: str
    batch: int
    before: Cost | None
    after: Cost | None
    passes: tuple[PassReport, ...]
    opaque: tuple[Opaque, ...] = ()
    unused: tuple[str, ...] = ()
    no_costs: str | None = None

    @property
    def advice(self) -> tuple[Advice, ...]:
        """Which part holds most of the compiled step's memory; none without costs."""
        return where_memory_is(self.after) if self.after is not None else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "digest": self.digest,
            "batch": self.batch,
            **_costs(self.before, self.after, self.advice),
            "passes": [p.to_dict() for p in self.passes],
            "opaque": [o._asdict() for o in self.opaque],
            "unused_parameters": list(self.unused),
            "no_costs": self.no_costs,
        }


def _costs(before: Cost | None, after: Cost | None, advice: tuple[Advice, ...]) -> dict[str, Any]:
    figures = {"before": before and before.to_dict(), "after": after and after.to_dict()}
    return {**figures, "advice": [asdict(a) for a in advice]}
