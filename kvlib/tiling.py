"""Who cuts the tiles: attention over stored sequences, tile by tile, on as many threads as help."""

import itertools
import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from kvlib.arrays import Array, num_threads
from kvlib.attention import Partial, attend_strips, attend_tile, causal_bias, fold
from kvlib.storage import BlockStorage
from kvlib.tables import Table

TILE_SCORES = 1 << 17  # scores of one tile over all heads and rows: they stay in a core's second-level cache
TILE_BYTES = 1 << 21  # bytes of K gathered for one tile: likewise


@dataclass(frozen=True, slots=True)
class Cut:
    """How a sequence is cut for ``rows`` query rows to each KV head; sizes in tokens."""

    tile: int  # attended at once
    strip: int  # keys in one matrix product; 0 when a tile is one product
    pieces: int  # runs of tiles that go to different threads

    @classmethod
    def plan(cls, storage: BlockStorage, sequences: int, rows: int) -> "Cut":
        heads, width = storage.spec.num_kv_heads, storage.spec.head_dim
        tile = max(128, TILE_SCORES // (heads * rows))
        if storage.block_size < tile:  # a tile of several blocks is gathered; one inside a block is a view
            tile = min(tile, TILE_BYTES // (4 * heads * width))
            tile = max(1, tile // storage.block_size) * storage.block_size  # a block cut in two would be gathered twice
        strip = _power_of_two(storage.backend.serial_product // (rows * width))
        if rows == 1 or strip < 64:  # a matrix-vector product, or a large one: BLAS itself shares both out
            return cls(tile, 0, 0)
        return cls(tile, strip, math.ceil(num_threads() / sequences))


def attend_sequences(
    q: Array, storage: BlockStorage, layer: int, tables: SequenceOf[Table], tokens: int, dtype: str
) -> list[Array]:
    """Causal attention of the last ``tokens`` positions of each sequence over all of its tokens.

    q (B, Hkv, R, D), scaled, where the R rows of a KV head are (query heads in its group) x tokens -> B outputs
    (Hkv, R, Dv) in ``dtype``.
    """
    cut = Cut.plan(storage, len(tables), q.shape[2])
    spans = []
    for index, table in enumerate(tables):
        length = int(table.filled[layer])
        step = cut.tile * math.ceil(length / (cut.tile * max(1, cut.pieces)))
        spans += [(index, start, min(start + step, length)) for start in range(0, length, step)]

    def attend_span(span: tuple[int, int, int]) -> Partial:
        index, start, stop = span
        return fold(_partials(q[index], storage, layer, tables[index], start, stop, tokens, dtype, cut))

    partials = storage.backend.map(attend_span, spans) if cut.pieces else map(attend_span, spans)
    by_sequence = itertools.groupby(zip(spans, partials, strict=True), key=lambda pair: pair[0][0])
    return [fold(partial for _, partial in group).normalise() for _, group in by_sequence]


def _partials(
    q: Array, storage: BlockStorage, layer: int, table: Table, start: int, stop: int, tokens: int, dtype: str, cut: Cut
) -> Iterator[Partial]:
    """The partial of each tile of positions start … stop-1. Only tiles that reach past a query need a mask."""
    backend = storage.backend
    length = int(table.filled[layer])
    first_query = length - tokens
    edge = max(cut.tile, storage.block_size)  # no tile reaches over the end of a block that is larger than it
    hi = start
    while hi < stop:
        lo, hi = hi, min(hi + cut.tile, (hi // edge + 1) * edge, stop)
        k, v = storage.read(layer, table.ids, lo, hi, dtype)
        if hi - 1 > first_query:
            queries, keys = (backend.asarray(backend.xp.arange(*ends)) for ends in ((first_query, length), (lo, hi)))
            yield attend_tile(q, k, v, causal_bias(queries, keys, dtype))
        elif cut.strip:
            yield attend_strips(q, k, v, cut.strip)
        else:
            yield attend_tile(q, k, v)


def _power_of_two(n: int) -> int:
    """The largest power of two that is not above n; 0 for 0."""
    return 1 << n.bit_length() - 1 if n else 0
