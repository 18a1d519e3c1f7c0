"""What a training step costs, known before it is paid for: parameters, FLOPs, saved activations, peak memory; whole and per block."""

from graphopt.cost.errors import CostError
from graphopt.cost.figures import BlockCost, Cost
from graphopt.cost.step import forecast, measure

__all__ = ["BlockCost", "Cost", "CostError", "forecast", "measure"]
