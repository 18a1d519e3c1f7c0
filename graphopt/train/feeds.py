"""The batches of a run, at the size that each phase takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from graphopt.compiler.pass_base import ImageNeeds
from graphopt.data.loader import Data, ImageFeed, prepared
from graphopt.errors import RunError
from graphopt.ir.inputs import Input, image_of
from graphopt.spec import AugmentSpec, DataSpec, TrainSpec


@dataclass
class Feeds:
    """Training and evaluation images: first those of the backbone's own size, later those that the current phase takes.

    Attributes:
        data: the opened data set, prepared for the shape `own`. spec: its settings; None for data that was made in code.
        loading: options of an `ImageFeed`.
        images, evaluation: the feeds of the current size; there is one pair of them at a time.
    """

    settings: TrainSpec
    data: Data
    spec: DataSpec | None
    own: tuple[int, ...]
    loading: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._is: tuple[Input, ImageNeeds] = self.own, ImageNeeds()
        self.images, self.evaluation = self._feeds(self.data)

    def use(self, input: Input, needs: ImageNeeds | None) -> None:
        """Prepares images for a network that takes `input`; feeds of another size are closed.

        Raises RunError for data made in code, which has one size, and for keys of an augmentation that there are not.
        """
        wanted = input, needs or ImageNeeds()
        if wanted == self._is:
            return
        data = self.prepared(*wanted)
        self.close()
        self._is = wanted
        self.images, self.evaluation = self._feeds(data)

    def prepared(self, input: Input, needs: ImageNeeds | None) -> Data:
        """The data, prepared so. Raises RunError if it cannot be."""
        wanted = input, needs or ImageNeeds()
        return self.data if wanted == (self.own, ImageNeeds()) else self._prepared(*wanted)

    def _prepared(self, input: Input, needs: ImageNeeds) -> Data:
        image = image_of(input)
        if self.spec is None or image is None:
            what = "the images were prepared in code, for one size; a pass asks for others"
            raise RunError(what, where="data", fix="Give the run a DataSpec, or leave resize out")
        try:
            augment = AugmentSpec.model_validate({**self.spec.augment.model_dump(), **needs.augment})
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, problem["loc"]))
            raise RunError(f"augment of a pass: {name}: {problem['msg']}", where="data.augment", fix="See [data.augment]") from None
        spec = self.spec.model_copy(update={"augment": augment})
        low = (image[1], image[2]) if needs.low_frequency else None
        return prepared(self.data, spec, self.own if low else image, low)

    def _feeds(self, data: Data) -> tuple[ImageFeed, ImageFeed]:
        settings = self.settings
        images = ImageFeed(data.train, settings.batch, seed=settings.seed, **self.loading)
        return images, ImageFeed(data.evaluation, settings.batch, shuffle=False, **self.loading)

    def close(self) -> None:
        """Ends the loader processes."""
        self.images.close()
        self.evaluation.close()
