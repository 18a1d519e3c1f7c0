"""What a compilation changed, in figures and per pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graphopt.compiler.pass_base import Diagnostic, PassInstance
from graphopt.compiler.verify import Checked
from graphopt.cost import Advice, Cost, advise, where_memory_is


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        instance: the pass. active: whether its trigger has fired.
        regions: names of the regions it changed. diagnostics: what it has to say. verified: the properties that were checked.
        before, after: costs of one training step around this pass (None when costs were not asked for).
        figures: figures of the pass's own.
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
        return {
            **self.instance.value.table(),
            "active": self.active,
            "regions": list(self.regions),
            "diagnostics": [{"severity": str(d.severity), "location": d.location, "message": d.message} for d in self.diagnostics],
            "verified": [{"property": c.property, "difference": c.difference} for c in self.verified],
            "before": self.before.to_dict() if self.before is not None else None,
            "after": self.after.to_dict() if self.after is not None else None,
            "advice": [{"where": a.where, "what": a.what, "worth": a.worth} for a in self.advice],
            "line": self.instance.line,
            "figures": dict(self.figures),
        }


@dataclass(frozen=True)
class Report:
    """A compiled plan in figures: the backbone before, the plan after, and each pass between.

    Attributes:
        batch: samples in the training step that the costs are of.
        opaque: modules the trace kept whole, as (path, reason). unused: parameters the backbone's forward never reads.
    """

    name: str
    digest: str
    batch: int
    before: Cost | None
    after: Cost | None
    passes: tuple[PassReport, ...]
    opaque: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def advice(self) -> tuple[Advice, ...]:
        """Where the memory of the compiled step is; none without costs."""
        return where_memory_is(self.after) if self.after is not None else ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: `name, digest, batch, before, after, passes` and what tracing has to tell."""
        return {
            "name": self.name,
            "digest": self.digest,
            "batch": self.batch,
            "before": self.before.to_dict() if self.before is not None else None,
            "after": self.after.to_dict() if self.after is not None else None,
            "passes": [p.to_dict() for p in self.passes],
            "advice": [{"where": a.where, "what": a.what, "worth": a.worth} for a in self.advice],
            "opaque": [{"path": path, "reason": reason} for path, reason in self.opaque],
            "unused_parameters": list(self.unused),
        }
