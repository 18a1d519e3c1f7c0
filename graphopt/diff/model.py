"""The data behind every rendering: rows (blocks), their operations, what connects them, and what a training step costs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from graphopt.compiler.pass_base import Status

Shape = tuple[str | int, ...]
#: of a field that is for comparing, and not written out
INNER = {"inner": True}

#: statuses that no pass gives: as in the backbone, and what the comparison of two backbones adds
UNCHANGED, REMOVED, ADDED, DIFFERS = "unchanged", "removed", "added", "differs"


class StatusStyle(NamedTuple):
    """How a status is shown everywhere. No two share a glyph, so that colour is never the only sign.

    Attributes:
        glyph: one cell wide. ascii: the same for terminals without Unicode.
        light, dark: colours on a light and a dark ground, after Okabe and Ito (2008): told apart whatever the colour vision.
        terminal: rich's colour.
        meaning: for legends.
    """

    glyph: str
    ascii: str
    light: str
    dark: str
    terminal: str
    meaning: str


#: most important first: where several hold for one row, the first is its main one
STYLES: dict[str, StatusStyle] = {
    REMOVED: StatusStyle("−", "-", "#b04000", "#ff8f4d", "red", "only in the first of the two"),
    ADDED: StatusStyle("⊕", "&", "#0b7fb5", "#7cc8f2", "bright_cyan", "only in the second of the two"),
    DIFFERS: StatusStyle("≠", "!", "#a8467f", "#e79bc6", "magenta", "in both of the two, but not the same"),
    Status.DROPPED: StatusStyle("✂", "x", "#c04a00", "#f58a4b", "red", "left the training graph; its output is cached"),
    Status.BYPASSED: StatusStyle("↷", ">", "#a86b00", "#f0b43c", "yellow", "replaced by its shortcut"),
    Status.INSERTED: StatusStyle("+", "+", "#1276a8", "#7cc8f2", "bright_cyan", "added by a pass; not in the exported backbone"),
    Status.SHARED: StatusStyle("⇄", "=", "#00795a", "#35c79b", "green", "its weights are computed from its neighbours'"),
    Status.FROZEN: StatusStyle("❄", "*", "#0072b2", "#5cb3ea", "blue", "its parameters do not train"),
    Status.ISOLATED: StatusStyle("⊣", "|", "#a8467f", "#e79bc6", "magenta", "trains by its module's local loss: no gradient from behind"),
    Status.CHECKPOINTED: StatusStyle("↻", "@", "#857500", "#e8dc4c", "bright_yellow", "recomputed in the backward pass instead of saved"),
    Status.REWIRED: StatusStyle("~", "~", "#5b5f66", "#b4b9c2", "bright_black", "computes the same with other operators"),
    UNCHANGED: StatusStyle("○", "o", "#7a7f87", "#8d939c", "bright_black", "as in the backbone"),
}

_RANK = {name: rank for rank, name in enumerate(STYLES)}


def ranked(statuses: Iterable[str]) -> tuple[str, ...]:
    """Statuses, most important first; `("unchanged",)` where there are none."""
    return tuple(sorted({str(s) for s in statuses} - {UNCHANGED}, key=_RANK.__getitem__)) or (UNCHANGED,)


@dataclass(frozen=True)
class NodeRow:
    """One operation.

    Attributes:
        name: unique in its graph, equal in all phases. what: the module's class or the function's name. path, call: its origin.
        shape: of its output; "N" is the batch. changed_by: number (from 0) of the last pass that inserted or changed it.
        settings: of a module, what its class prints of itself; of a call, its plain arguments.
    """

    name: str
    op: str
    what: str
    path: str
    call: int
    shape: Shape | None
    inputs: tuple[str, ...]
    statuses: tuple[str, ...] = (UNCHANGED,)
    changed_by: int | None = None
    parameters: int = 0
    settings: str = field(default="", metadata=INNER)


@dataclass(frozen=True)
class RowLocation:
    """Where a row lies: its name ("layer3.2", "stem"), module paths (none inside another), class, and what it is grouped under."""

    name: str
    paths: tuple[str, ...]
    kind: str
    stage: str


@dataclass(frozen=True)
class Row(RowLocation):
    """One block, or what lies before, between and after blocks; or a module that a pass inserted.

    Attributes:
        statuses: most important first. was: those of the same row in the other view.
        passes: numbers (from 0) of the passes that changed it. messages: their diagnostics about it.
        sources: rows whose parameters it uses. detail: short facts ("a": 0.5).
        section: name of the local module (a part with a loss of its own) it is in. attached_to: of an inserted row, the row it reads.
        backward: whether the backward pass of a training step goes through it. before, after: figures of one training step.
        structure: digest of the backbone's own operators in it with sizes and settings, operators: without them; "" where it has none.
        former: of two backbones, the name of the matching row in the first, where it is another.
    """

    statuses: tuple[str, ...] = (UNCHANGED,)
    was: tuple[str, ...] = (UNCHANGED,)
    passes: tuple[int, ...] = ()
    messages: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)
    section: str | None = None
    attached_to: str | None = None
    backward: bool = True
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    before: Mapping[str, int] | None = None
    after: Mapping[str, int] | None = None
    nodes: tuple[NodeRow, ...] = ()
    structure: str = field(default="", metadata=INNER)
    operators: str = field(default="", metadata=INNER)
    former: str | None = None

    @property
    def status(self) -> str:
        """The main status."""
        return self.statuses[0]

    @property
    def changed(self) -> bool:
        """Whether the row has other statuses than in the other view."""
        return self.statuses != self.was

    @property
    def plain(self) -> bool:
        """Whether there is nothing to report: as in the backbone, in both views."""
        return self.statuses == (UNCHANGED,) and not self.changed

    def group_key(self) -> tuple[Any, ...]:
        """What two neighbours must have in common to be shown as one. Costs and parameter names are summed, not compared."""
        # Operations without parameters may differ where nothing happened to them: Swin shifts the windows of every other block.
        inside = tuple((n.op, n.what, n.statuses, n.parameters) for n in self.nodes if n.parameters or n.statuses != (UNCHANGED,))
        sizes = (self.before or {}).get("parameters"), (self.after or {}).get("parameters")
        messages = tuple(m.replace(self.name, "*") for m in self.messages)
        facts = (self.statuses, self.was, self.passes, messages, self.sources, tuple(self.detail.items()), self.section, self.attached_to)
        return (self.kind, self.stage, facts, self.backward, self.output_shape, sizes, inside)


@dataclass(frozen=True)
class PassInfo:
    """One pass as it stands in the spec: its number (from 0), name, line and table, and whether it has fired."""

    index: int
    name: str
    line: int | None
    text: str
    active: bool
    regions: tuple[str, ...]
    diagnostics: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """`freeze (pass 1, line 7)`."""
        return f"{self.name} (pass {self.index + 1}{f', line {self.line}' if self.line else ''})"


@dataclass(frozen=True)
class SectionBox:
    """Rows that run as one unit; `local`: with a loss and a backward pass of its own. `rank`: of a chain, the one that trains it."""

    name: str
    rows: tuple[str, ...]
    local: bool
    rank: int | None = None


@dataclass(frozen=True)
class ModelView:
    """One of the two models that are compared: a backbone, or a plan in one of its phases.

    Attributes:
        totals: figures of one training step.
        edges: (from, to) pairs of row names over which activations flow. gradient_stops: those over which no gradient comes back.
        feature_input: the row whose cached output is the input of training.
    """

    title: str
    backbone: str
    digest: str
    batch: int
    spec: str | None
    rows: tuple[Row, ...]
    edges: tuple[tuple[str, str], ...]
    gradient_stops: tuple[tuple[str, str], ...]
    sections: tuple[SectionBox, ...]
    passes: tuple[PassInfo, ...]
    totals: Mapping[str, int] | None
    feature_input: str | None = None
    epoch: float | None = None

    def __getitem__(self, name: str) -> Row:
        return next(r for r in self.rows if r.name == name)


def as_json(value: Any) -> Any:
    """JSON-ready values, in a fixed order."""
    if isinstance(value, (Row, NodeRow, PassInfo, SectionBox)):
        return {f.name: as_json(getattr(value, f.name)) for f in fields(value) if f.metadata != INNER}
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    if isinstance(value, float):
        return round(value, 6)
    return value if isinstance(value, (str, int, bool)) or value is None else str(value)
