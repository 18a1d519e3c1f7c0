"""The words and tables that options of `supervise` take."""

from typing import Annotated, Literal, Protocol

import pydantic
from pydantic import ConfigDict, Field

Structure = Literal["pointwise", "linear", "conv", "transformer"]
Difference = Literal["l1", "l2", "bce"]
HeadKind = Literal["pool", "norm-pool", "conv", "contrast", "ahead", "dictionary"]
Ends = tuple[Annotated[float, Field(ge=0, strict=True)], Annotated[float, Field(ge=0, strict=True)]]


class _Table(pydantic.BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Weighting(_Table):
    """`weights = { reconstruct = [1.0, 0.1], classify = [0.1, 1.0] }`: first and last auxiliary module, linear between.

    Attributes:
        reconstruct: of the decoder's loss. Default: 0.1 for features, by measurement (tools/tables/supervise_fashion.md), 1 for the image.
        classify: of the auxiliary classifier's.
    """

    reconstruct: Ends | None = None
    classify: Ends = (1.0, 1.0)


class Lookahead(_Table):
    """`lookahead = { blocks = 1, ema = 0.995, bias = "scale" }`: the next module's first blocks before the head and the decoder.

    Attributes:
        blocks: how many of them.
        ema: decay of the running mean of their weights, per step.
        bias: what is added to the mean's output: "block" (that of a copy that trains, MAN), "scale" (the two weighted by a factor that
            trains, MAN++), "none".
    """

    blocks: Annotated[int, Field(ge=1, strict=True)] = 1
    ema: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.995
    bias: Literal["block", "scale", "none"] = "scale"


class Parts(Protocol):
    """The options of the pass that say what the auxiliary parts are."""

    @property
    def decoder(self) -> Literal["features", "image", "none"]: ...

    @property
    def structure(self) -> Structure: ...

    @property
    def fraction(self) -> float | None: ...

    @property
    def loss(self) -> Difference | None: ...

    @property
    def head(self) -> HeadKind: ...

    @property
    def temperature(self) -> float | None: ...

    @property
    def depth(self) -> int: ...

    @property
    def taper(self) -> float: ...

    @property
    def lookahead(self) -> Lookahead | None: ...

    @property
    def weights(self) -> Weighting: ...

    @property
    def mean(self) -> tuple[float, ...] | None: ...

    @property
    def std(self) -> tuple[float, ...] | None: ...

    @property
    def classes(self) -> int | None: ...
