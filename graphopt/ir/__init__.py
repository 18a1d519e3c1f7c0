"""The flat training graph and everything that is known about it. Knows no pass, no cost and no spec.

| file | what it holds |
|---|---|
| `graph.py` | `Graph`: the nodes, their origins, the sections, the cache of analyses |
| `section.py` | `Section`: nodes that run as one unit in the emitted module |
| `module.py` | `TrainingModule`: the `fx.GraphModule` that a graph holds and emits |
| `shapes.py` | the shape of every node, found on fake tensors |
| `paths.py` | module paths: ancestors, containment |
| `nodes.py` | facts about one node: parameters it reads, memory it writes and shares |
| `flow.py` | what comes before and after, what lies between, where every path crosses |
| `regions.py` | the nodes of a module path, or of a run of paths |
| `blocks.py` | the natural blocks of a backbone, and its division into disjoint parts |
| `partition.py` | a backbone as a chain of pieces, and where to cut it |
| `select.py` | selectors: from a glob or a table to regions |
| `patterns.py` | structures that recur: residual sums, attention |
| `editor.py` | `Editor`: the only way to change a graph |
| `printing.py` | a graph as text |

An analysis is a function of a graph. `graph.cached(analysis)` keeps its result until the graph changes.
"""
