"""The runs that `tools/chaos.py` kills: the small run on two ranks, with a ledger and a supervised phase that ends, in several kinds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import RLock

import small_run
import torch
from tqdm import tqdm

RANKS = 2
#: a file beside the run's folder, where its ranks were forked and one has finished
ENDED = "ended"
#: five phases, three steps per epoch (two samples are left over), and a checkpoint after each
SPEC = (
    small_run.SPEC.replace("batch = 5", "batch = 4")
    .replace("train_limit = 20", "train_limit = 14")
    .replace("epochs = 4", "epochs = 6")
    .replace("checkpoint_steps = 3", "checkpoint_steps = 1")
    .replace('cuts = ["two"]', 'cuts = ["two"]\nwhen = { epoch = 0, until = 4 }')
)
STEPS = 18
_PARTS = SPEC + 'strategy = "fsdp"\ncheckpoint_format = "sharded"\n'
#: specs by what is particular about a run
KINDS = {
    "ddp": SPEC,
    "ddp, loader processes": SPEC.replace("eval_limit = 10", "eval_limit = 10\nworkers = 1"),
    "fsdp, in parts": _PARTS,
    "fsdp, in parts, while training goes on": _PARTS + "checkpoint_async = true\n",
    # Modules that are gradient-isolated to the end: each of the two ranks trains one.
    "modules": SPEC.replace("\nwhen = { epoch = 0, until = 4 }", "") + 'strategy = "modules"\n',
}


@cache
def run(kind: str) -> small_run.SmallRun:
    """The compiled run; processes that are forked from this one share it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = small_run.SmallRun(KINDS[kind])
    made.plan = replace(made.plan, measure=None)  # forecasts would take most of a short run's time
    return made


def rank(folder: str, kind: str) -> None:
    """What each rank does, from the start or started again."""
    torch.set_num_threads(1)
    # Forked ranks share the lock of the progress bars that torch.fx makes; one that is killed would never give it back.
    tqdm.set_lock(RLock())
    run(kind).train(Path(folder))
    # From here on ranks tell the agent of their end under locks that they share with it: one that is killed would never give them back.
    Path(folder).with_name(ENDED).touch()
