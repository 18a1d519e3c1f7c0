"""Drawn compositions of passes on small backbones: each is refused with a reason, or compiles and does all it promises.

    python tools/fuzz_passes.py --count 200 --seed 1 --jobs 2 --out tools/tables/fuzz.md

A draw takes a backbone and one to four passes with selectors, triggers and options. It must be refused by a GraphoptError that names the
cause, or else, in every phase of a short run: compile and verify fully, train two steps with finite gradients on everything trainable and
on nothing else, leave what is frozen as it was, survive a deep copy, give its state to a fresh plan (by state dict and by file), export
weights that compute the same in the untouched backbone, and take them back. Anything else is a violation. It is reduced (passes and
options are left out while it still fails) and written to tests/fuzz_cases/, which the test suite replays.
"""

import argparse
import copy
import json
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from fuzz_draws import BACKBONES, EPOCHS, Draw, Table, traced
from fuzz_table import Outcome, write_table
from torch import Tensor, nn

from graphopt.compiler.measure import measure_with
from graphopt.compiler.pass_base import ALL_PROPERTIES, PassInstance, Severity, Status
from graphopt.compiler.pipeline import located, match_all
from graphopt.compiler.plan import Plan, Source, compile_phase
from graphopt.compiler.sizes import Sizes
from graphopt.compiler.triggers import Decision
from graphopt.cost.rates import Rates, TimedStep
from graphopt.errors import CostError, GraphoptError, VerifyError
from graphopt.ir.graph import Graph
from graphopt.ir.paths import is_below
from graphopt.ir.shapes import tensors_in
from graphopt.plan_file import packed, read_plan_file
from graphopt.spec import from_table

ROOT = Path(__file__).parents[1]
CASES = ROOT / "tests" / "fuzz_cases"
#: samples of a training step
BATCH = 5


class Violation(Exception):
    """A promise that was not kept: of what kind, and how."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


def require(holds: bool, kind: str, text: str) -> None:
    if not holds:
        raise Violation(kind, text)


def run(case: Table) -> Outcome:
    """Compiles a case and checks every phase of it."""
    build, input = BACKBONES[case["backbone"]]
    model, graph = traced(case["backbone"])
    before, text = {k: v.clone() for k, v in model.state_dict().items()}, str(graph.fx)
    stage = "refused"
    try:
        about = {"source": "python", "name": f"fuzz:{case['backbone']}", "input": list(input)}
        spec = from_table({"backbone": about, "pass": copy.deepcopy(case["pass"]), "train": {"epochs": EPOCHS}})
        matched = match_all(graph, [settled(PassInstance(value, i), graph) for i, value in enumerate(spec.passes)])
        own = {"backbone": model, "base": graph, "matched": matched, "sizes": Sizes(model, graph, matched, compare=True)}
        source = Source(**own, name="", digest=spec.digest, spec=spec, batch=2, measure=measure_with(2))
        torch.manual_seed(case["seed"])
        plan = compile_phase(source, verify="full", costs=case["seed"] % 8 == 0)
        stage = "refused later"
        for phase in phases(plan):
            check_phase(plan, phase, build, input, case["seed"])
        state = model.state_dict()
        require(state.keys() == before.keys(), "model changed", "its keys")
        moved = [k for k, v in before.items() if not torch.equal(torch.nan_to_num(v), torch.nan_to_num(state[k]))]
        require(not moved, "model changed", ", ".join(moved[:3]))
        require(str(graph.fx) == text, "model changed", "its graph")
    except Violation as violation:
        return Outcome("violation", str(violation), violation.kind)
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


def phases(plan: Plan) -> Iterator[Plan]:
    """The plan in each phase of a run, trained in between by whoever takes it; measured triggers take a region more in each epoch."""
    yield plan
    for epoch in sorted({*range(EPOCHS), *plan.moments(EPOCHS)}):
        due = list(plan.due(epoch, None, EPOCHS))
        for progress in plan.progress():
            measured = not progress.instance.value.when.foreseeable and epoch in range(1, EPOCHS)
            if measured and len(progress.active) < len(progress.names):
                taken = progress.names[len(progress.active) : len(progress.active) + 1 + int(epoch) % 2]
                due.append(Decision(index=progress.instance.index, epoch=epoch, regions=taken))
        if due:
            earlier, plan = plan, plan.advance_to((*plan.decisions, *due), verify="full")
            changed = [plan.passes[index] for index in {d.index for d in due}]
            same = earlier.base.input == plan.base.input and all("eval output" in value.preserved_properties() for value in changed)
            if same and _exports(earlier) and _exports(plan):
                require(
                    _close(_evaluate(earlier, plan), 1e-4), "weights carried over", f"at epoch {epoch} the network computes something else"
                )
            yield plan


def _evaluate(*plans: Plan) -> list[list[Tensor]]:
    x = torch.rand(2, *plans[0].base.input, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return [[t.clone() for t in tensors_in(copy.deepcopy(plan.module).eval()(x))] for plan in plans]


def _close(pair: list[list[Tensor]], tolerance: float) -> bool:
    one, other = pair
    distances = [((a - b).abs().max() / a.abs().max().clamp_min(1e-12)).item() for a, b in zip(one, other, strict=True)]
    return all(d <= tolerance for d in distances)


def _exports(plan: Plan) -> bool:
    """Whether the backbone's architecture can express the plan: not with surrogates or blurs in it."""
    kinds = ((getattr(value, "mode", value.name), effect) for value, effect in zip(plan.passes, plan.effects, strict=True))
    return not any(kind in ("surrogate", "blurpool") and effect is not None and effect.regions for kind, effect in kinds)


def step(plan: Plan, module: nn.Module, x: Tensor, *, seed: int) -> float:
    """One forward and backward in train mode; gradients are replaced."""
    module.train()
    for parameter in module.parameters():
        parameter.grad = None
    torch.manual_seed(seed)
    loss = torch.zeros(())
    if plan.needs.targets:
        classes = next(m.classes for m in module.modules() if type(m).__name__ == "Auxiliary")
        output, loss = module(x, torch.arange(len(x)) % classes)
    else:
        output = module(x)
    for tensor in tensors_in(output):
        if tensor.requires_grad:
            loss = loss + F.log_softmax(tensor.float().flatten(1), 1).square().mean()
    require(bool(loss.isfinite()), "loss", f"the loss is {loss.item()}")
    require(loss.requires_grad, "gradients", "the loss depends on nothing that trains")
    loss.backward()
    return loss.item()


def check_phase(start: Plan, plan: Plan, build: Callable[[], nn.Module], input: tuple[int, ...], seed: int) -> None:
    """One phase keeps every promise. Trains it by two steps."""
    json.dumps(plan.report.to_dict())
    x = torch.rand(BATCH, *plan.base.input, generator=torch.Generator().manual_seed(seed))
    _check_as_backbone(plan, x, seed)
    module, other = plan.module, copy.deepcopy(plan.module)
    losses = [step(plan, m, x, seed=seed) for m in (module, other)]
    require(losses[0] == losses[1], "deep copy", f"the loss is {losses[1]}, not {losses[0]}")
    copies = dict(other.named_parameters())
    for name, parameter in module.named_parameters():
        gradient, copied = parameter.grad, copies[name].grad
        if not parameter.requires_grad:
            require(gradient is None, "gradients", f"{name} does not train and has one")
        elif name not in plan.graph.unused:
            require(gradient is not None, "gradients", f"{name} trains and has none")
        if gradient is not None:
            require(bool(gradient.isfinite().all()), "gradients", f"that of {name} is not finite")
            require(copied is not None and torch.equal(gradient, copied), "deep copy", f"the gradient of {name} differs")
    held = _held(plan)
    # Small: with frozen norms that have seen no image, a fresh network's gradients are large.
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    optimizer.step()
    step(plan, module, x, seed=seed + 1)
    optimizer.step()
    after = _state(plan)
    for name, value in held.items():
        require(torch.equal(value, after[name].cpu()), "frozen", f"{name} moved")
    fresh = _check_file(start, plan, x, seed)
    _check_export(plan, fresh, build, input)
    if plan.needs.features is not None:
        _check_features(plan, x)


def _check_as_backbone(plan: Plan, x: Tensor, seed: int) -> None:
    """Where all passes preserve everything, a training step is the backbone's own, buffers included."""
    if any(e is not None and value.preserved_properties() != ALL_PROPERTIES for value, e in zip(plan.passes, plan.effects, strict=True)):
        return
    one, other = copy.deepcopy(plan.module), plan.export()
    losses = [step(plan, module, x, seed=seed) for module in (one, other)]
    require(losses[0] == losses[1], "as the backbone", f"the loss is {losses[0]}, not {losses[1]}")
    for name, value in (*other.named_buffers(), *((n, p.grad) for n, p in other.named_parameters() if p.grad is not None)):
        mine = one.get_parameter(name).grad if name not in dict(one.named_buffers()) else one.get_buffer(name)
        require(mine is not None and torch.equal(value, mine), "as the backbone", f"{name} or its gradient differs after a step")


def _state(plan: Plan) -> dict[str, Tensor]:
    """What the plan's module holds, and what it no longer has of the backbone."""
    return {**(plan.export_state() if _exports(plan) else {}), **plan.module.state_dict()}


def _held(plan: Plan) -> dict[str, Tensor]:
    """What must stay as it is: all that does not train, and everything in regions that were frozen or dropped."""
    state = _state(plan)
    names = {n for n, p in plan.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    reports = (d for report in plan.report.passes for d in report.diagnostics if d.severity is Severity.WARNING)
    moving = {d.location for d in reports if "is not frozen" in d.message}
    excused = [p for m in plan.matched for region in m.match.regions if region.name in moving for p in region.paths]
    for matched, effect in zip(plan.matched, plan.effects, strict=True):
        for region in matched.match.regions:
            status = effect.statuses.get(region.name) if effect is not None else None
            if status is not None and status.status in (Status.FROZEN, Status.DROPPED):
                names |= {n for n in plan.base.module.state_dict() if any(n.startswith(f"{p}.") for p in region.paths)}
    return {n: state[n].cpu().clone() for n in names if n in state and not is_below(n, excused)}


def _check_file(start: Plan, plan: Plan, x: Tensor, seed: int) -> Plan:
    """The plan that a file gives goes on as this one does; also from another phase of it, and through its state dict."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.safetensors"
        file.write_bytes(packed(plan))
        reread = read_plan_file(file, plan=start)
    taken = copy.deepcopy(plan.module)
    expected, found = (step(plan, module, x, seed=seed) for module in (taken, reread.module))
    require(found == expected, "plan file", f"the loss is {found}, not {expected}")
    reread.module.load_state_dict(taken.state_dict(), strict=True)
    return reread


def _check_export(plan: Plan, fresh: Plan, build: Callable[[], nn.Module], input: tuple[int, ...]) -> None:
    if not _exports(plan):
        try:
            plan.export()
        except GraphoptError:
            return
        raise Violation("export", "what the backbone has not was exported")
    state = plan.export_state()
    backbone = build()
    backbone.load_state_dict(state, strict=True)
    if plan.base.input == input:  # at another size, the plan's network is not the one that is exported
        x = torch.rand(2, *input, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            exported = tensors_in(backbone.eval()(x))
        require(_close([exported, *_evaluate(plan)], 1e-4), "export", "the backbone computes something else")
    fresh.load_backbone(state)
    # The scalars of mixes are fitted to the exported weights, in float32; everything else is read back as it is.
    mixed = any(value.name == "share" and effect is not None for value, effect in zip(plan.passes, plan.effects, strict=True))
    require(_close(_evaluate(plan, fresh), 1e-2 if mixed else 1e-4), "reload", "the plan computes something else with its own export")


def _check_features(plan: Plan, x: Tensor) -> None:
    """Prefix and suffix, one after the other, are the whole."""
    whole = copy.deepcopy(plan.module)
    expected = step(plan, whole, x, seed=7)
    gradients = {n: p.grad for n, p in whole.named_parameters()}
    other = plan.advance_to(plan.decisions, verify="off")
    found = step(plan, other.suffix, other.prefix(x), seed=7)
    require(found == expected, "features", f"the loss is {found}, not {expected}")
    for name, parameter in other.suffix.named_parameters():
        gradient = gradients[name]
        same = parameter.grad is None if gradient is None else parameter.grad is not None and torch.equal(gradient, parameter.grad)
        require(same, "features", f"the gradient of {name} differs")


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
