"""Sharded parameters: ranks train what one process trains, in every pass; checkpoints are those of one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import graphopt
from graphopt import Pass, Plan, RunError
from graphopt.passes.adapt import Adapt
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.drop import Drop
from graphopt.passes.factorize import Factorize
from graphopt.passes.freeze import Freeze
from graphopt.passes.share import Share
from graphopt.passes.supervise import Supervise
from graphopt.runtime.shards import is_sharded
from graphopt.train import export_run
from graphopt.train.feature_cache.prefix import OnFeatures
from graphopt.train.fsdp import Sharded
from graphopt.train.phase import Phase
from graphopt.train.preflight import problems
from graphopt.train.ranks import Ranks
from tests.distributed import runs
from tests.support.ranks import run_process, run_ranks

FRONT = Freeze(select=("stem", "blocks.0", "blocks.1"))
ADAMW = {"optimizer": {"name": "adamw", "lr": 0.002}}
CHANGES = [Freeze(select=("blocks.1",), when={"epoch": 1, "until": 2}), Drop(upto="blocks.0", cache="none", when={"epoch": 2})]
FREEZEOUT = Freeze(select=("stem", "blocks.0", "blocks.1"), when={"schedule": "freezeout"})
EXACT, ROUGH = runs.EXACT, 1e-7  # the factors of a mix are float32
Case = tuple[Sequence[Pass], dict[str, Any], float]
PLAIN: dict[str, Case] = {
    "freeze": ([FRONT], {"fsdp": {"offload": True}}, EXACT),
    "mix, clipped": ([Share(every=2, norm="mix", scalars="parameter")], {"accumulate": 2, "clip": 0.5}, ROUGH),
    "surrogate": ([Share(every=2, mode="surrogate")], {"fsdp": {"prefetch": 1}}, ROUGH),
    "drop": ([Drop(upto="blocks.1", cache="none")], {}, EXACT),
    "bypass": ([Drop(mode="bypass", select=("blocks.1", "blocks.3"), probability=0.5)], {"clip": 0.01, "clip_mode": "agc"}, EXACT),
    "checkpoint": ([Checkpoint(segments=2)], {"accumulate": 3, "clip": 0.1, "ema": 0.9, **ADAMW}, EXACT),
    "freezeout": ([FREEZEOUT], {"epochs": 2, **ADAMW}, EXACT),
    "phases": (CHANGES, {"epochs": 3, "ema": 0.9, **ADAMW}, EXACT),
    "adapt": ([Adapt(select=("blocks.0", "blocks.1"), rank=2)], {}, EXACT),
    "factorize": ([Factorize(select=("blocks.1",), rank=0.5)], ADAMW, EXACT),
}
SUPERVISED: dict[str, Case] = {
    "supervise": ([Supervise(modules=2)], {"fsdp": {"offload": True}}, EXACT),
    "freeze": (
        [FRONT, Supervise(modules=3, head="ahead", lookahead={"blocks": 1})],
        {"accumulate": 2, "ema": 0.9, "clip": 0.5, **ADAMW},
        EXACT,
    ),
    "share": ([Share(every=2), Supervise(modules=2)], {}, ROUGH),
    "phases": ([Supervise(modules=3), Freeze(select=FRONT.select, when={"epoch": 1})], {"epochs": 2}, EXACT),
}
ON_THREE = {"phases": PLAIN["phases"], "supervise": SUPERVISED["supervise"]}


def train_in_ranks(_rank: int, folder: Path, cases: dict[str, Case], plans: dict[str, Plan]) -> None:
    for name, (_, changes, _) in cases.items():
        runs.run(folder / name, **changes, strategy="fsdp", made=plans[name])


def train_all(folder: Path, cases: dict[str, Case], ranks: int) -> None:
    """By ranks, and then alone: all are forked from this process, which compiles each plan once."""
    plans = {name: runs.plan(passes) for name, (passes, *_) in cases.items()}
    run_ranks(train_in_ranks, folder / "many", cases, plans, ranks=ranks, forked=True)
    for name, (_, changes, _) in cases.items():
        runs.run(folder / "one" / name, **changes, made=plans[name])


@pytest.mark.parametrize(("cases", "ranks"), [(PLAIN, 2), (SUPERVISED, 2), (ON_THREE, 3)], ids=["passes", "supervise", "three ranks"])
def test_ranks_compute_what_one_process_computes(tmp_path: Path, cases: dict[str, Case], ranks: int) -> None:
    """Every tensor of the checkpoint: weights, optimizer state and averages, through phase changes; no gradient is missing."""
    assert run_process(train_all, tmp_path, cases, ranks, timeout=300) == 0
    for name, (_, _, within) in cases.items():
        one, many = (runs.saved(tmp_path / kind / name) for kind in ("one", "many"))
        for part in ("model", "optimizer", "ema"):
            assert runs.distance(one[part], many[part]) <= within, (name, part)


def test_a_run_goes_on_with_other_ranks_and_strategies(tmp_path: Path) -> None:
    """One epoch each, from checkpoints in parts where parameters are: fsdp on 2 ranks and on 3, ddp on 2, one process, fsdp on 2."""
    common = {"scheduler": "constant", "eval_every": 1, "ema": 0.9}
    folder = tmp_path / "changing"
    for epochs, (strategy, ranks) in enumerate([("fsdp", 2), ("fsdp", 3), ("ddp", 2)], 1):
        run_ranks(resume_with, str(folder), strategy, epochs, ranks=ranks)
    runs.run(folder, [Supervise(modules=2)], **common, epochs=4, resume=True)
    run_ranks(resume_with, str(folder), "fsdp", 5)
    runs.run(tmp_path / "one", [Supervise(modules=2)], **common, epochs=5)
    one, changing = runs.saved(tmp_path / "one"), runs.saved(folder)
    for part in ("model", "optimizer", "ema"):
        assert runs.distance(one[part], changing[part]) <= EXACT
    plan = runs.plan([Supervise(modules=2)])
    export_run(folder, tmp_path / "model.pt", which="last", plan=plan)
    runs.Net().load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))


def resume_with(_rank: int, folder: str, strategy: str, epochs: int) -> None:
    changes = {"scheduler": "constant", "eval_every": 1, "ema": 0.9, "strategy": strategy, "epochs": epochs, "checkpoint_format": "sharded"}
    runs.run(Path(folder), [Supervise(modules=2)], **changes, resume=epochs > 1)


def train_on_features(rank: int) -> None:
    torch.manual_seed(0)
    made = graphopt.compile(runs.Net(), [Drop(upto="blocks.1")], input=runs.SHAPE, verify="off", costs=False)
    images, ranks = torch.rand(2, *runs.SHAPE), Ranks.join(60).connected(torch.device("cpu"))
    strategy = Sharded.of(runs.settings(strategy="fsdp")).with_ranks(ranks)
    expected = made.module.eval()(images)
    features = made.prefix(images).detach()
    wrapped = strategy.wrap(OnFeatures(made.suffix), made)
    wrapped(features).sum().backward()
    gradients = {name: p.grad is not None for name, p in made.module.named_parameters() if p.requires_grad}
    assert all(given == (not name.startswith(("stem", "shift", "blocks.0", "blocks.1"))) for name, given in gradients.items())
    with torch.no_grad():
        assert torch.equal(strategy.evaluated(wrapped, made).eval()(images), expected)


def test_a_suffix_is_sharded_alone_and_evaluated_behind_its_prefix() -> None:
    run_ranks(train_on_features)


REFUSED: dict[str, dict[str, Any]] = {
    "float16": {"amp": "float16"},
    "compile": {"compile": True},
    "adafactor": {"optimizer": {"name": "adafactor", "lr": 0.01}},
    "fsdp.precision": {"fsdp": {"precision": "bfloat16"}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_do_not_go_with_sharded_parameters_are_refused(what: str) -> None:
    settings, made = runs.settings(strategy="fsdp", **REFUSED[what]), runs.plan([Supervise(modules=2)])
    with pytest.raises(RunError, match=what):
        Sharded.of(settings).check(made)
    if what != "fsdp.precision":  # of a single process, which computes in whole weights
        assert any(what in str(problem) for problem in problems(made, settings, runs.data()))


def look_inside(rank: int, folder: str) -> None:
    """Trains with a look at what each rank holds after the first step."""
    seen: dict[str, Any] = {}
    step = Phase.step

    def watched(phase: Phase, *arguments: Any) -> Any:
        found = step(phase, *arguments)
        parameters = phase._parameters()
        seen["kinds"] = {name: is_sharded(p) for name, p in parameters.items()}
        seen["alike"] = [p.detach().clone() for p in parameters.values() if not is_sharded(p)]
        seen["missing"] = [name for name, p in parameters.items() if p.requires_grad and p.grad is None]
        return found

    Phase.step = watched  # type: ignore[method-assign]
    runs.run(Path(folder), [Share(every=2, scalars="parameter"), Supervise(modules=2)], strategy="fsdp", epochs=1)
    assert all(kind == (".share." not in name) for name, kind in seen["kinds"].items())
    assert seen["alike"]
    assert not seen["missing"]
    together = torch.stack(seen["alike"])
    everywhere = [torch.empty_like(together) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everywhere, together)
    assert all(torch.equal(other, together) for other in everywhere)


def test_every_parameter_is_in_parts_but_scalars_which_are_equal_on_all_ranks(tmp_path: Path) -> None:
    run_ranks(look_inside, str(tmp_path / "run"))


def half_precision(_rank: int, folder: str) -> None:
    runs.run(Path(folder) / "policy", strategy="fsdp", epochs=1, fsdp={"precision": "bfloat16"})
    runs.run(Path(folder) / "autocast", [Supervise(modules=2)], strategy="fsdp", epochs=1, amp="bfloat16")


def test_half_precision_keeps_whole_weights_in_their_dtype(tmp_path: Path) -> None:
    run_ranks(half_precision, str(tmp_path))
    for name in ("policy", "autocast"):
        model = runs.saved(tmp_path / name)["model"]
        assert model["fc.weight"].dtype == torch.float64
