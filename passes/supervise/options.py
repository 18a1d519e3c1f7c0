"""The words that options of `supervise` take."""

from typing import Literal

Structure = Literal["pointwise", "linear", "conv", "transformer"]
Difference = Literal["l1", "l2", "bce"]
HeadKind = Literal["pool", "norm-pool", "conv", "contrast"]
