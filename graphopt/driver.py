"""From a spec to a plan: the one place that builds a backbone, traces it, lets the passes decide, and compiles the first phase."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from graphopt.compiler.measure import measure_with
from graphopt.compiler.pass_base import Pass, PassInstance
from graphopt.compiler.pipeline import Verify, located, match_all
from graphopt.compiler.plan import Plan, Source, compile_phase
from graphopt.compiler.sizes import Sizes
from graphopt.compiler.triggers import Decision
from graphopt.cost.rates import TimedStep, rates_of
from graphopt.errors import BackboneError, PassError, SpecError, TraceError, WeightsError
from graphopt.ir.grad_mode import recording
from graphopt.ir.graph import Graph
from graphopt.ir.inputs import Input
from graphopt.models.build import build, init_head
from graphopt.spec import BackboneSpec, Spec, WeightsSpec, load
from graphopt.tracing import trace

#: default batch size for cost estimates
DEFAULT_BATCH = 32

Passes = Spec | Sequence[Pass] | Pass | str | Path


def compile(
    model: nn.Module | None,
    spec: Spec | Sequence[Pass] | Pass | str | Path,
    *,
    input: Input | None = None,
    batch: int | None = None,
    verify: Verify = "full",
    decisions: Sequence[Decision] = (),
    costs: bool = True,
    trust: bool = False,
) -> Plan:
    """Compiles a backbone with a spec, or with passes. Raises GraphoptError (see `graphopt.errors`); the model is left as it was.

    Args:
        model: the backbone; None builds the one the spec names. It is left as it was.
        spec: a `Spec`, the path or name of one, one pass, or several.
        input: shape of one sample, e.g. (3, 224, 224), or of each of several inputs, as in `graphopt.trace`; needed where `spec` is passes.
        batch: samples in the training step that the report's costs are of (default: the spec's, else 32).
        verify: "full" tries every declared property in numbers, "fast" the structure only, "off" nothing.
        decisions: triggers that have fired: the phase to compile.
        costs: fill in the report's costs.
        trust: let a spec run Python code that it names.
    """
    source = prepare(model, spec, input=input, batch=batch, compare=verify != "off", trust=trust)
    return compile_phase(source, tuple(decisions), verify=verify, costs=costs)


@recording()
def prepare(
    model: nn.Module | None,
    spec: Passes,
    *,
    input: Input | None = None,
    batch: int | None = None,
    compare: bool = True,
    trust: bool = False,
) -> Source:
    """Everything that a plan's phases share: the traced backbone, and what each pass decided on it. Rewrites nothing.

    With `compare`, backbone and graph run one after the other and must give equal bits. The rest is as in `compile`.
    """
    spec = load(spec, trust=trust) if isinstance(spec, (str, Path)) else spec
    if isinstance(spec, Spec):
        model, graph = trace_backbone(spec, model=model, input=input, compare=compare, trust=trust)
        spec = _settled(spec, graph)
        instances = _instances(spec)
        train = spec.train if batch is None else spec.train.model_copy(update={"batch": batch})
        train.micro_batch()  # refuses a batch that does not divide
        batch, options = train.batch, train.forecast_options()
        about: dict[str, Any] = {"name": spec.name, "digest": spec.digest, "spec": spec}
    else:
        passes = (spec,) if isinstance(spec, Pass) else tuple(spec)
        if model is None or input is None:
            raise SpecError("a list of passes does not say what to compile", fix="Give the model, and input=(3, 224, 224)")
        graph = trace(model, input, compare=compare)
        batch, options = batch or DEFAULT_BATCH, {}
        instances = _settled_instances([PassInstance(value, index) for index, value in enumerate(passes)], graph, batch)
        about = {"name": type(model).__name__, "digest": digest_of([i.value for i in instances], model, graph.input)}
    matched = match_all(graph, instances)
    sizes = Sizes(model, graph, matched, compare=compare)
    return Source(backbone=model, base=graph, matched=matched, sizes=sizes, batch=batch, measure=measure_with(batch, **options), **about)


def settle(spec: Spec, *, trust: bool = False) -> Spec:
    """The spec with everything in its passes that depends on the machine decided and written down; raises as `prepare`.

    Whoever compiles the result, wherever and whenever, gets the same plan.
    """
    if spec.settled:
        return spec
    model = build_backbone(spec.backbone, trust=trust, weights=False)
    return _settled(spec, trace_backbone(spec, model=model, compare=False, trust=trust)[1])


def _settled(spec: Spec, graph: Graph) -> Spec:
    train = spec.train
    found = _settled_instances(_instances(spec), graph, train.batch, train.device, **train.forecast_options())
    return spec if spec.settled else spec.with_passes(tuple(instance.value for instance in found))


def _instances(spec: Spec) -> list[PassInstance]:
    return [PassInstance(value, i, spec.location_of(i), spec.lines.get(("pass", i))) for i, value in enumerate(spec.passes)]


def _settled_instances(instances: list[PassInstance], graph: Graph, batch: int, device: str = "cpu", **options: Any) -> list[PassInstance]:
    """The same passes, settled for steps of `batch` samples on `device`, which is timed only if one of them needs that."""
    found = []
    for instance in instances:
        value = instance.value
        with located(instance):
            if not value.settled:
                measured = partial(rates_of, device, options.get("amp"), options.get("channels_last", False))
                value = value.settle(graph, TimedStep(batch, measured, **options))
        found.append(replace(instance, value=value))
    return found


def check_folders(source: Source, *, trust: bool) -> None:
    """Raises PassError if a pass of a spec that is not trusted names a folder for features: they would be written outside the run."""
    for item in source.matched:
        folder = (item.match.feature_options or {}).get("folder")
        if folder and not trust:
            what, fix = f"the spec names a folder ({folder!r}) that features would be written to", "Read it, then pass --trust"
            raise PassError(what, where=item.instance.label, fix=fix)


def trace_backbone(
    spec: Spec, *, model: nn.Module | None = None, input: Input | None = None, compare: bool = True, trust: bool = False
) -> tuple[nn.Module, Graph]:
    """The backbone of a spec and its graph; no pass is applied. Arguments and errors are as in `prepare`."""
    with located_backbone(spec):
        model = build_backbone(spec.backbone, trust=trust) if model is None else model
        return model, trace(model, input or spec.backbone.input, compare=compare)


def build_backbone(spec: BackboneSpec, *, trust: bool = False, weights: bool = True) -> nn.Module:
    """The backbone that `[backbone]` names, in train mode; raises as `graphopt.models.build`.

    `weights` is False where the state comes from elsewhere than the weights file (from a checkpoint).
    """
    given = spec.weights if weights else None
    options: dict[str, Any] = given.model_dump() if isinstance(given, WeightsSpec) else {"file": given}
    model = build(spec.source, spec.name, spec.arguments, weights=options.pop("file"), **options, trust=trust)
    if spec.head_init is not None:
        init_head(model, spec.head_init.scale, spec.head_init.bias)
    return model


@contextmanager
def located_backbone(spec: Spec) -> Iterator[None]:
    """Puts the line of the key of `[backbone]` that is at fault before the location of an error."""
    try:
        yield
    except (BackboneError, TraceError) as error:
        key = "input" if isinstance(error, TraceError) else "weights" if isinstance(error, WeightsError) else "name"
        where = spec.where("backbone", key)
        if where and not (error.where or "").startswith(where):  # it may have been located further in
            error.with_location(where)
        raise


def digest_of(passes: Sequence[Pass], backbone: nn.Module, input: Input) -> str:
    """Identifies a plan made in code: its passes, and the names and shapes of the backbone's parameters."""
    shapes = {k: list(v.shape) for k, v in backbone.state_dict().items()}
    plain = {"passes": [p.table() for p in passes], "shapes": shapes, "input": list(input)}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]
