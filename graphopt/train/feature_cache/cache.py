"""Features in the place of images: what a dropped prefix computed, kept, and fed to what is left to train.

R6: features are kept only when the prefix is frozen and in eval semantics and every sample's input is the same each time. Each of the three
is looked at, not believed. An entry's key is a hash of the prefix (its graph and every tensor in it), of the data and its transform, of
dtype and precision, and of the entry that it was filled from; so a stale one has another name and is never found.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.compiler.emit import emit
from graphopt.compiler.plan import Plan
from graphopt.data.loader import Batch, Feed, ImageFeed, Samples, epoch_order
from graphopt.errors import RunError
from graphopt.train.feature_cache.keys import between, hashed, key_of, row_bytes, tensors
from graphopt.train.feature_cache.store import MARK, FileFill, Folder, Layout, MemoryFill, Store, bits
from graphopt.train.strategy import Strategy
from graphopt.units import show_size

#: batches that are timed before it is decided whether a cache is worth having
TRIAL = 4
#: batches that are read ahead of the step
AHEAD = 2


class OnFeatures(nn.Module):
    """What is left to train, given features as they are kept; it computes in float32 (autocast aside)."""

    def __init__(self, suffix: nn.Module) -> None:
        super().__init__()
        self.suffix = suffix

    def forward(self, features: Tensor, *more: Any) -> Any:
        return self.suffix(features.float(), *more)


class FeatureFeed:
    """Training batches of kept features, in the order that images would come in. Batches are read ahead in a thread."""

    def __init__(
        self, store: Store, batch: int, batches: int, *, seed: int, views: int = 1, pin: bool = False, rank: int = 0, world: int = 1
    ) -> None:
        self.store, self._batch, self._batches, self._seed = store, batch, batches, seed
        self._views, self._pin, self._rank, self._world = views, pin, rank, world
        self.count = store.layout.rows // views

    def __len__(self) -> int:
        return self._batches

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Feed.batches`. A sample's views come in turn, epoch by epoch."""
        order = torch.tensor(epoch_order(self.count, self._seed, epoch))[self._rank :: self._world]

        def load(number: int) -> Batch:
            index = order[number * self._batch : (number + 1) * self._batch]
            rows = index + (epoch + index) % self._views * self.count
            features = self.store.features.index_select(0, rows)
            return Batch(index, features.pin_memory() if self._pin else features, self.store.targets[rows])

        with ThreadPoolExecutor(1, thread_name_prefix="features") as pool:
            ahead: deque[Future[Batch]] = deque()
            for number in range(start, self._batches):
                ahead.append(pool.submit(load, number))
                if len(ahead) > AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


class _Declined(Exception):
    """The features will not be kept; the message says why."""


@dataclass(frozen=True)
class _Cut:
    """A cut of a plan as it is kept: its node, options, and the key and layout of its entry."""

    node: fx.Node
    options: Mapping[str, Any]
    layout: Layout
    views: int


class Keeper:
    """Keeps the features of one run, one entry at a time.

    Args:
        samples: of training. images: their feed, whose order and batches features follow.
        folder: where entries on disk go, unless the pass names its own. digest: the run's.
        identity: the data and its transform, as plain values.
        progress: called with (rows done, rows) while an entry is filled; may raise to stop. say: called with a line for people.
        clock: what reading and computing are timed with.
    """

    def __init__(
        self,
        samples: Samples,
        images: ImageFeed,
        strategy: Strategy,
        *,
        folder: Path,
        digest: str,
        identity: Mapping[str, Any],
        batch: int,
        seed: int,
        workers: int = 0,
        mixed: bool = False,
        progress: Callable[[int, int], None] = lambda done, rows: None,
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.samples, self.images, self.strategy = samples, images, strategy
        self.folder, self.digest, self.identity = folder, digest, dict(identity)
        self.batch, self.seed, self.workers, self.mixed = batch, seed, workers, mixed
        self.progress, self.say, self.clock = progress, say, clock
        self._held: tuple[str, Store] | None = None
        #: what the last decision about a cache came to, for the run's log
        self.told: dict[str, Any] = {}

    # -- before the run -----------------------------------------------------------------------------------------------------
    def check(self, plan: Plan) -> None:
        """What can be known before the first step. Raises RunError: an input that is not the same each time, a limit under one batch."""
        for item in plan.source.matched:
            options = item.match.feature_options
            if options is None:
                continue
            self._demand_same_inputs(options)
            limit = options.get("limit")
            dtype = getattr(torch, options["dtype"])
            rows = [row_bytes(r.exits[0], dtype) for r in item.match.regions]
            if limit is not None and rows and limit < self.batch * min(rows):
                raise RunError(
                    f"limit = {show_size(limit)} is smaller than one batch of features ({show_size(self.batch * min(rows))} at least)",
                    where=item.instance.label,
                    fix="Raise it, or drop the prefix without a cache.",
                )

    def _demand_same_inputs(self, options: Mapping[str, Any]) -> None:
        if self.mixed:
            raise RunError(
                "mixup and CutMix make new inputs of every batch: what a prefix computes of them cannot be kept (R6)",
                where="data.augment",
                fix='Leave them out, or run the prefix every time (cache = "none").',
            )
        if not self.samples.deterministic and not options.get("views"):
            raise RunError(
                "random augmentation gives a sample another input every epoch: what a prefix computes of it cannot be kept (R6)",
                where="data.augment",
                fix='Keep fixed views of each sample (views = 4), or run the prefix every time (cache = "none").',
            )
        for view in range(options.get("views") or 1):
            once, again = (self.samples[(view, 0)][1] for _ in range(2))
            if not torch.equal(once, again):
                raise RunError(
                    "the transform gives another input each time it is asked for the same view of a sample (R6)",
                    where="data",
                    fix="Let it draw from torch's, numpy's or Python's own generators only.",
                )

    # -- at the start of a phase --------------------------------------------------------------------------------------------
    def ready(self, plan: Plan, record: Mapping[str, Any]) -> tuple[Feed, nn.Module, dict[str, Any]]:
        """The feed and the module that a phase trains with, and what to remember of it.

        Features are found, or filled: from those of the phase before where there are such, else from the images. Where they cannot
        or should not be kept, the whole module runs on images, its prefix under no_grad; that loses time and nothing else.

        Args:
            record: of the phase before, or, when a run is resumed, of this very phase (then its choice stands).
        """
        cut = plan.needs.features
        if cut is None:
            self._held = None
            return self.images, plan.module, {}
        route = list(record.get("route", []))
        resumed = record.get("cut") == cut.node.name
        self.told = {"cut": cut.region}
        if not resumed:
            route.append(cut.node.name)
        declined = "it was decided so before" if resumed and not record["kept"] else None
        # R5: the first rank finds out; the others then find the entry, or do without as well.
        why = self.strategy.agree(lambda: declined or self._reason_against(plan, route, resumed))
        if why is None and not self.strategy.first:
            why = self._reason_against(plan, route, True)
        if why is not None or self._held is None:
            self._held = None
            self.told |= {"kept": False, "why": why}
            self.say(f"features of {cut.region} are not kept: {why}; its prefix runs every step, without gradients")
            # The next cut starts from the images again.
            return self.images, plan.module, {"cut": cut.node.name, "kept": False, "route": []}
        store = self._held[1]
        self.told |= {"kept": True, "bytes": store.layout.bytes}
        feed = FeatureFeed(
            store,
            self.batch,
            len(self.images),
            seed=self.seed,
            views=cut.options.get("views") or 1,
            pin=self.strategy.device.type == "cuda",
            rank=self.strategy.rank,
            world=self.strategy.world,
        )
        return feed, OnFeatures(plan.suffix), {"cut": cut.node.name, "kept": True, "route": route}

    def close(self) -> None:
        """The run is over: what it kept for itself goes. A folder that the pass named stays, for the next run."""
        self._held = None
        if self.strategy.first:
            for own in {self.folder, self._place({"cache": "ram"})}:
                if (own / MARK).is_file():
                    shutil.rmtree(own)

    def _reason_against(self, plan: Plan, route: Sequence[str], sure: bool) -> str | None:
        """Holds the entry at the end of a route; or says why it will not be kept."""
        try:
            self._along(plan, route, sure)
        except _Declined as reason:
            return str(reason)
        except OSError as error:
            return (error.strerror or str(error)).lower()
        return None

    def _along(self, plan: Plan, route: Sequence[str], sure: bool) -> None:
        """Holds the entry at the end of a route of cuts, by node name. Cuts on the way are filled only if the end needs them."""
        assert plan.needs.features is not None
        options = plan.needs.features.options
        self._demand_same_inputs(options)
        views = options.get("views") or 1
        nodes = {n.name: n for n in plan.graph.nodes}
        cuts: list[_Cut] = []
        key = hashed(json.dumps(self.identity, sort_keys=True, default=str).encode(), *self._probe(views))
        for start, name in zip([None, *route], route, strict=False):
            node = nodes[name]
            terms = (options["dtype"], views, self.strategy.precision, len(self.samples), self.batch)
            key = key_of(plan.graph, nodes.get(start or ""), node, key, terms)
            shape = tuple(node.meta["val"].shape[1:])
            layout = Layout(key, len(self.samples) * views, shape, getattr(torch, options["dtype"]), self.batch)
            cuts.append(_Cut(node, options, layout, views))
        self._demand_room(cuts[-1], options)
        self._entry(plan, cuts, sure)

    def _demand_room(self, cut: _Cut, options: Mapping[str, Any]) -> None:
        size, limit = cut.layout.bytes, options.get("limit")
        if limit is not None and size > limit:
            raise _Declined(f"they take {show_size(size)}, the limit is {show_size(limit)}")

    def _entry(self, plan: Plan, cuts: Sequence[_Cut], sure: bool) -> Store:
        """The entry of the last of `cuts`: held, found on disk, or filled from that of the one before."""
        cut = cuts[-1]
        if self._held is not None and self._held[0] == cut.layout.key:
            return self._held[1]
        if cut.options["cache"] == "ram" and self.strategy.world == 1:
            store = self._filled(plan, cuts, MemoryFill(cut.layout), sure)
        else:
            folder = Folder(self._place(cut.options), self.digest)
            found = folder.open(cut.layout)
            if found is None:
                with folder.filling(cut.layout) as fill:
                    # Another rank may have filled it while this one waited for its turn.
                    found = folder.open(cut.layout) or self._filled(plan, cuts, fill, sure)
            store = found
            for earlier in cuts[:-1]:
                folder.remove(earlier.layout)
        self._held = (cut.layout.key, store)
        return store

    def _place(self, options: Mapping[str, Any]) -> Path:
        if options.get("folder"):
            return Path(options["folder"]).expanduser()
        shared = Path("/dev/shm")
        if options["cache"] == "ram" and shared.is_dir():
            # Several ranks share one copy in memory.
            return shared / f"graphopt-{self.digest}-{hashed(str(self.folder.absolute()).encode())[:8]}"
        return self.folder

    # -- filling ------------------------------------------------------------------------------------------------------------
    def _filled(self, plan: Plan, cuts: Sequence[_Cut], fill: FileFill | MemoryFill, sure: bool) -> Store:
        cut = cuts[-1]
        source = self._entry(plan, cuts[:-1], True) if len(cuts) > 1 else None
        module = emit(plan.graph, start=cuts[-2].node if source is not None else None, stop=cut.node)
        self.strategy.place(module)
        self._demand_resting(plan, cuts)
        inputs = self._from_store(source, cut, fill.done) if source is not None else self._from_images(cut, fill.done)
        trial = not sure and not cut.options.get("force") and fill.done == 0
        began = start = self.clock()
        last, first = min(TRIAL, cut.layout.chunks - 1), fill.done
        try:
            for number, (given, targets) in enumerate(inputs, fill.done):
                features = self._features(module, given)
                if number == 0:
                    self._demand_same(module, given, features)
                fill.write(number, self._narrowed(features, cut.layout.dtype), targets)
                if number == 0:
                    start, first = self.clock(), 1  # the first chunk was computed thrice, and warmed the kernels up
                elif number == last and trial:
                    self._demand_faster(fill, first, number, self.clock() - start)
                self.progress(cut.layout.span(number)[1], cut.layout.rows)
        except (OSError, _Declined):
            if isinstance(fill, FileFill):
                fill.folder.remove(cut.layout)
            raise
        except BaseException:
            fill.flush()
            raise
        self.told |= {"fill_seconds": self.clock() - began, "filled_from": "features" if source is not None else "images"}
        return fill.finish()

    def _features(self, module: nn.Module, given: Tensor) -> Tensor:
        batch = self.strategy.move(Batch(torch.empty(0), given, torch.empty(0)))
        with torch.no_grad(), self._autocast():
            return module(batch.input.float())

    def _autocast(self) -> AbstractContextManager[Any]:
        return self.strategy.autocast() if self.strategy.precision else nullcontext()

    def _from_images(self, cut: _Cut, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of (inputs, targets) from chunk `done` on; view by view, each a whole pass over the samples."""
        feed = ImageFeed(self.samples, self.batch, shuffle=False, workers=self.workers)
        count, left = len(self.samples), done * cut.layout.chunk
        waiting: list[tuple[Tensor, Tensor]] = []
        # Chunks are cut from the stream of rows, so that a view that ends inside one does not matter.
        for view in range(left // count, cut.views):
            skipped = left - view * count if view == left // count else 0
            for index, images, targets in feed.batches(view, skipped // self.batch):
                keep = index >= skipped
                waiting.append((images[keep], targets[keep]))
                while sum(len(t) for _, t in waiting) >= cut.layout.chunk:
                    joined = torch.cat([i for i, _ in waiting]), torch.cat([t for _, t in waiting])
                    yield joined[0][: cut.layout.chunk], joined[1][: cut.layout.chunk]
                    waiting = [(joined[0][cut.layout.chunk :], joined[1][cut.layout.chunk :])]
        if waiting and sum(len(t) for _, t in waiting):
            yield torch.cat([i for i, _ in waiting]), torch.cat([t for _, t in waiting])

    def _from_store(self, source: Store, cut: _Cut, done: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(done, cut.layout.chunks):
            first, end = cut.layout.span(number)
            yield source.features[first:end], source.targets[first:end]

    # -- R6, looked at ------------------------------------------------------------------------------------------------------
    def _demand_resting(self, plan: Plan, cuts: Sequence[_Cut]) -> None:
        training = [name for name, p in tensors(plan.graph.module, between(None, cuts[-1].node)).items() if p.requires_grad]
        if training:
            raise RunError(f"the prefix still trains ({training[0]}): its features cannot be kept (R6)", where="features")

    def _demand_same(self, module: nn.Module, given: Tensor, features: Tensor) -> None:
        again = self._features(module, given)
        half = self._features(module, given[: max(1, len(given) // 2)])
        # Kernels may round differently from call to call, or by batch; dropout and batch statistics differ by far more.
        scale = 1e-2 * float(features.float().abs().max())
        same, apart = (bool((a.float() - b.float()).abs().max() <= scale) for a, b in ((again, features), (half, features[: len(half)])))
        if not same or not apart:
            why = "mixes the samples of a batch" if same else "draws random numbers"
            raise RunError(f"the prefix {why}: what it computes cannot be kept (R6)", where="features")

    def _narrowed(self, features: Tensor, dtype: torch.dtype) -> Tensor:
        kept = features.to(dtype)
        if not bool(torch.isfinite(kept).all()) and bool(torch.isfinite(features).all()):
            raise _Declined(f"their values go beyond {str(dtype).removeprefix('torch.')}")
        return kept.cpu()

    def _demand_faster(self, fill: FileFill | MemoryFill, first: int, last: int, computing: float) -> None:
        """What `computing` seconds made, of chunks `first` to `last`, is read back as training would read it."""
        begin, end = fill.layout.span(first)[0], fill.layout.span(last)[1]
        order = begin + torch.randperm(end - begin, generator=torch.Generator().manual_seed(self.seed))
        began = self.clock()
        for part in order.split(fill.layout.chunk):
            fill.read(part)
        reading, computing = ((self.clock() - began) / len(order), computing / len(order))
        self.told |= {"compute_seconds_per_sample": computing, "read_seconds_per_sample": reading}
        if reading >= computing:
            times = f"reading them takes {1e6 * reading:.0f} us a sample, computing them {1e6 * computing:.0f} us"
            raise _Declined(f"{times} (force = true insists)")

    def _probe(self, views: int) -> list[bytes]:
        """A few samples as they are given: a transform or a file that changed changes these."""
        places = sorted({0, len(self.samples) // 3, 2 * len(self.samples) // 3, len(self.samples) - 1})
        return [bytes(bits(self.samples[(view, i)][1])) for view in range(views) for i in places]
