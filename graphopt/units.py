"""Human-readable figures: sizes in bytes (`"8 GiB"`, `"512MB"`, `1024`), read and written; counts and times, written."""

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_PREFIXES = "kMGTPE"
_SIZE = re.compile(r"\s*(\d[\d_]*(?:\.\d+)?|\.\d+)\s*(?:([kmgtpe])(i?b?)|b|bytes?)?\s*", re.IGNORECASE)


def parse_size(value: Any) -> int:
    """Bytes in `value`; raises ValueError if it is not a size, negative, or more than 16 EiB. A number is bytes.

    `"kB", "MB", "GB", ...` are powers of 1000; `"KiB", "MiB", "GiB", ...` powers of 1024, and so are bare letters (`"8G"`, as in `ls -h`).
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f'expected a size such as "8 GiB" or a number of bytes, found {value!r}')
    if isinstance(value, str):
        found = _SIZE.fullmatch(value)
        if found is None:
            raise ValueError(f'expected a size such as "8 GiB", "512 MB" or 1024, found {value!r}')
        number, prefix, suffix = found.groups()
        base = 1000 if prefix and suffix.casefold() == "b" else 1024
        scale = base ** (_PREFIXES.casefold().index(prefix.casefold()) + 1) if prefix else 1
        number = number.replace("_", "")
        # Whole numbers stay exact: a float holds only 53 bits.
        size = int(number) * scale if number.isdigit() else round(float(number) * scale)
    else:
        if not math.isfinite(value) or value != int(value):
            raise ValueError(f"expected a whole number of bytes, found {value!r}")
        size = int(value)
    if not 0 <= size <= 2**64:
        raise ValueError(f"a size lies between 0 and 16 EiB, found {value!r}")
    return size


def exact_size(size: int) -> str:
    """The shortest text that `parse_size` reads back as exactly `size`: `"8 GiB"`, `"512 MB"`, `"1023 B"`."""
    units = [(1, "B")]
    for power, prefix in enumerate(_PREFIXES, start=1):
        units += [(1000**power, f"{prefix}B"), (1024**power, f"{prefix.upper()}iB")]
    count, unit = min((size // scale, unit) for scale, unit in (units if size else units[:1]) if size % scale == 0)
    return f"{count} {unit}"


def show_size(size: float) -> str:
    """A size with about three digits: `"1.31 GiB"`, `"512 B"`, `"-3.20 MiB"`."""
    sign, size = ("-", -size) if size < 0 else ("", size)
    if size < 1024:
        return f"{sign}{size:.0f} B"
    number, prefix = _scaled(size, 1024)
    return f"{sign}{number} {prefix.upper()}iB"


def show_count(count: float) -> str:
    """A count with about three digits and a decimal prefix: `"1.73 M"` parameters, `"23.0 G"` FLOPs; whole below 10,000."""
    sign, count = ("-", -count) if count < 0 else ("", count)
    if count < 10_000:
        return f"{sign}{count:,.0f}"
    number, prefix = _scaled(count, 1000)
    return f"{sign}{number} {prefix}"


_TIME = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(s|sec|seconds?|m|min|minutes?|h|hours?|d|days?)\s*", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_time(text: str) -> float:
    """Seconds in a text such as `"30 min"`, `"1.5 h"`, `"90 s"` or `"2 days"`; raises ValueError if it is no time."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f'expected a time such as "30 min", "1.5 h" or "90 s", found {text!r}')
    return float(found[1]) * _SECONDS[found[2][0].casefold()]


def show_time(seconds: float) -> str:
    """A duration with about three digits: `"0.31 s"`, `"42.0 s"`, `"7.50 min"`, `"31.2 h"`, `"4.02 days"`."""
    for unit, length, upto in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < upto:
            return f"{_three(seconds / length)} {unit}"
    return f"{_three(seconds / 86400)} days"


def show_change(before: float, after: float) -> str:
    """`-43 %`, `+2.1 %`, `=`, `≈` (under half a thousandth); from nothing, `new`."""
    if before == after:
        return "="
    if not before:
        return "new"
    percent = 100 * (after - before) / before
    if abs(percent) < 0.05:
        return "≈"
    return f"{percent:+.0f} %" if abs(percent) >= 10 or percent == int(percent) else f"{percent:+.1f} %"


def _scaled(value: float, base: int) -> tuple[str, str]:
    """A number with about three digits, and its prefix."""
    for prefix in _PREFIXES:
        value /= base
        if value < 999.5 or prefix == _PREFIXES[-1]:
            break
    return _three(value), prefix


def _three(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


#: a pydantic field in bytes: `"8 GiB"` in TOML, an int in Python, and `"8 GiB"` again in the resolved spec
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(exact_size, return_type=str),
    WithJsonSchema({"type": ["string", "integer"], "description": 'a size: "8 GiB", "512 MB", or bytes'}),
]


def _written_size(value: Any) -> int:
    if not isinstance(value, str):
        raise ValueError(f'expected a size with a unit, such as "8 GiB", found {value!r}')
    return parse_size(value)


#: the same beside numbers of another meaning: a size is written as text
SizeText = Annotated[
    int,
    BeforeValidator(_written_size),
    PlainSerializer(exact_size, return_type=str),
    WithJsonSchema({"type": "string", "description": 'a size with a unit: "8 GiB", "512 MB"'}),
]
