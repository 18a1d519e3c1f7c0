"""The runner: trains a plan, knows no pass by name.

`train(spec_or_plan, out)` makes a run folder; `export_run(folder, path)` takes the ordinary checkpoint out of it, `load_run(folder)`
the plan.
"""

from graphopt.data.loader import Batch, Data, Feed, Samples, open_data
from graphopt.train.export import export_run, load_run
from graphopt.train.run import Stopped, train
from graphopt.train.state import EpochRecord, History, Summary

__all__ = [
    "Batch",
    "Data",
    "EpochRecord",
    "Feed",
    "History",
    "Samples",
    "Stopped",
    "Summary",
    "export_run",
    "load_run",
    "open_data",
    "train",
]
