"""The kinds of values in a spec: numbers within bounds, shapes, and tables."""

import re
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from graphopt.ir.sample import check_input

# The models are frozen, so TOML's arrays become tuples; nothing else is converted (strict).
as_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
# Bounds leave out what no run can mean, and what would overflow or take the machine's memory later.
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Batch = Annotated[int, Field(gt=0, le=2**20)]
NonNegative = Annotated[float, Field(ge=0, le=1e30)]
Above0 = Annotated[float, Field(ge=1e-30, le=1e30)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FractionAbove0 = Annotated[float, Field(gt=0, le=1)]
FractionBelow1 = Annotated[float, Field(ge=0, lt=1)]
Shape: TypeAlias = Annotated[
    tuple[Annotated[int, Field(gt=0)], ...], as_tuple, Field(min_length=1, max_length=8), AfterValidator(check_input)
]
Means: TypeAlias = Annotated[tuple[Annotated[float, Field(ge=-1000, le=1000)], ...], as_tuple, Field(min_length=1, max_length=8)]


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"the first number is the smaller one, found {list(value)!r}")
    return value


def _alpha(value: float) -> float:
    if 0 < value < 0.001:
        raise ValueError(f"must be 0 (off) or at least 0.001, found {value!r}")
    return value


def _policy(value: str) -> str:
    counts = [(key, count) for key, count in re.findall(r"-([nwd])(\d+)", value) if len(count) > 2]
    if counts:
        raise ValueError(f"{counts[0][0]} is a number of operations, at most 99, found {counts[0][1]}")
    return value


Moderate = Annotated[float, Field(ge=0.001, le=1000)]
Deviations: TypeAlias = Annotated[tuple[Moderate, ...], as_tuple, Field(min_length=1, max_length=8)]
Interval: TypeAlias = Annotated[tuple[Moderate, Moderate], as_tuple, AfterValidator(_ordered)]
Shares: TypeAlias = Annotated[tuple[Fraction, Fraction], as_tuple, AfterValidator(_ordered)]
Alpha: TypeAlias = Annotated[float, Field(ge=0, le=1000), AfterValidator(_alpha)]
Policy: TypeAlias = Annotated[str, AfterValidator(_policy)]


class Table(BaseModel):
    """A TOML table. Unknown keys are errors, `"10"` is not a number, and values do not change after parsing."""

    # JSON has no infinity but TOML does: as a constant it survives being written.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


def _plain(value: Any) -> Any:
    """Refuses dates and times: they would not be the same when they are written and read."""
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _plain(item)
    if not isinstance(value, bool | int | float | str | list | tuple | dict):
        raise ValueError(f"expected a number, text, true or false, an array or a table, found the {type(value).__name__} {value}")
    return value


Arguments: TypeAlias = Annotated[dict[str, Any], AfterValidator(_plain)]
