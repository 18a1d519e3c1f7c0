"""Changed specs: cases that once failed, and a sample of `tools/fuzz_specs.py`, whose 10,000 are `make fuzz`."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tomli

from graphopt.compiler import registry
from tests.support.ranks import run_process

ROOT = Path(__file__).parents[1]
CASES = sorted((ROOT / "tests" / "fuzz_cases" / "specs").glob("*.toml"))


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """The tool, as a module."""
    found = importlib.util.spec_from_file_location("fuzz_specs", ROOT / "tools" / "fuzz_specs.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_a_case_that_failed_once_is_read_or_refused(fuzz: ModuleType, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    checked = text.startswith(fuzz.CHECKED)
    found = fuzz.outcome(text, checked)
    assert found in (("ok", "refused") if checked else ("accepted", "refused", "not TOML"))


def test_a_sample_of_changed_specs_is_read_or_refused(fuzz: ModuleType) -> None:
    seed = 1
    texts = {f"seed {seed}, case {number}": fuzz.case(seed, number) for number in range(100)}
    found = {name: fuzz.outcome(text, checked=False) for name, text in texts.items()}
    assert {name: what for name, what in found.items() if what not in ("accepted", "refused", "not TOML")} == {}
    accepted = [name for name, what in found.items() if what == "accepted" and "resnet8" in texts[name]]
    assert len(accepted) >= 3
    checked = {name: fuzz.outcome(texts[name], checked=True) for name in accepted[:3]}
    assert set(checked.values()) <= {"ok", "refused"}, checked


def test_every_installed_pass_is_in_the_specs_that_are_changed() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import spec_changes

    assert {tomli.loads(text)["use"] for text in spec_changes.PASSES} == set(registry.names())


def test_a_case_is_the_same_on_any_machine(fuzz: ModuleType) -> None:
    assert fuzz.case(1, 5) == fuzz.case(1, 5)
    assert len({fuzz.case(1, number) for number in range(20)}) > 15


def _read(text: str) -> tuple[str, None]:
    if text == "die":
        os._exit(3)
    while text == "spin":
        pass
    return "refused", None


def _faults(out: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import fuzz_specs as fuzz

    fuzz.READ_SECONDS, fuzz.read, fuzz.check = 1, _read, lambda text: "refused"
    out.write_text(" ".join(what.partition(":")[0] for _, what, _ in fuzz.run(["a", "die", "b", "spin", "c"], checked=False)))


def test_a_fault_of_one_case_does_not_reach_the_next(tmp_path: Path) -> None:
    """A process that dies, and one that never ends, are reported as such. Forked from a fresh process, as the tool's are."""
    assert run_process(_faults, tmp_path / "found") == 0
    assert (tmp_path / "found").read_text().split() == ["refused", "fault", "refused", "hang", "refused"]
