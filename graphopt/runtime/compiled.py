"""What `torch.compile` leaves to Python."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch._compile

_disabled: Any = torch._compile._disable_dynamo  # as torch.compiler.disable, which takes most of a second to import the compiler

#: a decorator: torch.compile ends a graph before the function, and begins another behind it
outside: Callable[[Any], Any] = _disabled
#: the same of the function itself; functions that it calls are compiled, each by itself
outside_but_inner: Callable[[Any], Any] = partial(_disabled, recursive=False)
