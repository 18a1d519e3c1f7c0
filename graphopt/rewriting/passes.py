"""What a pass is: a frozen typed value that selects, checks and rewrites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import pydantic
from pydantic import ConfigDict
from torch import Tensor, fx

from graphopt.regions import Region
from graphopt.rewriting.triggers import Start, Trigger
from graphopt.trace import Graph

Property = Literal["eval output", "training output", "state-dict keys", "gradients of the rest"]
StateMap = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Note:
    """What a pass has to say of one place: `skip` (left alone, and why), `warn`, or `refuse` (the pass will not run)."""

    level: Literal["skip", "warn", "refuse", "info"]
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.level} {self.where}: {self.why}"


@dataclass(frozen=True)
class Match:
    """What a pass will act on. `data` is the pass's own (cuts, neighbours)."""

    regions: tuple[Region, ...]
    data: Any = None

    def only(self, names: Iterable[str]) -> Match:
        """The part of it that a decision named."""
        chosen = set(names)
        return replace(self, regions=tuple(r for r in self.regions if r.name in chosen))


@dataclass(frozen=True)
class FeatureCut:
    """A prefix that has left the training graph: its output replaces the images as the input of training.

    Attributes:
        node: the activation that is kept; in the flat graph.
        region: name of the last region before the cut.
        options: the pass's options for keeping it (where, dtype, limit, views).
    """

    node: fx.Node
    region: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What a pass needs at run time; the runner reads these and no pass's name.

    Attributes:
        targets: training calls `module(x, target)` and gets `(output, local_loss)`.
        co_shard: groups of module paths whose parameters must be sharded together under FSDP2.
        features: the cut behind which training runs on kept features.
        scores: regions whose parameters the runner must watch for score triggers.
    """

    targets: bool = False
    co_shard: tuple[tuple[str, ...], ...] = ()
    features: FeatureCut | None = None
    scores: tuple[str, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.targets or other.targets,
            self.co_shard + other.co_shard,
            other.features or self.features,
            tuple(dict.fromkeys(self.scores + other.scores)),
        )


@dataclass(frozen=True)
class Mark:
    """What became of one region, for people: said by the pass where the graph alone does not tell (see `graphopt.diff`).

    Attributes:
        status: "frozen", "shared", "dropped", "bypassed", "isolated" (gradients end here), "inserted", "rewired" or "checkpointed".
        sources: names of the regions it now draws on (shared), or the region that an inserted module hangs at.
        detail: short facts shown beside it, `{"a": 0.5, "b": 0.5}` or `{"decoder": "features"}`.
    """

    status: str
    sources: tuple[str, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Effects:
    """What a rewrite did.

    Attributes:
        regions: names of the regions it changed.
        notes: what it left alone, and warnings worth money.
        needs: at run time.
        restore: emitted state dict -> the keys there were before this pass (None: the same keys and values).
        adopt: the way back.
        no_decay: names of parameters that are never weight-decayed.
        figures: figures of the pass's own for the report.
        marks: region name (or path of an inserted module) -> what became of it, where the graph alone does not tell.
    """

    regions: tuple[str, ...]
    notes: tuple[Note, ...] = ()
    needs: Needs = Needs()
    restore: StateMap | None = None
    adopt: StateMap | None = None
    no_decay: frozenset[str] = frozenset()
    figures: Mapping[str, Any] = field(default_factory=dict)
    marks: Mapping[str, Mark] = field(default_factory=dict)


class Pass(pydantic.BaseModel):
    """A rewrite with typed options. Subclass it, name it with `use`, and write `match` and `rewrite`.

    The value is frozen and round-trips through TOML: `[[pass]] use = "name"` plus its fields.

    Attributes:
        use: its name in specs.
        preserves: what it promises; the compiler checks each promise on the model at hand.
        claim: what it does to its regions ("frozen", "shared", "removed"); passes whose claims exclude each other must not meet.
        excludes: claims that its own regions must be free of.
        when: its trigger.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    use: ClassVar[str]
    preserves: ClassVar[frozenset[Property]] = frozenset()
    claim: ClassVar[str | None] = None
    excludes: ClassVar[frozenset[str]] = frozenset()

    when: Trigger = Start()

    def promises(self) -> frozenset[Property]:
        """What this value of the pass preserves: `preserves`, unless its options change that."""
        return self.preserves

    def keeps(self) -> Mapping[str, Any] | None:
        """Options under which it may ask for features to be kept (see `FeatureCut`), so that a runner can look at them before it starts."""
        return None

    def match(self, graph: Graph) -> Match:
        """The regions it would act on. Changes nothing.

        Raises:
            SelectError: a selector names nothing.
            PassError: its options make no sense for this graph.
        """
        raise NotImplementedError

    def check(self, graph: Graph, match: Match) -> list[Note]:
        """Reasons, before anything changes: what will be skipped, what is refused. Changes nothing."""
        return []

    def rewrite(self, graph: Graph, match: Match) -> Effects:
        """Acts on a graph that the pipeline owns."""
        raise NotImplementedError

    def table(self) -> dict[str, Any]:
        """The TOML table it was written as: `use` and the fields that were given."""
        return {"use": self.use, **self.model_dump(mode="json", exclude_unset=True, exclude_none=True)}
