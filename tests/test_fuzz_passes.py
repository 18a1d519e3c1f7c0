"""A sample of the fuzzer's draws, and every case that it has found."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
CASES = sorted((ROOT / "tests" / "fuzz_cases").glob("*.json"))
SEED = 20
DRAWS = 10


@pytest.fixture(scope="module")
def fuzz_passes() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import fuzz_passes
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return fuzz_passes


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_a_case_that_once_failed(case: Path, fuzz_passes: ModuleType) -> None:
    outcome = fuzz_passes.run(json.loads(case.read_text()))
    assert outcome.status != "violation", outcome.reason


def test_drawn_compositions(fuzz_passes: ModuleType) -> None:
    found = [fuzz_passes.draw_and_run((SEED, number, None)) for number in range(DRAWS)]
    print(f"seed {SEED}, draws 0 to {DRAWS - 1}")
    broken = [f"draw {number}: {outcome.reason} {json.dumps(case)}" for number, case, outcome in found if outcome.status == "violation"]
    assert not broken, "\n".join(broken)
    assert {outcome.status for _, _, outcome in found} >= {"accepted", "refused"}
