"""Ways to make a run quicker, what each takes away from training, and the plan that a search for time ends with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from graphopt.compiler.pass_base import Pass
from graphopt.spec import Spec
from graphopt.spec.writing import toml_value


class Rung(NamedTuple):
    """A schedule that a pass offers: the pass, and its place on the ladder, which the length of the run does not change."""

    kind: type[Pass]
    number: int


@dataclass(frozen=True)
class Quicker:
    """One way to make a run quicker: other settings, passes added to the spec's own, and fewer epochs.

    Attributes:
        rungs: the schedules that its passes are.
        settings: of `[train]`, which leave training as it is: another memory format, and 16-bit arithmetic.
        epochs: length of the run.
        seconds: of the whole run, with loading where that was measured; None before it is forecast.
        updates: share of the spec's own updates that are still made: of the FLOPs of its backward passes at the same size of images, each
            step counted by the run's own learning rate then, as late steps move the weights little.
        images: share of its images that are still seen as they are drawn anew; features from a cache are not.
        pixels: share of the pixels of an image that is seen, on average over the same learning rates.
        refused: why it is impossible, if it is.
    """

    name: str
    epochs: int
    added: tuple[Pass, ...] = ()
    rungs: tuple[Rung, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    updates: float = 1.0
    images: float = 1.0
    pixels: float = 1.0
    refused: str | None = None

    @property
    def title(self) -> str:
        """Its settings, and its name."""
        return "; ".join(dict.fromkeys([*([settings_text(self.settings)] if self.settings else []), self.name]))

    @property
    def price(self) -> float:
        """What training loses: the squares of the lost shares, as a little of each costs less than much of one; pixels count twice.

        That orders what was measured on ResNet-20 and Fashion-MNIST (tools/tables/speedup_fashion.md): at half of the time, smaller images
        cost more accuracy there than fewer epochs, and those more than freezing from the middle of the run on.
        """
        return (1 - self.updates) ** 2 + (1 - self.images) ** 2 + (2 * (1 - self.pixels)) ** 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {key: getattr(self, key) for key in ("name", "epochs", "seconds", "updates", "images", "pixels", "refused")}
        return {**plain, "settings": dict(self.settings), "added": [value.table() for value in self.added]}


@dataclass(frozen=True)
class SpeedPlan:
    """The result of a search. `chosen` and `spec`, the spec to write, are None if nothing is quick enough.

    Attributes:
        limit: seconds that the run may take. own: the spec as it is.
        base: the spec with the settings that schedules and fewer epochs have, too; `own` where none is quicker or needed.
    """

    limit: float
    own: Quicker
    base: Quicker
    tried: tuple[Quicker, ...]
    chosen: Quicker | None
    spec: Spec | None = field(repr=False)
    snippet: str = field(default="", repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        tried = [trial.to_dict() for trial in self.tried]
        return {
            "limit_seconds": self.limit,
            "own": self.own.to_dict(),
            "settings": dict(self.base.settings),
            "tried": tried,
            "chosen": self.chosen and self.chosen.name,
            "snippet": self.snippet,
        }


def settings_text(settings: Mapping[str, Any]) -> str:
    """As in a spec."""
    return ", ".join(f"{key} = {toml_value(value)}" for key, value in settings.items())


def together(trials: Sequence[Quicker]) -> Quicker:
    """Several at once, in a run as long as that of the first and with its settings."""
    added, rungs = (tuple(value for trial in trials for value in getattr(trial, name)) for name in ("added", "rungs"))
    return Quicker("; ".join(trial.name for trial in trials), trials[0].epochs, added, rungs, trials[0].settings)
