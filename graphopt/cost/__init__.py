"""The cost of a training step, forecast without running it: parameters, FLOPs, saved activations, peak memory; whole and per block."""

from graphopt.cost.advice import Advice, advise, where_memory_is
from graphopt.cost.figures import BlockCost, Cost
from graphopt.cost.rates import Rates, measure_rates
from graphopt.cost.step import StepOptions, forecast, measure
from graphopt.errors import CostError

__all__ = ["Advice", "BlockCost", "Cost", "CostError", "Rates", "StepOptions"]
__all__ += ["advise", "forecast", "measure", "measure_rates", "where_memory_is"]
