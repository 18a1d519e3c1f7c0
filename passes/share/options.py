"""The words that options of `share` take."""

from typing import Literal

Mode = Literal["mix", "surrogate"]
Part = Literal["attention", "mlp", "all"]
Boundary = Literal["skip", "nearest", "one-sided"]
