"""What the shape of one sample can be."""

import math

#: the most numbers that one sample may hold: 256 MiB in float32
MOST_NUMBERS = 2**26


def check_input(input: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one sample; raises ValueError if it is beyond memory."""
    if min(input, default=0) < 1 or math.prod(input) > MOST_NUMBERS:
        shown = ", ".join(str(size) if abs(size) < 10**9 else "..." for size in input[:8])
        raise ValueError(f"one sample of shape ({shown}) must hold between 1 and {MOST_NUMBERS:,} numbers")
    return input
