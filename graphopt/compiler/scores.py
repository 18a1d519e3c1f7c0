"""Scores of convergence: how much a region's weights still change, from a series with one entry per finished epoch.

Learn&Drop (arXiv 2604.23403) names the scores, but publishes neither formulas nor thresholds; those here are our own.
"""

from collections.abc import Callable, Sequence

#: from the changes per epoch `|w_e - w_(e-1)| / |w_(e-1)|`, oldest first, and a window in epochs, to the score now
Measure = Callable[[Sequence[float], int], float]


def change(series: Sequence[float], _window: int) -> float:
    """The last epoch's change of the weights, relative to the weights."""
    return series[-1]


def continuation(series: Sequence[float], _window: int) -> float:
    """The last epoch's change over the largest one so far: 1.0 while a region changes as fast as ever."""
    largest = max(series)
    return series[-1] / largest if largest > 0 else 0.0


def slope(series: Sequence[float], window: int) -> float:
    """How fast the change itself changes: its absolute least-squares slope over the last `window` epochs, over the largest change so far.

    Infinite until there are `window` epochs.
    """
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
