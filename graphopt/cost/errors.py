"""What can go wrong when a step is forecast."""

from graphopt.errors import GraphoptError


class CostError(GraphoptError):
    """A training step cannot be forecast."""
