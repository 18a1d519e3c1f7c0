"""What the process does once from which processes of tests are forked: the first steps of a run take longer than most tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.distributed import runs

# Autograd starts its threads when it is used first, one per GPU; under a FakeTensorMode it takes one for there. They do not outlive a fork.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.ones(1, requires_grad=True).sum().backward()
torch.set_num_threads(1)
with TemporaryDirectory() as folder:
    runs.run(Path(folder) / "run")

# What is loaded stays: the collector of a forked process need not go through it, and so leaves its memory shared.
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 10, 10)
