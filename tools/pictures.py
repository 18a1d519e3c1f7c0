"""The README's pictures, from real specs: `make pictures` writes docs/pictures/*.svg. The same specs give the same bytes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import graphopt
from graphopt.diff.phases import phase_diffs
from graphopt.diff.render.picture import to_svg

#: picture -> (installed spec, window it should fit)
PICTURES = {
    "freeze": ("freeze/resnet50-front-half", (1120, 620)),
    "share": ("replacement/repl-resnet32", (1120, 620)),
    "supervise": ("supervise/swin-t-by-stage", (1120, 620)),
    "drop": ("learn_and_drop/resnet50", (1120, 620)),
}


def main() -> None:
    """Draws all pictures, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(PICTURES), help=f"of {', '.join(PICTURES)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names:
        spec, (width, height) = PICTURES[name]
        torch.manual_seed(0)
        path = arguments.out / f"{name}.svg"
        path.write_text(to_svg(phase_diffs(graphopt.compile(None, spec, verify="off")), width=width, height=height), encoding="utf-8")
        print(f"{path}  from {spec}")


if __name__ == "__main__":
    main()
