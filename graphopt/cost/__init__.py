"""What a training step costs, known before it is paid for: parameters, FLOPs, saved activations, peak memory; whole and per block."""

from graphopt.cost.advice import Advice, advise, where_memory_is
from graphopt.cost.errors import CostError
from graphopt.cost.figures import BlockCost, Cost
from graphopt.cost.run import PhaseCost, RunCost, integrate
from graphopt.cost.step import forecast, measure

__all__ = [
    "Advice",
    "BlockCost",
    "Cost",
    "CostError",
    "PhaseCost",
    "RunCost",
    "advise",
    "forecast",
    "integrate",
    "measure",
    "where_memory_is",
]
