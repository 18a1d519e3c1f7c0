"""From a training run of timm's script to a spec: `read` takes its args.yaml, `convert` makes the spec."""

from graphopt.timm_args.convert import Converted, convert, read
from graphopt.timm_args.options import GROUPS, OPTIONS, Option

__all__ = ["GROUPS", "OPTIONS", "Converted", "Option", "convert", "read"]
