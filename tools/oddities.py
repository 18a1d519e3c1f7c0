"""User-written backbones, each with one thing in its Python or its structure that a tracer or a rewrite can trip over.

`ODDITIES` has them by name, with the shape of one sample. Some cannot be compiled; those have to be refused with the reason.
"""

# Imported in the order of the table's rows: each registers its backbones.
import odd_forwards  # noqa: F401  # isort: skip
import odd_blocks  # noqa: F401  # isort: skip
import odd_structures  # noqa: F401  # isort: skip
from oddity import ODDITIES

__all__ = ["ODDITIES"]
