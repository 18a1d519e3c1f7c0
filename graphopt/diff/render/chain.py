"""What the ranks of a chain did, as a table of a run's page: work, and waiting for the rank before and the one after."""

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.diff.render.page import escaped
from graphopt.units import show_size

#: key of a rank's record, colour, what it says
_SHARES = (
    ("work_seconds", "after", "work"),
    ("receive_seconds", "line", "waiting for the rank before"),
    ("send_seconds", "stop", "waiting for the next rank"),
)


def chain_section(epochs: Sequence[Mapping[str, Any]]) -> str:
    """The section for the last epoch of each phase that a chain has trained; empty for other runs."""
    last = {record.get("phase", 0): record for record in epochs if record.get("chain")}
    rows = "".join(_row(record, number, rank) for record in last.values() for number, rank in _in_order(record["chain"]))
    if not rows:
        return ""
    key = ", ".join(f'<span class="share" style="background: var(--{colour})"></span> {what}' for _, colour, what in _SHARES)
    head = "<tr><th>epoch</th><th>rank</th><th>modules</th><th>time in training</th><th>sent</th></tr>"
    table = f'<div class="wide"><table class="phases chain"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    return f"<section><h2>What each rank did, in the last epoch of a phase</h2><p>{key}</p>{table}</section>"


def _in_order(chain: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """The ranks from the first modules to the last."""
    return list(enumerate(chain))[::-1]


def _row(record: Mapping[str, Any], number: int, rank: Mapping[str, Any]) -> str:
    seconds = [max(0.0, float(rank[key])) for key, _, _ in _SHARES]
    total = sum(seconds) or 1.0
    shares = [
        f'<span title="{escaped(what)}: {spent:.3g} s" style="width: {100 * spent / total:.1f}%; background: var(--{colour})"></span>'
        for spent, (_, colour, what) in zip(seconds, _SHARES, strict=True)
    ]
    start, stop = rank["modules"]
    modules = "none: hands on" if start == stop else str(stop) if stop - start == 1 else f"{start + 1} to {stop}"
    bar = f'<div class="bar" role="img" aria-label="{100 * seconds[0] / total:.0f} % work">{"".join(shares)}</div>'
    cells = [str(record.get("epoch", 0)), str(number), modules, bar, show_size(rank["bytes"])]
    return f"<tr>{''.join(f'<td>{cell if cell is bar else escaped(cell)}</td>' for cell in cells)}</tr>"
