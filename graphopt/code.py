"""Python code that a spec names: `package.module:name` or `file.py:name`. Whoever calls this has been told to trust it."""

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from graphopt.errors import GraphoptError, did_you_mean


class CodeError(GraphoptError):
    """Code that a spec names is not there, or does not import."""


def is_file(text: str) -> bool:
    """Whether a name is that of something in a file: `file.py:name`."""
    return text.rpartition(":")[0].endswith(".py")


def named(text: str, folders: Iterable[Path] = ()) -> Any:
    """The object that `package.module:name` or `file.py:name` means. Runs its code.

    Modules are looked for among the installed packages and in the working directory, files in `folders` and in the working directory.

    Raises:
        CodeError: it is neither form, nothing is there, it does not import, or it has nothing of that name.
    """
    home, colon, name = text.rpartition(":")
    if not colon or not home or not name:
        raise CodeError(f"{text!r} is not package.module:name or file.py:name")
    path = _found(home, folders) if is_file(text) else None
    if is_file(text) and path is None:
        raise CodeError(f"no file {home!r}", fix="It is looked for in the folder of the spec and in the working directory")
    value: Any = _of_file(path) if path is not None else _of_module(home)
    for part in name.split("."):
        if not hasattr(value, part):
            known = [key for key, member in vars(value).items() if callable(member) and not key.startswith("_")]
            raise CodeError(f"{home} has no {name!r}", fix=did_you_mean(part, known))
        value = getattr(value, part)
    return value


def located(text: str, folders: Iterable[Path] = ()) -> str:
    """`file.py:name` with the file's full path; as it is where it names a module, or no file is there."""
    home, _, name = text.rpartition(":")
    path = _found(home, folders) if is_file(text) else None
    return f"{path}:{name}" if path is not None else text


def _found(file: str, folders: Iterable[Path]) -> Path | None:
    places = (*(folder / file for folder in folders), Path(file))
    return next((path.resolve() for path in places if os.path.isfile(path)), None)


def _of_module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except GraphoptError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and name.startswith(error.name):
            fix = "It is looked for among the installed packages and in the working directory"
            raise CodeError(f"no Python module {name!r}", fix=fix) from error
        raise CodeError(f"{name} does not import: {type(error).__name__}: {error}") from error


@cache
def _of_file(path: Path) -> ModuleType:
    name = f"graphopt_code_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise CodeError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # where pydantic looks up annotations that are text (`from __future__ import annotations`)
    try:
        found.loader.exec_module(module)
    except GraphoptError:
        raise
    except Exception as error:
        raise CodeError(f"{path} does not import: {type(error).__name__}: {error}") from error
    return module
