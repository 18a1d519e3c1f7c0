"""A training run's arguments: read from YAML or KEY=VALUE, checked against the table of options, and what is said about them."""

from collections.abc import Iterable, Mapping
from typing import Any

from graphopt.errors import SpecError, did_you_mean
from graphopt.timm_args.options import OPTIONS, Option

_WORDS = {
    "text": "text",
    "integer": "a whole number",
    "number": "a number",
    "switch": "true or false",
    "table": "a table",
    "texts": "texts",
    "integers": "whole numbers",
    "numbers": "numbers",
}


class Arguments:
    """The value of every option, given or by default; collects what is refused, and what has no effect.

    Values are those of the script's own parser: a number in quotes is a number, and one value where several may be is a list of it.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.mistakes: list[SpecError] = []
        self.notes: dict[str, str] = {}
        self._values = {name: option.default for name, option in OPTIONS.items()}
        for name, value in given.items():
            name = str(name).replace("-", "_")
            option = OPTIONS.get(name)
            if option is not None:
                self._take(option, value)
            elif value in (None, False, "", 0, [], {}):
                self.notes[name] = "not an option that is known here, and off"
            else:
                fix = did_you_mean(name, OPTIONS) or f"If the run does well without it, leave it out: --set {name}=null"
                self.mistakes.append(SpecError("timm's training script has no such option, as far as is known here", where=name, fix=fix))

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def changed(self, name: str) -> bool:
        """Whether an option has another value than by default."""
        return bool(self._values[name] != OPTIONS[name].default)

    def refuse(self, name: str, why: str | None = None, fix: str | None = None) -> None:
        """Refuses the value of an option, for the reason in the table unless told another."""
        default = shown(OPTIONS[name].default)
        fix = fix or f"To do without it: --set {name}={default}"
        self.mistakes.append(SpecError(f"{shown(self[name])} is refused: {why or OPTIONS[name].refused}", where=name, fix=fix))

    def note(self, *names: str, why: str = "") -> None:
        """Says that options have no effect, those that are not at their defaults; for the reason in the table unless told another."""
        self.notes |= {name: f"no effect: {why or OPTIONS[name].unused}" for name in names if self.changed(name)}

    def chosen(self, *names: str) -> dict[str, Any]:
        """The values of options that have one, by their names."""
        return {name: self[name] for name in names if self[name] is not None}

    def settle(self, later: Iterable[str]) -> None:
        """Refuses or notes what the table alone decides: every option that sets no key, but for those that `later` names."""
        for option in OPTIONS.values():
            if option.keys or option.name in later or not self.changed(option.name):
                continue
            if option.refused:
                self.refuse(option.name)
            else:
                self.note(option.name)

    def _take(self, option: Option, value: Any) -> None:
        try:
            # Newer versions of the script leave the default of decay_epochs to the schedule.
            left = value is None and (option.default is None or option.name == "decay_epochs")
            self._values[option.name] = None if left else _coerced(value, option)
        except (TypeError, ValueError, OverflowError):  # the last of an infinite whole number
            self.mistakes.append(SpecError(f"expected {_WORDS[option.kind]}, found {value!r}", where=option.name))


def shown(value: Any) -> str:
    """A value as YAML has it, on one line."""
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _coerced(value: Any, option: Option) -> Any:
    """The value in the option's own kind; raises TypeError or ValueError for another."""
    kind, empty = option.kind, value is None
    if empty and option.kind != "switch":  # an empty entry of YAML
        return option.default
    if kind.endswith("s"):
        items = list(value) if isinstance(value, list | tuple) else [value]
        return [_one(item, kind[:-1]) for item in items]
    if kind == "table":
        if not isinstance(value, Mapping):
            raise TypeError
        return dict(value)
    return _one(value, kind)


def _one(value: Any, kind: str) -> Any:
    if kind == "switch":
        if not isinstance(value, bool):
            raise TypeError
        return value
    if isinstance(value, bool | list | tuple | Mapping):
        raise TypeError
    if kind == "text":
        return str(value)
    number = float(value)
    if kind == "integer" or (kind == "number" and isinstance(value, int)):
        if number != int(number):
            raise ValueError
        return int(number) if kind == "integer" else float(value)
    return number
