"""The part of a spec that names regions: a glob, a regular expression, a list, or a table; `graphopt.ir.select` finds them."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import ConfigDict, Field, StrictBool

Glob = Annotated[str, Field(min_length=1)]


class Filter(pydantic.BaseModel):
    """A selector table. Filters apply in the order of the fields below; at least one of `path`, `type`, `blocks` starts the set.

    Attributes:
        path: globs; with `blocks`, the blocks at or below the paths they match.
        type: class names of modules, as globs (`"Conv2d"`, `"*Norm*"`).
        blocks: the family's natural blocks.
        before, after, between: only what runs before, after or strictly between these paths.
        exclude: a selector; drops what lies inside or contains what it matches.
        first, last: a count, or a fraction of what is left (`0.5`).
        every: each k-th of what is left: the k-th, the 2k-th and so on.
        offset: with `every`: index (from 0) of the first one taken instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: Glob | tuple[Glob, ...] | None = None
    type: Glob | tuple[Glob, ...] | None = None
    blocks: StrictBool | None = None
    before: Glob | None = None
    after: Glob | None = None
    between: tuple[Glob, Glob] | None = None
    exclude: Glob | tuple[Glob | Filter, ...] | Filter | None = None
    first: Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    last: Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    every: Annotated[int, Field(ge=1, strict=True)] | None = None
    offset: Annotated[int, Field(ge=0, strict=True)] | None = None

    @pydantic.model_validator(mode="after")
    def _starts_somewhere(self) -> Filter:
        if self.path is None and self.type is None and not self.blocks:
            raise ValueError("a selector table needs one of path, type or blocks = true to start from")
        if self.offset is not None and self.every is None:
            raise ValueError("offset goes with every")
        if self.first is not None and self.last is not None:
            raise ValueError("first and last exclude each other")
        if self.between is not None and (self.before is not None or self.after is not None):
            raise ValueError("between says both ends: leave out before and after")
        return self


Selector = Glob | Annotated[tuple[Glob | Filter, ...], Field(min_length=1)] | Filter
