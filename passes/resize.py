"""resize: some epochs train on smaller images, at a fraction of the cost.

A step's cost goes with the number of pixels, and what a network learns first needs few of them. So training begins with small images and
ends with whole ones (progressive resizing; EfficientTrain, arXiv 2211.09703 and 2405.08768). The backbone is traced again for the phase's
size with the same parameters: position embeddings are resampled in the graph, masks of shifted windows and indices are made anew, windows
keep their size. The loader makes images of that size, for evaluation too. What is exported has the backbone's own size.

EfficientTrain's curriculum also keeps only the low frequencies of the first images and augments them less:

    [[pass]]
    use = "resize"
    size = 160
    how = "low-frequency"
    augment = { auto_augment = "rand-m1-mstd0.5-inc1" }
    when = { epoch = 0, until = 60 }

Several such passes, one after the other, make a curriculum; the last epochs should train at the backbone's own size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from graphopt import ActiveMatch, Effects, Match, Pass, PassError, RuntimeNeeds
from graphopt.compiler.pass_base import Candidate, ImageNeeds, Property
from graphopt.compiler.triggers import AtEpoch, Start

if TYPE_CHECKING:
    from collections.abc import Iterable

    from graphopt import Editor, Graph
    from graphopt.ir.inputs import Input

Side = Annotated[int, Field(ge=1, le=2**14, strict=True)]


class Resize(Pass):
    """Trains with images of another size.

    Attributes:
        size: height and width in pixels; one number for both.
        how: "scale": the loader prepares images of that size; "low-frequency": it prepares them at the backbone's size, and of their
            spectrum the lowest `size` frequencies in each direction are kept, which gives an image of that size.
        augment: keys of [data.augment] that have other values in these epochs; mixup and cutmix keep theirs.
        when: from which epoch, until which.

    The backbone must take the size: its patches divide it, and no parameter but a position embedding depends on it. Passes are matched
    again at each size, and must find the same regions.
    """

    name: ClassVar[str] = "resize"
    preserves: ClassVar[frozenset[Property]] = frozenset({"state-dict keys"})

    size: Side | tuple[Side, Side]
    how: Literal["scale", "low-frequency"] = "scale"
    augment: dict[str, Any] = {}

    def match(self, graph: Graph) -> Match[None]:
        from dataclasses import replace

        from graphopt.ir.inputs import image_of, show
        from graphopt.ir.regions import region_of

        tops = tuple(path for path in graph.paths if "." not in path)
        match: Match[None] = Match((replace(region_of(graph, tops), name="input"),))
        if image_of(graph.input) is None:
            match.refuse("input", f"the backbone takes {show(graph.input)}, no image", fix="Leave resize out")
        if fixed := sorted(key for key in self.augment if key.startswith(("mixup", "cutmix"))):
            match.refuse("augment", f"{' and '.join(fixed)} cannot change within a run", fix="Set it in [data.augment]")
        if isinstance(self.when, Start):
            match.warn("when", "no epoch trains or is evaluated at the backbone's own size, which is exported")
        return match

    def input(self, input: Input) -> Input:
        from graphopt.ir.inputs import image_of

        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        image = image_of(input)
        if image is None:
            return input
        if self.how == "low-frequency" and (height > image[1] or width > image[2]):
            what = f"an image of {image[1]}x{image[2]} has no {height}x{width} frequencies"
            raise PassError(what, where="size", fix='Use how = "scale"')
        return image[0], height, width

    def rewrite(self, edit: Editor, match: ActiveMatch[None]) -> Effects:
        # The graph has been traced at this size already (`input`).
        needs = ImageNeeds(low_frequency=self.how == "low-frequency", augment=self.augment)
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return Effects(needs=RuntimeNeeds(images=needs), figures={"height": height, "width": width})

    @classmethod
    def schedules(cls, graph: Graph, epochs: int) -> Iterable[Candidate]:
        from graphopt.ir.inputs import image_of

        image = image_of(graph.input)
        if image is None:
            return
        # Sides that strides and patches divide; a size that a backbone does not take even so is refused when it is tried.
        multiple = 32 if min(image[1:]) >= 128 else 4
        for share, part in ((0.8, 0.4), (0.8, 0.7), (0.65, 0.5), (0.65, 0.7), (0.5, 0.6), (0.5, 0.8), (0.5, 0.9)):
            height, width = (max(multiple, round(share * side / multiple) * multiple) for side in image[1:])
            until = round(part * epochs)
            if height < image[1] and width < image[2] and 0 < until < epochs:
                size = height if height == width else (height, width)
                yield Candidate(f"{height}x{width} pixels for {until} epochs", cls(size=size, when=AtEpoch(epoch=0, until=until)))
