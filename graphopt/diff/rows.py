"""The one data structure behind every picture: rows (blocks), their nodes, what connects them, and what a training step costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.diff.status import ranked

#: figures a row can have; all are of one training step
FIGURES = ("parameters", "trainable_parameters", "forward_flops", "backward_flops", "saved_activation_bytes")


@dataclass(frozen=True)
class NodeRow:
    """One operation.

    Attributes:
        name: unique in its graph, equal in all phases. what: the module's class or the function's name.
        path, call: its origin. shape: of its output; "N" is the batch. None where it is no tensor.
        inputs: names of the nodes it reads.
    """

    name: str
    op: str
    what: str
    path: str
    call: int
    shape: tuple[str | int, ...] | None
    inputs: tuple[str, ...]
    statuses: tuple[str, ...] = ("kept",)
    by: str | None = None
    parameters: int = 0


@dataclass(frozen=True)
class Row:
    """One block, or what lies before, between and behind blocks; or what a pass inserted.

    Attributes:
        name: unique: "layer3.2", "stem", "head". paths: the module paths it is made of.
        kind: class name. stage: what it is grouped under.
        statuses: by weight; the first is the main one. was: those of the same row on the other side.
        passes: numbers (from 0) of the passes that touched it. reasons: what they had to say of it.
        sources: rows whose parameters it draws on. detail: short facts ("a": 0.5).
        band: name of the local module (stretch with a backward of its own) it is in. beside: of an inserted row, the row it hangs at.
        backward: whether the backward of a training step goes through it.
        entering, leaving: shapes of its activations.
        before, after: figures of one training step; None where they are not known.
    """

    name: str
    paths: tuple[str, ...]
    kind: str
    stage: str
    statuses: tuple[str, ...] = ("kept",)
    was: tuple[str, ...] = ("kept",)
    passes: tuple[int, ...] = ()
    reasons: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)
    band: str | None = None
    beside: str | None = None
    backward: bool = True
    entering: tuple[str | int, ...] | None = None
    leaving: tuple[str | int, ...] | None = None
    before: Mapping[str, int] | None = None
    after: Mapping[str, int] | None = None
    nodes: tuple[NodeRow, ...] = ()

    @property
    def status(self) -> str:
        return ranked(self.statuses)[0]

    @property
    def changed(self) -> bool:
        return self.statuses != self.was

    def alike(self) -> tuple[Any, ...]:
        """What two neighbours must have in common to be shown as one. Costs and parameter names are summed, not compared."""
        # Operations without parameters may differ where nothing happened to them: Swin shifts the windows of every other block.
        inside = tuple((n.op, n.what, n.statuses, n.parameters) for n in self.nodes if n.parameters or n.statuses != ("kept",))
        sizes = (self.before or {}).get("parameters"), (self.after or {}).get("parameters")
        reasons = len(self.reasons) and tuple(r.replace(self.name, "*") for r in self.reasons)
        said = (self.statuses, self.was, self.passes, reasons, self.sources, tuple(self.detail.items()), self.band, self.beside)
        return (self.kind, self.stage, said, self.backward, self.leaving, sizes, inside)


@dataclass(frozen=True)
class PassLine:
    """One pass as it stood in the spec: its number, name, line and table, and whether it has fired."""

    index: int
    use: str
    line: int | None
    text: str
    active: bool
    regions: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.use} (pass {self.index + 1}{f', line {self.line}' if self.line else ''})"


@dataclass(frozen=True)
class Band:
    """A stretch that the backward treats as one: a local module with a loss of its own, or a stretch that runs without recording.

    Attributes:
        local: whether it has a loss and a backward of its own.
    """

    name: str
    by: str
    rows: tuple[str, ...]
    local: bool


@dataclass(frozen=True)
class Side:
    """One of the two things compared: a backbone, or a plan in one of its phases.

    Attributes:
        title: for people. spec: the file it came from, if any. totals: figures of one training step.
        edges: (from, to) pairs of row names over which activations flow. frontier: those at which the backward stops.
        tap: the row behind which training runs on kept features.
    """

    title: str
    backbone: str
    digest: str
    batch: int
    spec: str | None
    rows: tuple[Row, ...]
    edges: tuple[tuple[str, str], ...]
    frontier: tuple[tuple[str, str], ...]
    bands: tuple[Band, ...]
    passes: tuple[PassLine, ...]
    totals: Mapping[str, int] | None
    tap: str | None = None
    epoch: int | None = None

    def __getitem__(self, name: str) -> Row:
        return next(r for r in self.rows if r.name == name)


def plain(value: Any) -> Any:
    """JSON-ready values, in a fixed order."""
    if isinstance(value, (Row, NodeRow, PassLine, Band)):
        return {k: plain(v) for k, v in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return round(value, 6)
    return value if isinstance(value, (str, int, bool)) or value is None else str(value)
