"""What `graphopt check --ranks` shows: a rank's memory, and what it sends."""

from typing import TYPE_CHECKING

from graphopt.cli.screen import grid, show
from graphopt.errors import RunError

if TYPE_CHECKING:
    from graphopt.planning.modules import ChainCost
    from graphopt.planning.ranks import RanksCost

#: columns of the table of memory, and the kinds of storage that each adds up
_PARTS = {
    "parameters": ("parameter",),
    "gradients": ("gradient",),
    "optimizer": ("optimizer", "scratch"),
    "gathered": ("gathered",),
    "activations": ("activation",),
    "batch, buffers": ("input", "buffer"),
    "averages, prefix": ("averages", "prefix"),
}


def parse_link(text: str | None) -> int | None:
    """Bytes per second of `"10 GB/s"` or `"100 Gbit/s"`."""
    from graphopt.units import parse_size

    if text is None:
        return None
    rate, bits = text.strip().removesuffix("/s").rstrip(), False
    if rate.endswith("bit"):
        rate, bits = rate.removesuffix("it").rstrip(), True
    try:
        size = parse_size(rate) // (8 if bits else 1)
    except ValueError:
        size = 0
    if not size or not text.strip().endswith("/s"):
        raise RunError(f"not a rate: {text!r}", where="--link", fix='Write it as "10 GB/s" or "100 Gbit/s"')
    return size


def show_chain(cost: "ChainCost", link: int | None, steps: int) -> None:
    """Prints what each rank of a chain takes, holds and sends in a step, per phase; `steps` are those of an epoch."""
    from graphopt.units import show_size

    several = f", {cost.accumulate} times a step" if cost.accumulate > 1 else ""
    count = len(cost.phases[0].ranks)
    show(f"{count} ranks in a chain (modules): {cost.micro_batch} images at once{several}; one step, forecast by rates measured here")
    table = grid("from epoch", "rank", "modules", "seconds", "holds", "link", "messages", "sends", right=(3, 4, 5, 6, 7))
    for phase in cost.phases:
        for rank in phase.ranks:
            sizes = map(show_size, (rank.held_bytes, rank.link_bytes))
            row = (f"{phase.epoch:.4g}", str(rank.rank), _run(rank.modules), f"{rank.seconds:.3g}", *sizes)
            table.add_row(*row, str(rank.messages), show_size(rank.sent_bytes))
        table.add_row(
            f"{phase.epoch:.4g}", "one process", "all", f"{phase.alone.seconds:.3g}", show_size(phase.alone.held_bytes), "", "", ""
        )
    show(table)
    for phase in cost.phases:
        seconds, alone = phase.step_seconds(link), phase.alone.seconds
        if seconds:
            speed = f"{cost.batch / seconds:.3g} images/s, {alone / seconds:.2f} times one process's {cost.batch / alone:.3g}"
            share = f" ({phase.fill_seconds / (steps * seconds):.1%} of an epoch of {steps:,} steps)" if steps else ""
            show(f"from epoch {phase.epoch:.4g}: {speed}; filling the chain, once an epoch, takes {phase.fill_seconds:.3g} s{share}")


def _run(modules: range) -> str:
    """`1`, `2-3`, or `none`."""
    first, last = modules.start + 1, modules.stop
    return "none" if not modules else str(last) if first == last else f"{first}-{last}"


def show_ranks(cost: "RanksCost", link: int | None) -> None:
    """Prints the memory of one rank and the messages of one step, per phase."""
    from graphopt.units import show_size

    several = f", {cost.accumulate} times a step" if cost.accumulate > 1 else ""
    show(f"each of {cost.ranks} ranks ({cost.strategy}): {cost.micro_batch} images at once{several}")
    memory = grid("from epoch", *_PARTS, "peak", "one process", right=tuple(range(1, len(_PARTS) + 3)))
    for phase in cost.phases:
        sizes = [sum(phase.peak_parts[kind] for kind in kinds) for kinds in _PARTS.values()]
        memory.add_row(f"{phase.epoch:.4g}", *map(show_size, (*sizes, phase.peak_bytes, phase.peak_bytes_alone)))
    show("live at the peak of a step, on the rank with the largest parts")
    show(memory)
    for phase in cost.phases:
        if phase.feature_bytes:
            show(f"from epoch {phase.epoch:.4g} on, {show_size(phase.feature_bytes)} of cached features, in RAM or on disk")
    if cost.strategy == "single":
        return
    titles = ("from epoch", "message", "number", "whole", "sent by a rank", *(("seconds",) if link else ()))
    table = grid(*titles, right=(2, 3, 4, 5)[: len(titles) - 2])
    for phase in cost.phases:
        for message in phase.messages:
            sent = message.sent(cost.ranks, cost.backend)
            seconds = (f"{sent / link:.3g}",) if link else ()
            table.add_row(f"{phase.epoch:.4g}", message.name, f"{message.calls:,}", show_size(message.bytes), show_size(sent), *seconds)
    show(f"messages of a step, as {cost.backend} sends them; a rank receives what it sends" + (", without overlap" if link else ""))
    show(table)
