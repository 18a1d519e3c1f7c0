"""The flat training graph and everything that is known about it. Knows no pass, no cost and no spec.

An analysis is a function of a graph. `graph.cached(analysis)` keeps its result until the graph changes.
"""
