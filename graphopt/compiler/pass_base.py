"""What a pass is: a frozen typed value that matches regions of a graph and rewrites them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeAlias, TypeVar, get_args

import pydantic
from pydantic import ConfigDict

from graphopt.compiler.triggers import LearningRate, Start, Trigger

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from graphopt.cost.rates import TimedStep
    from graphopt.ir.editor import Editor
    from graphopt.ir.graph import Graph
    from graphopt.ir.inputs import Input
    from graphopt.ir.regions import Region
    from graphopt.ir.shifts import Croppable

#: the properties that a pass can declare and the compiler can check
Property = Literal["eval output", "training output", "state-dict keys", "gradients of unselected parameters"]
ALL_PROPERTIES: frozenset[Property] = frozenset(get_args(Property))

StateMap: TypeAlias = "Callable[[dict[str, Tensor]], dict[str, Tensor]]"
Decided = TypeVar("Decided")


class Severity(StrEnum):
    """How much a diagnostic matters: a note, something left alone, a warning, or a reason not to compile."""

    NOTE = "note"
    SKIPPED = "skipped"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Diagnostic:
    """A message, in one sentence without a full stop, about a region or an option (`location`), and what the user can do about it."""

    severity: Severity
    location: str
    message: str
    fix: str | None = None

    def __str__(self) -> str:
        text = f"{self.severity} {self.location}: {self.message}"
        return f"{text}. {self.fix}" if self.fix else text


class Diagnostics:
    """Collects diagnostics; the base of what `match` and `rewrite` return."""

    diagnostics: list[Diagnostic]

    def note(self, location: str, message: str) -> None:
        """Something worth knowing."""
        self.diagnostics.append(Diagnostic(Severity.NOTE, location, message))

    def skip(self, location: str, message: str) -> None:
        """A region that is left alone, and why."""
        self.diagnostics.append(Diagnostic(Severity.SKIPPED, location, message))

    def warn(self, location: str, message: str) -> None:
        """Something that costs memory, compute or accuracy."""
        self.diagnostics.append(Diagnostic(Severity.WARNING, location, message))

    def refuse(self, location: str, message: str, fix: str | None = None) -> None:
        """A reason not to compile; the first one becomes the error that the user sees."""
        self.diagnostics.append(Diagnostic(Severity.ERROR, location, message, fix))


@dataclass
class Match(Diagnostics, Generic[Decided]):
    """What a pass will do, decided once, on the untouched graph.

    Attributes:
        regions: what it acts on, in execution order.
        decision: whatever else it decided (where to cut, whose weights to mix), in names: it is used on clones of the graph.
        feature_options: options for caching features, where the pass may ask for that (see `FeatureCut`).
    """

    regions: tuple[Region, ...]
    decision: Decided | None = None
    feature_options: Mapping[str, Any] | None = None
    diagnostics: list[Diagnostic] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the regions."""
        return tuple(r.name for r in self.regions)


@dataclass(frozen=True)
class ActiveMatch(Generic[Decided]):
    """The part of a match that has to be rewritten now, in the graph that is being rewritten.

    Attributes:
        graph: the graph as earlier passes have left it. decision: as in `Match`.
        names: of the regions that are due, in execution order. paths: their module paths. all_names: of all regions, due or not.
    """

    graph: Graph
    names: tuple[str, ...]
    decision: Decided
    paths: Mapping[str, tuple[str, ...]]
    all_names: tuple[str, ...]

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """The regions that are due, found again by their paths; those of which earlier passes left nothing are missing."""
        from graphopt.ir.regions import region_of

        found = (region_of(self.graph, self.paths[name]) for name in self.names)
        return tuple(region for region in found if region.nodes)


@dataclass(frozen=True)
class FeatureCut:
    """A prefix that has left the training graph: its output replaces the images as the input of training.

    Attributes:
        node: the activation that is cached; in the flat graph. region: name of the last region before the cut.
        options: the pass's options for caching it (where, dtype, limit, views).
        crops: of which larger map training takes random crops, if it does.
    """

    node: Node
    region: str
    options: Mapping[str, Any] = field(default_factory=dict)
    crops: Croppable | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is cached for one sample."""
        return self.crops.shape if self.crops else tuple(self.node.meta["val"].shape[1:])


@dataclass(frozen=True)
class ImageNeeds:
    """How the images of a phase differ from those of the data's settings; their size is that of the phase's input.

    Attributes:
        low_frequency: they are prepared at the backbone's own size, and of their spectrum the low frequencies are kept; else they are
            prepared at the phase's size.
        augment: keys of `[data.augment]` that have other values in this phase.
    """

    low_frequency: bool = False
    augment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RuntimeNeeds:
    """What a pass needs at run time; the runner reads these and no pass's name.

    Attributes:
        targets: training calls `module(x, target)` and gets `(output, local_loss)`.
        features: the cut behind which training runs on cached features.
        images: how the images of this phase differ from those of the data's settings.
        scores: regions whose parameters the runner must watch for score triggers.
    """

    targets: bool = False
    features: FeatureCut | None = None
    images: ImageNeeds | None = None
    scores: tuple[str, ...] = ()

    @staticmethod
    def of(effects: Iterable[Effects]) -> RuntimeNeeds:
        """What several passes need together."""
        needs = [effect.needs for effect in effects]
        features = next((n.features for n in reversed(needs) if n.features), None)
        images = next((n.images for n in reversed(needs) if n.images), None)
        scores = tuple(dict.fromkeys(name for n in needs for name in n.scores))
        return RuntimeNeeds(any(n.targets for n in needs), features, images, scores)


class Status(StrEnum):
    """What became of a region."""

    FROZEN = "frozen"
    SHARED = "shared"
    DROPPED = "dropped"
    BYPASSED = "bypassed"
    ISOLATED = "isolated"
    INSERTED = "inserted"
    REWIRED = "rewired"
    CHECKPOINTED = "checkpointed"


@dataclass(frozen=True)
class RegionStatus:
    """What became of one region.

    Attributes:
        status: the new state; ISOLATED means that gradients end here.
        sources: names of the regions it now uses (shared), or the region that an inserted module is attached to.
        detail: short facts to show beside it, `{"a": 0.5, "b": 0.5}` or `{"decoder": "features"}`.
        skip_probability: of a region that training steps leave out at random.
    """

    status: Status
    sources: tuple[str, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)
    skip_probability: float = 0.0


@dataclass
class Effects(Diagnostics):
    """What a rewrite did.

    Attributes:
        statuses: region name (or path of an inserted module) -> what became of it.
        needs: at run time.
        to_original_state: emitted state dict -> the keys there were before this pass (None: the same keys and values).
        from_original_state: the way back.
        no_decay: names of parameters that are never weight-decayed.
        figures: figures of the pass's own for the report.
        diagnostics: what it left alone, and warnings.
    """

    statuses: dict[str, RegionStatus] = field(default_factory=dict)
    needs: RuntimeNeeds = RuntimeNeeds()
    to_original_state: StateMap | None = None
    from_original_state: StateMap | None = None
    no_decay: frozenset[str] = frozenset()
    figures: dict[str, Any] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)

    def mark(self, name: str, status: Status, *, sources: tuple[str, ...] = (), skip_probability: float = 0.0, **detail: Any) -> None:
        """Records what became of a region."""
        self.statuses[name] = RegionStatus(status, sources, detail, skip_probability)

    @property
    def regions(self) -> tuple[str, ...]:
        """Names of the regions it changed; what it inserted aside."""
        return tuple(name for name, s in self.statuses.items() if s.status is not Status.INSERTED)


class Pass(pydantic.BaseModel):
    """A rewrite with typed options. Subclass it, give it a `name`, and write `match` and `rewrite`.

    The value is frozen and round-trips through TOML: `[[pass]] use = "name"` plus its fields.

    Attributes:
        name: its name in specs.
        preserves: what it promises; the compiler checks each promise on the model at hand.
        claim: what it does to its regions, as a participle ("frozen", "shared", "removed").
        conflicts_with: claims of other passes that its own regions must be free of.
        once: whether the budget search replaces one of its kind instead of adding a second.
        exclusive: whether it decides about the whole backbone, so that a second one of its kind would undo it, and is refused.
        position: where the budget search adds it: "first" if it splits the backbone, "last" if it reuses the splits of others.
        when: its trigger.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    preserves: ClassVar[frozenset[Property]] = frozenset()
    claim: ClassVar[str | None] = None
    conflicts_with: ClassVar[frozenset[str]] = frozenset()
    once: ClassVar[bool] = False
    exclusive: ClassVar[bool] = False
    position: ClassVar[Literal["first", "anywhere", "last"]] = "anywhere"

    when: Trigger = Start()

    def preserved_properties(self) -> frozenset[Property]:
        """What this value of the pass preserves: `preserves`, unless its options change that."""
        return self.preserves

    @property
    def lost_under(self) -> frozenset[str]:
        """Claims of other passes under which a region would lose what it has learnt: such a pass, if it begins later, has to come after."""
        return frozenset()

    @property
    def settled(self) -> bool:
        """Whether what it decides follows from the graph alone; if not, `settle` comes before `match`."""
        return True

    def settle(self, graph: Graph, step: TimedStep) -> Self:
        """The same pass with what depends on the machine decided and written into its options; itself by default.

        `graph` is untouched; the pass must not change it. Raises as `match`.
        """
        return self

    def settles(self, other: Pass) -> bool:
        """Whether it is `other`, settled."""
        mine, theirs = (value.model_dump(mode="json", exclude_none=True) for value in (self, other))
        return self.settled and self.name == other.name and all(mine.get(key) == value for key, value in theirs.items())

    def match(self, graph: Graph) -> Match[Any]:
        """Decides what it will do. Runs once per plan, on the untouched graph, which it must not change.

        Raises SelectError if a selector matches nothing, PassError if its options make no sense for this graph.
        """
        raise NotImplementedError

    def rewrite(self, edit: Editor, match: ActiveMatch[Any]) -> Effects:
        """Does what was decided, through the editor. Raises PassError if an earlier pass has changed what this one needs."""
        raise NotImplementedError

    def input(self, input: Input) -> Input:
        """The input that the network takes while this pass is applied, given what it takes otherwise: `(3, 128, 128)`."""
        return input

    def learning_rates(self, names: tuple[str, ...]) -> Mapping[str, LearningRate]:
        """The learning rate of each region whose rate it sets, over the whole run; those of its trigger, where it freezes them.

        `names` are of all its regions, in execution order. A rate is a function of the share of the run that is over, in steps, and of
        the run's own schedule; it gives a factor of the base rate. It holds whether or not the pass is applied yet.
        """
        return {}

    @classmethod
    def candidates(cls, graph: Graph, current: Pass | None) -> Iterable[Candidate]:
        """Values of this pass that the budget search may try on a graph, mildest first; none by default.

        `current` is the value of this pass that the spec has already, if any; its other options are worth keeping.
        """
        return ()

    @classmethod
    def schedules(cls, graph: Graph, epochs: int) -> Iterable[Candidate]:
        """Values of this pass, with triggers, that make a run of `epochs` cheaper, mildest first; none by default.

        The search for a speed-up tries them, alone and beside those of other passes.
        """
        return ()

    def table(self) -> dict[str, Any]:
        """The TOML table it was written as: `use` and the fields that were given."""
        return {"use": self.name, **self.model_dump(mode="json", exclude_unset=True, exclude_none=True)}


@dataclass(frozen=True)
class Candidate:
    """A value of a pass that the budget search may try, and what to call it."""

    label: str
    value: Pass


@dataclass(frozen=True)
class PassInstance:
    """One pass of a plan: its value, its number (from 0), and where in a spec it was written (`"spec.toml:12"`; None if made in code)."""

    value: Pass
    index: int
    location: str | None = None
    line: int | None = None

    @property
    def label(self) -> str:
        """`"spec.toml:12 (pass 1, freeze)"`."""
        here = f"pass {self.index + 1}, {self.value.name}"
        return f"{self.location} ({here})" if self.location else here
