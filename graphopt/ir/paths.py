"""Module paths (`layer1.0.conv1`): their ancestors, their owners, and what lies below them. `""` is the backbone itself."""

from collections.abc import Iterable, Iterator
from itertools import takewhile


def lineage(path: str) -> Iterator[str]:
    """`""`, `a`, `a.b` and `a.b.c` for `a.b.c`: the root, every container, and the path itself."""
    yield ""
    if path:
        parts = path.split(".")
        yield from (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def containers(path: str) -> Iterator[str]:
    """`a` and `a.b` for `a.b.c`: what holds a path, the root aside."""
    parts = path.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))


def owner(name: str) -> str:
    """Path of the module in which a parameter, a buffer or a child module is registered."""
    return name.rpartition(".")[0]


def is_below(name: str, paths: Iterable[str]) -> bool:
    """Whether a path or a state-dict name is one of `paths`, or lies inside one of them; of a frozenset of many, that is looked up."""
    if isinstance(paths, frozenset):
        return not paths.isdisjoint(lineage(name))
    return any(not path or name == path or name.startswith(f"{path}.") for path in paths)


def common_path(paths: Iterable[str]) -> str:
    """The innermost path that is, or holds, every one of `paths`; `""` where they have nothing in common."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
