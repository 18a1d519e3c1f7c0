"""The spec: a typed TOML file. `load` and `loads` read one, `dumps` writes it with all defaults, `schema` is for editors."""

from graphopt.spec.data import AugmentSpec, DataSpec
from graphopt.spec.model import (
    BackboneSpec,
    DistillSpec,
    FsdpSpec,
    HeadInitSpec,
    LossSpec,
    OptimizerSpec,
    SchedulerSpec,
    Spec,
    TrainSpec,
    WeightsSpec,
)
from graphopt.spec.reading import from_table, installed, load, loads, resolve
from graphopt.spec.writing import dumps, dumps_pass, schema

__all__ = [
    "AugmentSpec",
    "BackboneSpec",
    "DataSpec",
    "DistillSpec",
    "FsdpSpec",
    "HeadInitSpec",
    "LossSpec",
    "OptimizerSpec",
    "SchedulerSpec",
]
__all__ += ["Spec", "TrainSpec", "WeightsSpec"]
__all__ += ["dumps", "dumps_pass", "from_table", "installed", "load", "loads", "resolve", "schema"]
