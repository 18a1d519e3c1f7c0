"""`compile`: a backbone and a spec (or passes) become a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from graphopt.errors import SpecError
from graphopt.rewriting.passes import Pass
from graphopt.rewriting.pipeline import Verify
from graphopt.rewriting.plan import Plan, digest_of, measure_with
from graphopt.rewriting.triggers import Decision
from graphopt.spec import Spec, load
from graphopt.trace import trace

#: samples per training step that costs are of, where nobody says
DEFAULT_BATCH = 32


def compile(
    model: nn.Module | None,
    spec: Spec | Sequence[Pass] | Pass | str | Path,
    *,
    input: tuple[int, ...] | None = None,
    batch: int | None = None,
    verify: Verify = "full",
    decisions: Sequence[Decision] = (),
    costs: bool = True,
    trust: bool = False,
) -> Plan:
    """Compiles a backbone with a spec, or with passes.

    Args:
        model: the backbone; None builds the one the spec names. It is left as it was.
        spec: a `Spec`, the path or name of one, one pass, or several.
        input: shape of one sample, e.g. (3, 224, 224); needed where `spec` is passes.
        batch: samples in the training step that the report's costs are of (default: the spec's, else 32).
        verify: "full" tries every declared property in numbers, "fast" the structure only, "off" nothing.
        decisions: triggers that have fired: the phase to compile.
        costs: fill in the report's costs.
        trust: let a spec run Python code that it names.

    Raises:
        GraphoptError: see `graphopt.errors`; the model is left as it was.
    """
    if isinstance(spec, (str, Path)):
        spec = load(spec, trust=trust)
    if isinstance(spec, Pass):
        spec = [spec]
    if not isinstance(spec, Spec):
        passes: Sequence[Pass] = tuple(spec)
        if model is None or input is None:
            raise SpecError("passes alone do not say what they are for", fix="Give the model, and input=(3, 224, 224)")
        plain: dict[str, Any] = {"name": type(model).__name__, "digest": digest_of(passes, model, tuple(input))}
        options: dict[str, Any] = {}
    else:
        from graphopt.backbone import build

        passes = spec.passes
        if model is None:
            model = build(spec.backbone, trust=trust)
        input = input or spec.backbone.input
        batch = batch or spec.train.batch
        plain = {"name": spec.name, "digest": spec.digest, "spec": spec}
        plain |= {"lines": [spec.line_of(i) for i in range(len(passes))], "where": [spec.place_of(i) for i in range(len(passes))]}
        options = spec.train.forecast_options()
    batch = batch or DEFAULT_BATCH
    base = trace(model, tuple(input), compare=verify != "off")
    return Plan(
        model,
        base,
        passes,
        batch=batch,
        decisions=tuple(decisions),
        verify=verify,
        measure=measure_with(batch, **options) if costs else None,
        **plain,
    )
