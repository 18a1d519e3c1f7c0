"""Drawn compositions of passes on small backbones: each is refused with a reason, or compiles and does all it promises.

    python tools/fuzz_passes.py --count 200 --seed 1 --jobs 2 --out tools/tables/fuzz.md

A draw takes a backbone and one to four passes with selectors, triggers and options. It must be refused by a GraphoptError that names the
cause, or else pass every check of `graphopt.testing` in every phase of a short run, in which the runner's optimizer goes from phase to
phase. Anything else is a violation. It is reduced (passes and options are left out while it still fails) and written to
tests/fuzz_cases/, which the test suite replays.
"""

import argparse
import copy
import json
import multiprocessing
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fuzz_draws import BACKBONES, EPOCHS, Draw, Table, traced
from fuzz_table import Outcome, write_table

from graphopt.compiler.measure import measure_with
from graphopt.compiler.pass_base import PassInstance
from graphopt.compiler.pipeline import located, match_all
from graphopt.compiler.plan import Plan, Source, compile_phase
from graphopt.compiler.sizes import Sizes
from graphopt.compiler.triggers import Decision
from graphopt.cost.rates import Rates, TimedStep
from graphopt.errors import CostError, GraphoptError, VerifyError
from graphopt.ir.graph import Graph
from graphopt.spec import from_table
from graphopt.testing import Untouched, check_run
from graphopt.testing.checks import INEXPRESSIBLE
from graphopt.testing.steps import BATCH

ROOT = Path(__file__).parents[1]
CASES = ROOT / "tests" / "fuzz_cases"


def run(case: Table) -> Outcome:
    """Compiles a case and checks every phase of it."""
    input = BACKBONES[case["backbone"]][1]
    model, graph = traced(case["backbone"])
    untouched, stage = Untouched.of(model, str(graph.fx)), "refused"
    try:
        about = {"source": "python", "name": f"fuzz:{case['backbone']}", "input": list(input)}
        spec = from_table({"backbone": about, "pass": copy.deepcopy(case["pass"]), "train": {"epochs": EPOCHS}})
        matched = match_all(graph, [settled(PassInstance(value, i), graph) for i, value in enumerate(spec.passes)])
        sizes, costs_of = Sizes(model, graph, matched, compare=True), measure_with(2)
        own: dict[str, Any] = {"backbone": model, "base": graph, "matched": matched, "sizes": sizes}
        source = Source(**own, name="", digest=spec.digest, spec=spec, batch=2, measure=costs_of)
        torch.manual_seed(case["seed"])
        costs = case["seed"] % 8 == 0  # they take as long as all the rest
        plan = compile_phase(source, verify="full", costs=costs)
        stage = "refused later"
        for finding in check_run(case["backbone"], plan, untouched, epochs=EPOCHS, decide=decide, costs=costs):
            if finding.problem is not None:
                return Outcome("violation", f"{finding.check}: {finding.problem} (from epoch {finding.epoch:g})", finding.check)
            if finding.note.startswith(INEXPRESSIBLE) and not inexpressible(plan):
                return Outcome("violation", f"{finding.check}: {finding.note}", finding.check)
    except VerifyError as error:
        return Outcome("violation", f"verify: {error}", "verify")
    except GraphoptError as error:
        uses = {table["use"] for table in case["pass"]}
        if not error.what or not (any(use in str(error) for use in uses) or isinstance(error, CostError)):
            return Outcome("violation", f"the refusal names no pass: {error}", "refusal")
        return Outcome(stage, error.what)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome("violation", f"{type(error).__name__}: {error} ({Path(where.filename).name}, {where.name})", type(error).__name__)
    return Outcome("accepted")


def settled(instance: PassInstance, graph: Graph) -> PassInstance:
    """The pass with what depends on the machine decided, for a machine that is the same everywhere."""
    rates = Rates(flop=1e-9, byte=1e-9, kernel=1e-5, error=0.0, device="cpu")
    with located(instance):
        return replace(instance, value=instance.value.settle(graph, TimedStep(BATCH, lambda: rates)))


def decide(plan: Plan, epoch: int) -> list[Decision]:
    """Lets triggers that measure take a region or two more in each epoch: short runs give them no reason to."""
    found = []
    for progress in plan.progress():
        measured = not progress.instance.value.when.foreseeable and epoch > 0
        if measured and len(progress.active) < len(progress.names):
            taken = progress.names[len(progress.active) : len(progress.active) + 1 + epoch % 2]
            found.append(Decision(index=progress.instance.index, epoch=epoch, regions=taken))
    return found


def inexpressible(plan: Plan) -> bool:
    """Whether the backbone's architecture may have no place for a phase of the plan: surrogates or blurs."""
    return any(getattr(value, "mode", value.name) in ("surrogate", "blurpool") for value in plan.passes)


# -- reducing -----------------------------------------------------------------------------------------------------------------
def reduced(case: Table, kind: str) -> Table:
    """The smallest case that still fails in this way, found by leaving out passes and options."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(case):
            if run(candidate).kind == kind:
                case, smaller = candidate, True
                break
    return case


def _smaller(case: Table) -> Iterator[Table]:
    for i in range(len(case["pass"])):
        if len(case["pass"]) > 1:
            yield {**case, "pass": case["pass"][:i] + case["pass"][i + 1 :]}
    for i, table in enumerate(case["pass"]):
        for key in table:
            if key != "use":
                rest = {k: v for k, v in table.items() if k != key}
                yield {**case, "pass": [*case["pass"][:i], rest, *case["pass"][i + 1 :]]}
        if isinstance(table.get("select"), list) and len(table["select"]) > 1:
            for one in table["select"]:
                yield {**case, "pass": [*case["pass"][:i], {**table, "select": one}, *case["pass"][i + 1 :]]}
    if case["seed"] != 1:
        yield {**case, "seed": 1}


# -- the command --------------------------------------------------------------------------------------------------------------
def draw_and_run(task: tuple[int, int, str | None]) -> tuple[int, Table, Outcome]:
    seed, number, backbone = task
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", "Using a target size")
    case = Draw(f"{seed}:{number}", backbone).case()
    return number, case, run(case)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="number of draws")
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--backbone", choices=BACKBONES)
    parser.add_argument("--replay", type=Path, nargs="*", help="cases to run instead")
    parser.add_argument("--out", type=Path, help="add the result to this table")
    options = parser.parse_args()
    if options.replay:
        outcomes = [run(json.loads(path.read_text())) for path in options.replay]
        for path, outcome in zip(options.replay, outcomes, strict=True):
            print(f"{path}: {outcome.status} {outcome.reason}")
        return int(any(o.status == "violation" for o in outcomes))
    print(f"seed {options.seed}, draws {options.first} to {options.first + options.count - 1}", flush=True)
    tasks = [(options.seed, number, options.backbone) for number in range(options.first, options.first + options.count)]
    found: list[tuple[Table, Outcome]] = []
    if options.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            found = [_report(*result) for result in pool.imap_unordered(draw_and_run, tasks)]
    else:
        for task in tasks:
            found.append(_report(*draw_and_run(task)))
            if options.out and len(found) % 20 == 0:  # whoever stops it keeps what was done
                write_table(options, found, __doc__)
    violations = [(case, outcome) for case, outcome in found if outcome.status == "violation"]
    for case, outcome in violations:
        write_case(reduced(case, outcome.kind), outcome)
    counts = Counter(outcome.status for _, outcome in found)
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    if options.out:
        write_table(options, found, __doc__)
    return int(bool(violations))


def _report(number: int, case: Table, outcome: Outcome) -> tuple[Table, Outcome]:
    if outcome.status == "violation":
        print(f"draw {number}: {outcome.reason}\n  {json.dumps(case)}", flush=True)
    elif number % 50 == 49:
        print(f"... {number + 1}", flush=True)
    return case, outcome


def write_case(case: Table, outcome: Outcome) -> None:
    CASES.mkdir(exist_ok=True)
    name = "-".join([case["backbone"], *(table["use"] for table in case["pass"])])
    taken = [path.stem for path in CASES.glob(f"{name}*.json")]
    path = CASES / f"{name}-{len(taken) + 1}.json" if taken else CASES / f"{name}.json"
    path.write_text(json.dumps({"found": outcome.reason, **case}, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
