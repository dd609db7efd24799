"""Who cuts the tiles: attention over stored sequences, tile by tile, on as many threads as help."""

import itertools
import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvlib import kernels
from kvlib.arrays import Array
from kvlib.attention import Partial, add_bias, attend_scores, fold, mass, mix, score
from kvlib.sight import Sight
from kvlib.storage import BlockStorage
from kvlib.tables import Table
from kvlib.threads import num_threads

TILE_SCORES = 1 << 17  # scores of one tile over all heads and rows: they stay in a core's second-level cache
TILE_BYTES = 1 << 21  # bytes of K gathered or decoded for one tile: likewise


@dataclass(frozen=True, slots=True)
class Cut:
    """How a sequence is cut for ``rows`` query rows to each KV head; sizes in tokens."""

    tile: int  # attended at once
    strip: int  # keys in one matrix product; 0 when a tile is one product
    pieces: int  # runs of tiles that go to different threads

    @classmethod
    def plan(cls, storage: BlockStorage, sequences: int, rows: int, dtype: str) -> "Cut":
        heads, width = storage.spec.num_kv_heads, storage.spec.head_dim
        tile = max(128, TILE_SCORES // (heads * rows))
        if storage.block_size < tile or not storage.holds(dtype):  # else a tile is a view of a block, and costs nothing
            tile = max(1, min(tile, TILE_BYTES // (4 * heads * width)))
        # a block cut in two would be gathered twice, a group of tokens decoded twice
        whole = storage.block_size if storage.block_size <= tile else storage.unit
        tile = max(1, tile // whole) * whole
        strip = _power_of_two(storage.backend.serial_product // (rows * width))
        if rows == 1 or strip < 64:  # a matrix-vector product, or a large one: BLAS itself shares both out
            return cls(tile, 0, 0)
        return cls(tile, strip, math.ceil(num_threads() / sequences))


class Tile(NamedTuple):
    """Some tokens of one sequence: where they lie, how to score and to mix them, and what is hidden of them."""

    place: slice  # among all that the layer holds: the slots of the blocks, and behind them the tail
    score: Callable[[Array], Array]
    mix: Callable[[Array], Array]
    bias: Array | None

    def attend(self, q: Array) -> Partial:
        return attend_scores(self.score(q), self.mix, self.bias)

    def mass(self, q: Array, whole: Partial) -> Array:
        """What each token gets of the attention of q, (Hkv, S); ``whole`` is the partial of q over all tiles."""
        scores = self.score(q)
        if self.bias is not None:
            add_bias(scores, self.bias)
        return mass(scores, whole)


class Reader:
    """One layer of one sequence as tiles, for queries with the same sight."""

    def __init__(self, storage: BlockStorage, layer: int, table: Table, sight: Sight, cut: Cut, dtype: str) -> None:
        self.storage, self.layer, self.table = storage, layer, table
        self.sight, self.cut, self.dtype = sight, cut, dtype
        self.stored, self.waiting = int(table.stored[layer]), int(table.waiting[layer])

    @property
    def first(self) -> int:
        """The first slot to be read: slots are positions unless something was evicted, and a window has an end."""
        return 0 if self.table.slots else min(self.stored, self.sight.start() // self.cut.tile * self.cut.tile)

    def spans(self) -> list[tuple[int, int]]:
        """The slots that may be seen, cut into `Cut.pieces` runs of whole tiles, for as many threads."""
        first = self.first
        step = self.cut.tile * math.ceil((self.stored - first) / (self.cut.tile * max(1, self.cut.pieces)))
        return [(start, min(start + step, self.stored)) for start in range(first, self.stored, max(1, step))]

    def blocks(self, start: int, stop: int) -> Iterator[Tile]:
        """The tiles of slots start … stop-1; those that nobody sees are left out."""
        storage, unit = self.storage, self.storage.unit
        edge = max(self.cut.tile, storage.block_size)  # no tile reaches over the end of a block that is larger than it
        hi = start
        while hi < stop:
            lo, hi = hi, min(hi + self.cut.tile, (hi // edge + 1) * edge, stop)
            if self.table.slots is None:
                bias, seen = (None, True) if self.sight.all_of(lo, hi) else self._hide(np.arange(lo, hi))
            else:
                bias, seen = self._hide(self.table.slots.by_token(self.layer, lo // unit, hi // unit, unit))
            if seen:
                yield self._encoded(lo, hi, bias)

    def tail(self) -> Iterator[Tile]:
        """The tokens that still wait for their group; and those that did when the first of the queries came."""
        seen, held = int(self.table.seen[self.layer]), self.stored + self.waiting
        if self.sight.exact is not None:
            run = self.table.tail.runs[self.layer]
            for lo in range(int(self.sight.exact[0]) - run.first, seen - run.first, self.cut.tile):
                hi = min(lo + self.cut.tile, seen - run.first)
                rows = self.table.tail.read_run(self.layer, lo, hi, self.dtype)
                yield self._exact(rows, run.first + lo, held - (seen - run.first) + lo)
        elif self.waiting:
            rows = self.table.tail.read(self.layer, self.waiting, self.dtype)
            yield self._exact(rows, seen - self.waiting, self.stored)

    def all(self) -> Iterator[Tile]:
        yield from self.blocks(self.first, self.stored)
        yield from self.tail()

    def _hide(self, positions: np.ndarray, exact: bool = False) -> tuple[Array | None, bool]:
        """0 where a query sees a position and -inf where not, None for all zeros; and whether anything is seen."""
        visible = self.sight.visible(positions, exact)
        if visible.all():
            return None, True
        backend = self.storage.backend
        zero = backend.zeros((1,), self.dtype)
        return backend.xp.where(backend.asarray(visible), zero, zero - math.inf), bool(visible.any())

    def _exact(self, rows: tuple[Array, Array], position: int, place: int) -> Tile:
        """A tile of exact rows from ``position`` on, which lie from ``place`` on."""
        strip, count, (k, v) = self.cut.strip, rows[0].shape[1], rows
        bias, _ = self._hide(np.arange(position, position + count), exact=True)
        here = slice(place, place + count)
        return Tile(here, lambda q: score(q, k, strip), lambda weights: mix(weights, v, strip), bias)

    def _encoded(self, lo: int, hi: int, bias: Array | None) -> Tile:
        storage, strip = self.storage, self.cut.strip
        codec = storage.codec
        k = storage.gather("k", self.layer, self.table.ids, lo, hi)

        def mix_values(weights: Array) -> Array:
            if storage.spec.latent:  # V is a view of K
                return codec.k.mix(weights, k, strip)[..., : storage.spec.latent]
            # not before it is wanted: `mass` has no use for it
            return codec.v.mix(weights, storage.gather("v", self.layer, self.table.ids, lo, hi), strip)

        return Tile(slice(lo, hi), lambda q: codec.k.scores(q, k, strip), mix_values, bias)


def attend_sequences(
    q: Array,
    storage: BlockStorage,
    layer: int,
    tables: SequenceOf[Table],
    sights: SequenceOf[Sight],
    dtype: str,
    fused: bool = False,
) -> list[Partial]:
    """Attention of the last positions of each sequence over what it has stored.

    q (B, Hkv, R, D), scaled, where the R rows of a KV head are (query heads in its group) x positions -> B partials
    with outputs (Hkv, R, Dv) in ``dtype``. ``fused``: a kernel attends to the blocks, where `refusal` finds nothing.
    """
    cut = Cut.plan(storage, len(tables), q.shape[2], dtype)
    readers = [Reader(storage, layer, table, sight, cut, dtype) for table, sight in zip(tables, sights, strict=True)]
    partials = _by_kernel(q, storage, layer, tables, sights) if fused else _by_tile(q, storage, readers, cut)
    for index, reader in enumerate(readers):
        partials[index] += _fold(tile.attend(q[index]) for tile in reader.tail())
    return [fold(each) if each else _nothing(rows, storage, dtype) for each, rows in zip(partials, q, strict=True)]


def refusal(storage: BlockStorage, tables: SequenceOf[Table], sights: SequenceOf[Sight], dtype: str) -> str | None:
    """Why no kernel answers queries of ``dtype`` here, in words; None if one does."""
    if not kernels.runs_on(storage.backend):
        return "kernels run on CUDA, with Triton"
    if any(table.slots for table in tables) or any(sight.rules for sight in sights):
        return "a policy or a window hides some of the positions"
    if any(sight.exact is not None for sight in sights):
        return "groups have closed behind some of the queries, which see exact rows"
    return kernels.refusal(storage, dtype)


def _by_kernel(
    q: Array, storage: BlockStorage, layer: int, tables: SequenceOf[Table], sights: SequenceOf[Sight]
) -> list[list[Partial]]:
    from kvlib.kernels.calls import attend  # which needs Triton

    return [[partial] for partial in attend(q, storage, layer, tables, sights[0].tokens)]


def _by_tile(q: Array, storage: BlockStorage, readers: list[Reader], cut: Cut) -> list[list[Partial]]:
    spans = [(index, *span) for index, reader in enumerate(readers) for span in reader.spans()]

    def attend_span(span: tuple[int, int, int]) -> list[Partial]:
        index, start, stop = span
        return _fold(tile.attend(q[index]) for tile in readers[index].blocks(start, stop))

    found = storage.backend.map(attend_span, spans) if cut.pieces else map(attend_span, spans)
    partials: list[list[Partial]] = [[] for _ in readers]
    for (index, _, _), partial in zip(spans, found, strict=True):
        partials[index] += partial
    return partials


def _fold(partials: Iterator[Partial]) -> list[Partial]:
    """One partial of all, if there are any: one after another, for all at once would take memory as the square."""
    first = next(partials, None)
    return [] if first is None else [fold(itertools.chain([first], partials))]


def _nothing(q: Array, storage: BlockStorage, dtype: str) -> Partial:
    """The partial of no tile at all: all that the queries (Hkv, R, D) may see was evicted."""
    l = storage.backend.zeros((*q.shape[:2], 1), dtype)  # noqa: E741
    return Partial(l - math.inf, l, storage.backend.zeros((*q.shape[:2], storage.spec.value_dim), dtype))


def attention_mass(
    q: Array, storage: BlockStorage, layer: int, table: Table, sight: Sight, whole: Partial, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """The weights that q (Hkv, R, D), scaled, gives to each unit of slots, (Hkv, units), and each token of the tail.

    A second pass over the keys, with the row maxima and sums of the first (``whole``): the weights of a tile are not
    known before all tiles are, and keeping them would take memory in the square of the length.
    """
    reader = Reader(storage, layer, table, sight, Cut.plan(storage, 1, q.shape[1], dtype), dtype)
    heads = storage.spec.num_kv_heads
    weights = np.zeros((heads, reader.stored + reader.waiting), np.float32)
    for tile in reader.all():  # a token may be seen twice: encoded by some queries, exact by others
        weights[:, tile.place] += storage.backend.to_numpy(tile.mass(q, whole))
    stored, tail = weights[:, : reader.stored], weights[:, reader.stored :]
    return stored.reshape(heads, -1, storage.unit).sum(axis=-1), tail


def _power_of_two(n: int) -> int:
    """The largest power of two that is not above n; 0 for 0."""
    return 1 << n.bit_length() - 1 if n else 0
