"""What a score trigger looks at: how far a region's weights still move, as series with one entry per finished epoch.

The scores are named in Learn&Drop (arXiv 2604.23403), whose formulas and thresholds are not published where we could read; these are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: change per epoch, oldest first, `|w_e - w_(e-1)| / |w_(e-1)|` -> the score now
Measure = Callable[[Sequence[float], int], float]


def change(series: Sequence[float], window: int) -> float:
    """How far the weights moved in the last epoch, relative to themselves."""
    return series[-1]


def continuation(series: Sequence[float], window: int) -> float:
    """The last epoch's change over the largest one so far: 1.0 while a region moves as fast as it ever did."""
    largest = max(series)
    return series[-1] / largest if largest > 0 else 0.0


def slope(series: Sequence[float], window: int) -> float:
    """How fast the change itself still changes: the least-squares slope per epoch over the last `window` epochs, as a share of the largest
    change so far, without its sign. Infinite until there are `window` epochs (a slope of one point says nothing)."""
    recent = series[-window:]
    largest = max(series)
    if len(recent) < window:
        return float("inf")
    if largest == 0:
        return 0.0
    middle, mean = (window - 1) / 2, sum(recent) / window
    rise = sum((i - middle) * (value - mean) for i, value in enumerate(recent))
    return abs(rise / sum((i - middle) ** 2 for i in range(window))) / largest


MEASURES: dict[str, Measure] = {"change": change, "continuation": continuation, "slope": slope}
