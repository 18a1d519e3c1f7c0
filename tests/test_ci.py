"""The hosted checks run what a contributor can run: every command of the workflow exists here, on the versions that are supported."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
STEPS = [(job, step) for job, content in WORKFLOW["jobs"].items() for step in content["steps"]]
COMMANDS = sorted({command.strip() for _, step in STEPS if "run" in step for command in step["run"].split("&&")})


def known(words: list[str], extras: set[str]) -> bool:
    """Whether a command is one that this checkout, its project file or the system answers to."""
    match words:
        case ["make", *targets]:
            return bool(targets) and set(targets) <= TARGETS
        case ["python", "-m", "pytest", *arguments]:
            paths = [argument for argument in arguments if argument.startswith("tests/")]
            return bool(paths) and all((ROOT / path).exists() for path in paths)
        case ["python", "-m", "venv", ".venv"]:
            return True
        case ["python", "-m", "pip", "install", "-e", project]:
            return project.startswith(".[") and set(project[2:-1].split(",")) <= extras
        case [".venv/bin/pip", "install", *_]:
            return True
    return False


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command: str) -> None:
    words = shlex.split(re.sub(r"\$\{\{.*?\}\}", "VALUE", command))
    assert known(words, set(PROJECT["optional-dependencies"]))


def test_a_command_that_does_not_exist_is_found() -> None:
    for command in ("make tset", "make", "python -m pytest tests/nothing", 'python -m pip install -e ".[tset]"', "tox"):
        assert not known(shlex.split(command), {"test"}), command


def test_every_matrix_value_is_given_and_every_step_does_one_thing() -> None:
    for job, step in STEPS:
        assert ("run" in step) != ("uses" in step)
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])
        matrix = WORKFLOW["jobs"][job]["strategy"]["matrix"]
        rows = matrix.get("include", [matrix])
        for name in re.findall(r"\$\{\{ matrix\.(\w+) \}\}", str(step)):
            assert all(name in row for row in rows)


def test_all_tests_run_on_the_oldest_torch_and_python_that_are_supported() -> None:
    oldest = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["include"][0]
    for package in ("torch", "torchvision"):
        (lowest,) = (m[1] for d in PROJECT["dependencies"] if (m := re.match(rf"{package}\s*>=\s*([\d.]+)", d)))
        assert f"{package}=={lowest}.*" in oldest["torch"].split()
    assert PROJECT["requires-python"].startswith(f">={oldest['python']}")
    assert {"run": "make test"}.items() <= next(s for job, s in STEPS if job == "test" and s.get("run") == "make test").items()
