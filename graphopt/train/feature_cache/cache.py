"""Caches what a dropped prefix computes, so that the remaining network trains on features instead of images.

Features are cached only if the prefix is frozen and in eval semantics and every sample's input is the same each time; all three are
checked. An entry's key is a hash of the prefix (its graph and every tensor in it), of the data and its transform, of dtype and precision,
and of the entry that it was filled from; so an outdated entry has another name and is never found.

On several ranks each rank has an entry of the samples that it owns, under a key of its own; they fill them at the same time, and each
gets what its batches need from the others. What is decided (cached or not, and why) is the same on all ranks.
"""

import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from graphopt.compiler.plan import Plan
from graphopt.data.loader import Feed, ImageFeed, load
from graphopt.errors import RunError
from graphopt.files import reason
from graphopt.hashing import hash_parts, raw_bytes
from graphopt.runtime.quantized import stored, stored_bytes, unpack
from graphopt.train.feature_cache.crops import Crops, surrounded
from graphopt.train.feature_cache.exchange import Deal, Exchange, owned
from graphopt.train.feature_cache.inputs import check_inputs
from graphopt.train.feature_cache.prefix import Cut, Declined, FeatureFeed, OnFeatures, Prefix, key_of
from graphopt.train.feature_cache.store import (
    CacheDirectory,
    CacheEntry,
    EntryLayout,
    Fill,
    MemoryFill,
    RowFile,
    available_memory,
    remove_features,
)
from graphopt.train.strategy import Strategy
from graphopt.units import show_size

T = TypeVar("T")

#: chunks that are timed before deciding whether the cache is faster than the prefix
TRIAL = 4


class Whole(Fill):
    """An entry that this rank has already, while other ranks fill theirs."""

    def __init__(self, entry: CacheEntry) -> None:
        super().__init__(entry.layout)
        self.entry, self.done = entry, entry.layout.chunks

    def finish(self) -> CacheEntry:
        return self.entry

    def _put(self, first: int, features: Tensor) -> None:
        raise AssertionError("nothing is missing")

    def _written(self) -> Tensor | RowFile:
        return self.entry.features


class FeatureCache:
    """Caches the features of one run, one entry at a time: in `folder`, in RAM, or in a folder that the pass names.

    `identity` is the data and its transform, `mixed` whether mixup or CutMix changes batches. `on_progress` is called with (rows done,
    rows, number of a stop signal or 0) and may raise an exception to stop, `on_message` with a line for the console; `last_decision` is
    a record for the run's log.
    """

    def __init__(
        self, images: ImageFeed, strategy: Strategy, *, folder: Path, digest: str, identity: Mapping[str, Any], mixed: bool = False
    ) -> None:
        self.images, self.samples, self.strategy, self.ranks = images, images.samples, strategy, strategy.peers
        self.folder, self.digest, self.identity, self.mixed = folder, digest, dict(identity), mixed
        self.on_progress: Callable[[int, int, int], None] = lambda done, rows, signum: None  # noqa: ARG005 (names say what it gets)
        self.on_message: Callable[[str], None] = lambda text: None  # noqa: ARG005
        self.last_decision: dict[str, Any] = {}
        self._inputs = self.samples  # from which features are computed: of a sample its image, or a larger one
        self._held: CacheEntry | None = None
        self._epoch = 0  # of which the held entry has the views, where they are refreshed
        self._exchange: Exchange | None = None
        self._fingerprint = ""  # of every file and target

    def use(self, images: ImageFeed) -> None:
        """From now on it caches features of these images."""
        self.images, self.samples = images, images.samples

    def check(self, plan: Plan) -> None:
        """Raises RunError, before the first step, if a sample's input is not the same each time or the limit is smaller than a batch."""
        for item in plan.matched:
            options = item.match.feature_options
            if options is None:
                continue
            check_inputs(self.samples, options, mixed=self.mixed)
            limit = options.get("limit")
            rows = [stored_bytes(tuple(region.exits[0].meta["val"].shape[1:]), options["dtype"]) for region in item.match.regions]
            least = self.images.batch * min(rows, default=0)
            if limit is not None and limit < least:
                what = f"limit = {show_size(limit)} is smaller than one batch of features ({show_size(least)} at least)"
                raise RunError(what, where=item.instance.label, fix="Raise it, or drop the prefix without a cache")

    def prepare(self, plan: Plan, record: Mapping[str, Any], epoch: int = 0) -> tuple[Feed, nn.Module, dict[str, Any]]:
        """The feed and the module that a phase trains with from `epoch` on, and a record of that for its checkpoints.

        `record` is of the phase before, or, when a run is resumed, of this very phase (then its choice stands). Where features cannot or
        should not be cached, the whole module runs on images, its prefix under no_grad; that costs time and nothing else.
        """
        self.last_decision = {}
        if plan.needs.features is None:
            self._held = None
            return self.images, plan.module, {}
        if not self.strategy.feeds:
            return self._followed(plan)
        found = self._prepared(plan, record, epoch)
        self.strategy.announce((found[-1], self.last_decision))
        return found

    def _followed(self, plan: Plan) -> tuple[Feed, nn.Module, dict[str, Any]]:
        """The same on a rank that reads no data: another one caches, and says what it does."""
        while len(found := self.strategy.announced()) > 2:
            self.strategy.requested(self.strategy.signal())
            self.on_progress(*found)
        record, self.last_decision = found
        return self.images, OnFeatures(plan.suffix) if record["kept"] else plan.module, record

    def _prepared(self, plan: Plan, record: Mapping[str, Any], epoch: int) -> tuple[Feed, nn.Module, dict[str, Any]]:
        cut = plan.needs.features
        assert cut is not None
        self.last_decision["cut"] = cut.region
        resumed = record.get("cut") == cut.node.name
        # Crops of an earlier cut's features are of images of another size.
        route = [cut.node.name] if cut.crops else [*record.get("route", []), *([] if resumed else [cut.node.name])]
        self._inputs = surrounded(self.samples, cut.crops, cut.options) if cut.crops else self.samples
        declined = "it was decided so before" if resumed and not record["kept"] else None
        if self._exchange is None and self.ranks.count > 1:
            self._exchange = Exchange(self.ranks)
        if self._held is None:
            self._epoch = epoch
        why = declined or self._try_to_hold(plan, route, trial=not resumed)
        if why is not None or self._held is None:
            self._held = None
            self.last_decision |= {"kept": False, "why": why}
            self.on_message(f"features of {cut.region} are not cached: {why}; its prefix runs in every step, without gradients")
            # The next cut starts from the images again.
            return self.images, plan.module, {"cut": cut.node.name, "kept": False, "route": []}
        self.last_decision |= {"kept": True, "bytes": int(self.ranks.sum([self._held.layout.bytes])[0])}
        shape, crops = cut.shape, None
        if cut.crops:
            height, width = cut.node.meta["val"].shape[2:]
            crops = Crops((height, width), (shape[1] - height, shape[2] - width), len(self.samples), self.images.seed)
        packed = shape if cut.options["dtype"] == "int8" else None
        feed = FeatureFeed(self._held, self.images, _views(cut.options), self._exchange, packed, crops)
        if (every := cut.options.get("refresh")) and not self.samples.deterministic:
            whole = Prefix(plan, [Cut(cut.node, self._held.layout, shape)], self.strategy)
            feed.refresh = partial(self._refresh, self._held, whole, every)
            self.on_message(f"features of {cut.region} are computed anew every {every} epochs, a part of them in each")
        return feed, OnFeatures(plan.suffix), {"cut": cut.node.name, "kept": True, "route": route}

    def close(self) -> None:
        """Removes what the run has cached; a folder that the pass names stays, for the next run."""
        self._held = None
        remove_features(self.folder)

    def _refresh(self, entry: CacheEntry, prefix: Prefix, every: int, epoch: int) -> None:
        """Brings an entry to the views of `epoch`: of every `every` chunks, one has a new view in each epoch."""
        assert isinstance(entry.features, Tensor)
        layout, own = entry.layout, owned(self.ranks, len(self.samples))
        # Whole chunks, so that what is computed anew has the bits that it has in an entry that is filled in that epoch.
        due = [c for c in range(layout.chunks) if view_of(c, epoch, every) != view_of(c, self._epoch, every)]
        keys = ([(view_of(c, epoch, every), own[row]) for row in range(*layout.span(c))] for c in due)
        for chunk, batch in zip(due, load(self._inputs, keys, self.images.workers), strict=True):
            first, end = layout.span(chunk)
            entry.features[first:end] = prefix.stored(batch.input, first=False)
        self._epoch = epoch

    def _try_to_hold(self, plan: Plan, route: Sequence[str], trial: bool) -> str | None:
        """Finds or fills the entry at the end of a route of cuts, by node name; or says why it will not be cached."""
        assert plan.needs.features is not None
        options = plan.needs.features.options
        check_inputs(self.samples, options, mixed=self.mixed)
        try:
            cuts = self._cuts(plan, route, options)
            size, limit = int(self.ranks.sum([cuts[-1].layout.bytes])[0]), options.get("limit")
            if limit is not None and size > limit:
                return f"they take {show_size(size)}, the limit is {show_size(limit)}"
            self._held = self._load_or_fill(plan, cuts, options, trial)
        except Declined as declined:
            return str(declined)
        return None

    def _attempt(self, call: Callable[[], T]) -> T:
        """What `call` returns. Where one rank declines, or the system refuses it something, all ranks raise Declined."""
        result, why = None, ""
        try:
            result = call()
        except (OSError, Declined) as error:
            why = reason(error) if isinstance(error, OSError) else str(error)
        if self.ranks.largest(bool(why)):
            raise Declined(next(found for found in self.ranks.gather(why) if found))
        return cast(T, result)

    def _cuts(self, plan: Plan, route: Sequence[str], options: Mapping[str, Any]) -> list[Cut]:
        """The cuts of a route, each with the layout of its features. A cut on the way is filled only if the next one needs it."""
        assert plan.needs.features is not None
        nodes = {n.name: n for n in plan.graph.nodes}
        views, dtype, count, batch = _views(options), options["dtype"], len(self.samples), self.images.batch
        self._fingerprint = self._fingerprint or self._attempt(self.samples.fingerprint)
        identity = json.dumps([self.identity, self._fingerprint], sort_keys=True, default=str)
        whole = hash_parts(identity.encode(), *self._probe(views))
        refreshed = f" refresh {every}" if (every := options.get("refresh")) else ""
        own, part = len(owned(self.ranks, count)), (self.ranks.number, self.ranks.count)
        cuts: list[Cut] = []
        for name in route:
            node = nodes[name]
            start = cuts[-1].node if cuts else None
            whole = key_of(plan.graph, start, node, whole, (dtype, views, self.strategy.precision, count))
            # Kernels may round differently for another batch size: a rank's own features are those that it computed in its own batches.
            key = hash_parts(whole.encode(), f"{batch} {part}{refreshed}".encode())
            shape = plan.needs.features.shape if node is plan.needs.features.node else tuple(node.meta["val"].shape[1:])
            row, kind = stored(shape, dtype)
            cuts.append(Cut(node, EntryLayout(key, own * views, row, kind, batch, whole, part), shape))
        return cuts

    def _probe(self, views: int) -> list[bytes]:
        """The inputs of a few samples, which change with the transform."""
        count = len(self.samples)
        return [bytes(raw_bytes(self._inputs[(v, i)][1])) for v in range(views) for i in sorted({0, count // 3, 2 * count // 3, count - 1})]

    def _load_or_fill(self, plan: Plan, cuts: Sequence[Cut], options: Mapping[str, Any], trial: bool) -> CacheEntry:
        """The entry of the last of `cuts`: held, found on disk, or filled from that of the cut before."""
        layout = cuts[-1].layout
        if self._held is not None and self._held.layout.key == layout.key:
            return self._held
        with ExitStack() as stack:
            directory, parts = None, list[CacheEntry]()
            if options["cache"] == "ram":
                fill: Fill = self._attempt(lambda: self._in_memory(layout))
            else:
                folder = options.get("folder")
                directory = CacheDirectory(Path(folder).expanduser() if folder else self.folder, self.digest)
                fill = self._on_disk(directory, layout, stack)
                parts = self._attempt(partial(directory.parts, layout)) if self.ranks.largest(fill.done < layout.chunks) else []
            entry = self._fill(plan, cuts, options, fill, parts, trial)
        if directory is not None:
            for earlier in (*(cut.layout for cut in cuts[:-1]), *(part.layout for part in parts)):
                directory.remove(earlier)
        return entry

    def _in_memory(self, layout: EntryLayout) -> MemoryFill:
        """Raises OSError if the entries of all ranks on this machine do not fit."""
        if layout.bytes * (int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.ranks.count > 1 else 1) > available_memory():
            raise OSError(0, "not enough memory")
        return MemoryFill(layout)

    def _on_disk(self, directory: CacheDirectory, layout: EntryLayout, stack: ExitStack) -> Fill:
        """What this rank has of its entry, or is to fill; if a rank has to fill, all entries are locked until `stack` closes."""
        # A lock is of a process that fills the entry, or was killed at it: `filling` waits, and removes what it has left.
        found: Any = self._attempt(lambda: directory.open(layout) if not directory.file(layout, "lock").exists() else None)
        if self.ranks.largest(found is None):
            # Rank 0 comes first: two runs that share a folder must not each hold a lock that the other waits for.
            for first in (True, False):
                if self.ranks.first is first:
                    found = self._attempt(lambda: stack.enter_context(directory.filling(layout)))
                elif self.ranks.count > 1:
                    self._attempt(lambda: None)
        return Whole(found) if isinstance(found, CacheEntry) else found

    def _fill(
        self, plan: Plan, cuts: Sequence[Cut], options: Mapping[str, Any], fill: Fill, parts: Sequence[CacheEntry], trial: bool
    ) -> CacheEntry:
        """Copies what is missing of an entry from `parts`, those of another number of ranks, or computes it where there are none.

        All ranks have as many rounds, one chunk each; one that has no chunk left waits for the others. A trial declines if reading a few
        chunks is slower than computing them.
        """
        layout, done = fill.layout, fill.done
        rounds = int(self.ranks.largest(layout.chunks - done))
        if not rounds:
            return self._attempt(fill.finish)
        computing = self.ranks.largest(not parts and done < layout.chunks)  # ranks without a common file system may differ
        source = self._load_or_fill(plan, cuts[:-1], options, trial=False) if computing and len(cuts) > 1 else None
        prefix = Prefix(plan, cuts, self.strategy)
        last = self._trial_chunks(fill) if trial and computing and not options.get("force") else 0
        began = start = perf_counter()

        def compute(number: int, chunk: tuple[Tensor, Tensor] | None) -> None:
            if chunk is not None:
                fill.write(number, chunk[0] if parts else prefix.stored(chunk[0], first=number == 0), chunk[1])

        try:
            with closing(self._chunks(source, fill, parts, options.get("refresh"), cuts[-2].shape if len(cuts) > 1 else ())) as chunks:
                for number in range(done, done + rounds):
                    self._attempt(lambda: compute(number, next(chunks, None)))  # noqa: B023 (called at once)
                    if number == 0:
                        start = perf_counter()  # the first chunk was computed three times, and warmed the kernels up
                    elif number == last:
                        self._check_faster(fill, last, perf_counter() - start)
                    progress = min(layout.span(number)[1], layout.rows), layout.rows, self.strategy.stopping()
                    self.strategy.announce(progress)
                    self.on_progress(*progress)
            entry = self._attempt(fill.finish)
        except Declined:
            fill.discard()
            raise
        except BaseException:
            fill.flush()
            raise
        filled_from = "images" if source is None else "features"
        if prefix.error is not None:
            self.last_decision["error"] = prefix.error
            self.on_message(f"features in 8 bits are off by {100 * prefix.error:.2g} % (root mean square, over the values')")
        self.last_decision |= {"fill_seconds": perf_counter() - began, "filled_from": "parts" if parts else filled_from}
        return entry

    def _trial_chunks(self, fill: Fill) -> int:
        """The last chunk of the trial, the same on all ranks, where each chunk of it has as many rows; 0 for no trial."""
        fewest = int(-self.ranks.largest(-fill.layout.chunks))
        return 0 if self.ranks.largest(fill.done) else max(0, min(TRIAL, fewest - (1 if self.ranks.count == 1 else 2)))

    def _chunks(
        self, source: CacheEntry | None, fill: Fill, parts: Sequence[CacheEntry], every: int | None, before: tuple[int, ...]
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """Inputs and targets of the missing chunks, in order: features of an earlier cut, or images, all of one view before the next.

        From `parts`, the features themselves. Of an entry that is refreshed every so many epochs, each chunk has the view that it has now.
        """
        own = owned(self.ranks, len(self.samples))
        if every is None:
            keys = ([(row // len(own), own[row % len(own)]) for row in range(*span)] for span in fill.missing)
        else:
            chunk, now = fill.layout.chunk, self._epoch
            keys = ([(view_of(span[0] // chunk, now, every), own[row]) for row in range(*span)] for span in fill.missing)
        if parts:
            deal = Deal(parts, fill.layout.rows // len(own))
            return (deal.rows(chunk) for chunk in keys)
        if source is not None:
            packed = source.features[0:0].dtype == torch.uint8
            found = ((source.features[first:end], source.targets[first:end]) for first, end in fill.missing)
            return ((unpack(rows, before) if packed else rows, targets) for rows, targets in found)
        return ((batch.input, batch.target) for batch in load(self._inputs, keys, self.images.workers))

    def _check_faster(self, fill: Fill, last: int, computing: float) -> None:
        """Reads back, in random order, the chunks from 1 to `last`, which took `computing` seconds to compute."""
        begin, end = fill.layout.span(1)[0], fill.layout.span(last)[1]
        order = begin + torch.randperm(end - begin, generator=torch.Generator().manual_seed(0))
        began = perf_counter()
        for rows in torch.split(order, fill.layout.chunk):
            features = fill.read(rows)
            if self._exchange is not None:
                self._exchange.trial(features)
        # The slowest rank decides.
        reading, computing = (self.ranks.largest(seconds) / len(order) for seconds in (perf_counter() - began, computing))
        self.last_decision |= {"compute_seconds_per_sample": computing, "read_seconds_per_sample": reading}
        if reading >= computing:
            times = f"reading them takes {1e6 * reading:.0f} us a sample, computing them {1e6 * computing:.0f} us"
            raise Declined(f"{times} (force = true caches them nevertheless)")


def view_of(chunk: int, epoch: int, every: int) -> int:
    """The epoch whose augmentation a chunk of a refreshed entry has: the last one in which it was its turn, or the first of the run."""
    return max(0, epoch - (epoch - chunk) % every)


def _views(options: Mapping[str, Any]) -> int:
    """How many fixed views of each sample are cached."""
    return options.get("views") or 1
