"""From passes and a graph to a plan. Never imports the spec, a pass, or the runner.

| file | what it holds |
|---|---|
| `pass_base.py` | `Pass` and what passes take and return |
| `triggers.py`, `scores.py` | when a pass fires, and the measurements that some triggers read |
| `registry.py` | installed passes, found by entry point |
| `verify.py` | the properties that a pass can promise, and their checks |
| `pipeline.py` | decide, rewrite, verify, measure: one pass after the other |
| `emit.py` | the flat graph becomes the module that trains |
| `measure.py` | costs of one training step around each pass |
| `plan.py`, `report.py` | the result, and all later phases of it |
"""
