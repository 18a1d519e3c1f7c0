"""What an argument of `graphopt diff` means: a spec or run with its phases, a backbone by name, or a file of weights."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.cli import options
from graphopt.errors import RunError, did_you_mean

if TYPE_CHECKING:
    from graphopt.compiler.plan import Plan
    from graphopt.diff import Diff
    from graphopt.diff.phases import PhaseDiff
    from graphopt.spec import Spec

#: names of files that hold weights
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".tar", ".ckpt")


def is_weights(argument: str) -> bool:
    """Whether an argument names a file of weights."""
    path = options.expanded(argument)
    return path.suffix.lower() in WEIGHTS and path.is_file()


def is_backbone(argument: str) -> bool:
    """Whether an argument is meant as `source/name`, as in `timm/resnet50`, or is the name alone, which `resolve` refuses with its sources.

    A file or an installed spec of that name comes first.
    """
    from graphopt.models.catalog import SOURCES, having
    from graphopt.spec import installed

    source, slash, _ = argument.partition("/")
    if os.path.exists(argument) or argument in installed() or argument.endswith(".toml"):
        return False
    if not slash:
        return bool(having(argument))
    return source in SOURCES or did_you_mean(source, SOURCES) is not None


class Networks:
    """The networks that a command's arguments name, each read once.

    Args:
        shape: the input of a backbone that does not say its own. overrides: values of `--set`, for specs and backbones.
        batch, costs: of the forecasts. ranks: of a chain, to be shown.
    """

    def __init__(
        self, *, shape: tuple[int, ...] | None, overrides: list[str], batch: int | None, costs: bool, ranks: int | None, trust: bool
    ) -> None:
        self.shape, self.overrides, self.batch, self.costs, self.ranks, self.trust = shape, overrides, batch, costs, ranks, trust
        self._specs: dict[str, Spec] = {}
        self._of_weights: Spec | None = None
        self._plans: dict[str, Plan] = {}

    def read(self, arguments: list[str], spec: str | None) -> None:
        """Reads the specs, before anything heavy is loaded; weights files belong to `spec`, or to the first one among the arguments.

        Raises SpecError, BackboneError, or RunError for a `spec` that nothing needs.
        """
        self._specs = {name: self._spec(name) for name in arguments if not is_weights(name)}
        if spec is not None and len(self._specs) == len(arguments):
            raise RunError("belongs to a weights file", where="--spec", fix="Leave it out: the other arguments have their own")
        if self.shape is not None and self._specs and not any(map(is_backbone, self._specs)):
            raise RunError(
                "belongs to a backbone without a spec", where="--input", fix="A spec has its own: --set backbone.input=[3,64,64]"
            )
        self._of_weights = self._spec(spec) if spec is not None else next(iter(self._specs.values()), None)

    def _spec(self, argument: str) -> "Spec":
        """The spec that an argument names, or one of a backbone alone."""
        from graphopt.spec import load, loads, resolve

        if not is_backbone(argument):
            return load(argument, trust=self.trust, overrides=self.overrides)
        found = resolve(argument, input=self.shape)
        values = {"source": found.source, "name": found.name, "input": found.input}
        table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        return loads(f"[backbone]\n{table}", trust=self.trust, overrides=self.overrides)

    def phases(self, argument: str, epoch: int | None) -> "tuple[PhaseDiff, ...]":
        """The phases of a spec, or those that a run has gone through; of weights, the one phase they are of."""
        from graphopt.diff import align, backbone_view, plan_view
        from graphopt.diff.phases import PhaseDiff, phase_diffs
        from graphopt.diff.render.run import is_run, read_run

        path = options.expanded(argument)
        if argument not in self._specs:
            plan = self._plans[argument] = self._plan_of_weights(path)
            return (PhaseDiff(0, "start", align(backbone_view(plan), plan_view(plan, path.name))),)
        spec = self._specs[argument]
        options.check_epoch(spec, epoch)
        decisions = read_run(path).decisions if is_run(path) else None
        plan = options.seeded_plan(spec, trust=self.trust, batch=self.batch, costs=self.costs)
        return phase_diffs(plan, decisions, ranks=self.ranks)

    def with_weights(self, found: "Diff", one: str, other: str) -> "Diff":
        """The same diff; of two files of weights, with what they differ by in numbers."""
        from graphopt.diff.weights import with_weights

        both = one in self._plans and other in self._plans
        return with_weights(found, self._plans[one], self._plans[other]) if both else found

    def _plan_of_weights(self, path: Path) -> "Plan":
        """The plan of a run's checkpoint or of a plan file; of other weights, their backbone with them, without passes."""
        from graphopt.driver import compile
        from graphopt.plan_file import is_plan_file, read_plan_file
        from graphopt.train.export import load_run

        if path.suffix == ".pt" and (path.parent / "run.json").is_file():
            return load_run(path, trust=self.trust)
        if path.suffix == ".safetensors" and is_plan_file(path):
            return read_plan_file(path, trust=self.trust)
        if self._of_weights is None:
            fix = "Name it: --spec SPEC, or --spec timm/resnet50"
            raise RunError("a weights file does not say which backbone it belongs to", where=str(path), fix=fix)
        backbone = self._of_weights.backbone.model_copy(update={"weights": str(path.resolve())})
        bare = self._of_weights.model_copy(update={"backbone": backbone}).with_passes(())
        return compile(None, bare, batch=self.batch, verify="off", costs=self.costs, trust=self.trust)
