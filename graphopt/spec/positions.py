"""The line of each key of a TOML text. The parser gives values without positions, so the text is scanned a second time."""

import re
from collections.abc import Iterator

import tomli

KeyPath = tuple[str | int, ...]

_TOKEN = re.compile(
    r"""
    (?P<text>  \"{3}(?:\\.|[^\\])*?\"{3,5} | '{3}.*?'{3,5} | "(?:\\.|[^"\\])*" | '[^']*')
    | (?P<comment>  \#[^\n]*)
    | (?P<blank>  [ \t\r]+)
    | (?P<mark>  [\n\[\]{}=,.])
    | (?P<word>  [^\s\[\]{}=,.\"'\#]+)
    """,
    re.VERBOSE | re.DOTALL,
)


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line, from 1, of every key and array element of a valid TOML text: `("pass", 0, "when", "epoch") -> 14`."""
    return _Scanner(text).lines


class _Scanner:
    """Reads valid TOML token by token ("" at the end) and notes in `lines` where each key path first stands."""

    def __init__(self, text: str) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._elements: dict[KeyPath, int] = {}  # how many elements each array of tables has so far
        self._tokens = _tokens(text)
        self._next()
        table: KeyPath = ()
        while self.token:
            if self._skip("\n"):
                continue
            if self._skip("["):
                table = self._header(is_array=self._skip("["))
            else:
                self._pair(table)

    def _next(self) -> str:
        """The current token; goes on to the next one."""
        token = getattr(self, "token", "")
        self.token, self.line = next(self._tokens, ("", 0))
        return token

    def _skip(self, token: str) -> bool:
        """Whether the current token is `token`, which is then passed over."""
        found = self.token == token
        if found:
            self._next()
        return found

    def _header(self, *, is_array: bool) -> KeyPath:
        """The table that a header begins, after its opening brackets."""
        line, parts = self.line, self._key()
        path: KeyPath = ()
        for part in parts[:-1]:
            path = self._last_element((*path, part))
            self.lines.setdefault(path, line)
        path = (*path, parts[-1])
        if is_array:
            self.lines.setdefault(path, line)
            self._elements[path] = self._elements.get(path, 0) + 1
            path = self._last_element(path)
        self.lines[path] = line
        while self._skip("]"):
            pass
        return path

    def _last_element(self, path: KeyPath) -> KeyPath:
        return (*path, self._elements[path] - 1) if path in self._elements else path

    def _key(self) -> list[str]:
        """The parts of a dotted key."""
        parts = [_unquoted(self._next())]
        while self._skip("."):
            parts.append(_unquoted(self._next()))
        return parts

    def _pair(self, table: KeyPath) -> None:
        """`key = value`, up to what follows it."""
        path = table
        line = self.line
        for part in self._key():
            path = (*path, part)
            self.lines.setdefault(path, line)
        self._skip("=")
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        if self._skip("["):
            for index in self._items("]"):
                self.lines[(*path, index)] = self.line
                self._value((*path, index))
        elif self._skip("{"):
            for _ in self._items("}"):
                self._pair(path)
        else:
            while self.token not in ("", ",", "]", "}", "\n"):
                self._next()

    def _items(self, closing: str) -> Iterator[int]:
        """Numbers the items of an array or an inline table; the caller reads each of them."""
        index = 0
        while True:
            while self._skip("\n") or self._skip(","):
                pass
            if self._skip(closing):
                return
            yield index
            index += 1


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    line = 1
    for found in _TOKEN.finditer(text):
        if found.lastgroup not in ("comment", "blank"):
            yield found[0], line
        line += found[0].count("\n")


def _unquoted(key: str) -> str:
    return next(iter(tomli.loads(f"{key} = 0"))) if key[0] in "\"'" else key
