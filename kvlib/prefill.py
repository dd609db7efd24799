"""Prefill by chunks: a prompt goes into the cache piece by piece, and attention is answered tile by tile.

Two cuts decide how much memory a prompt of n tokens takes while it is read. The chunk C says how many queries are
answered at once, the tile W how many keys they look at in one go; the scores of one head are a matrix of C by W.

    one chunk, one tile        n · n    the textbook
    chunks, one tile           C · n    chunked prefill with a softmax in one shot
    chunks and tiles           C · W    chunked prefill with the online softmax

Each is the same function here, with other numbers, and gives the same answer: a softmax in one shot is the fold of
`kvlib.attention` over a single tile, and the whole prompt is a single chunk. `kvlib.peak` predicts how much memory that
takes, and `kvlib.memory` measures it.

Sources: online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867); chunked prefill, Agrawal et al. 2023
(arXiv:2308.16369).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvlib.arrays import Array, backend_of
from kvlib.attention import Partial, with_sinks
from kvlib.cache import KVCache
from kvlib.checks import checked_sinks, checked_size
from kvlib.sight import Sight
from kvlib.tiling import Cut, Reader

TILE = 128  # keys that are looked at in one go, unless another number is given


def plan(tokens: int, budget: int | None = None, decodes: int = 0, multiple: int = 1) -> list[int]:
    """The sizes of the chunks in which a prompt of ``tokens`` tokens is computed.

    Args:
        budget: the most tokens of one step; None is no limit: the prompt is one chunk.
        decodes: tokens of the budget that go to requests which decode beside it, in every step.
        multiple: every chunk but the last is a multiple of it, for instance of the block size.

    Raises ValueError: a number is no positive integer, or the budget leaves no room for a chunk.
    """
    checked_size("tokens", tokens)
    checked_size("multiple", multiple)
    checked_size("decodes", decodes, least=0)
    if budget is None:
        return [tokens]
    chunk = (checked_size("budget", budget) - decodes) // multiple * multiple
    if chunk < 1:
        beside = f"{decodes} decodes" + (f" and chunks of multiples of {multiple}" if multiple > 1 else "")
        raise ValueError(f"a budget of {budget} tokens leaves no room for a chunk beside {beside}")
    return [min(chunk, tokens - start) for start in range(0, tokens, chunk)]


def prefill(
    model: Any,
    tokens: Array | Sequence[Sequence[int]],
    cache: KVCache,
    chunk: int | Sequence[int] | None = None,
    tile: int | None = TILE,
    seqs: Sequence[int] | None = None,
) -> Array:
    """Feed ``tokens`` (B, T) to ``model`` by chunks -> the logits of the last position, (B, 1, vocab_size).

    Args:
        model: a `Transformer`. ``cache``: a `KVCache` for it; ``seqs``: the B sequences to continue, None: all.
        chunk: tokens of one chunk, or the sizes of all of them, as `plan` gives them; None: one chunk.
        tile: keys that are attended at once; None: all of them, a softmax in one shot.

    Raises:
        ValueError, TypeError, KeyError: an argument does not fit. CacheFull: from the cache. Whatever is raised, the
        cache is truncated to what it held before.
    """
    ids = np.asarray(tokens.detach().cpu() if hasattr(tokens, "detach") else tokens)
    if ids.ndim != 2 or not ids.size:
        raise ValueError(f"tokens must be (B, T) with at least one token, got shape {ids.shape}")
    sizes, tiled = _sizes(ids.shape[1], chunk), Tiled(cache, tile)
    held = {seq: cache.lengths[seq] for seq in (cache.lengths if seqs is None else seqs)}
    try:
        for start, size in _pieces(sizes):
            logits = model(ids[:, start : start + size], tiled, seqs, last_only=True)
    except BaseException:
        for seq, length in held.items():
            cache.truncate(seq, min(length, cache.lengths[seq]))
        raise
    return logits


def prefill_attention(
    q: Array,
    k: Array,
    v: Array | None,
    cache: KVCache,
    chunk: int | Sequence[int] | None = None,
    tile: int | None = TILE,
    layer: int = 0,
) -> Array:
    """The same for the attention of one layer, with all open sequences of ``cache``.

    q (B, Hq, T, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv) or None for a latent cache -> (B, Hq, T, Dv).
    """
    tiled, backend = Tiled(cache, tile), cache.backend
    out = backend.empty((*q.shape[:3], cache.spec.value_dim), backend.dtype_name(q))
    for start, size in _pieces(_sizes(q.shape[2], chunk)):
        here = slice(start, start + size)
        cache.append(k[:, :, here], v if v is None else v[:, :, here], layer)
        out[:, :, here] = tiled.attend(q[:, :, here], layer)
    return out


class Tiled:
    """A `KVCache` that answers queries by tiles of ``tile`` keys, or all at once for None; all else is the cache's.

    What a `Transformer` may be given instead of the cache. The exact tail of a codec is a tile of its own.

    Raises ValueError, TypeError: the cache's policy watches attention, and would not see this; it is no KVCache; or
        ``tile`` is no positive integer.
    """

    def __init__(self, cache: KVCache, tile: int | None = TILE) -> None:
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
        if cache.eviction and cache.eviction.observe != 0:
            raise ValueError(f"{cache.eviction} learns from the cache's own attention; use cache.attend")
        self.cache, self.backend, self.spec = cache, cache.backend, cache.spec
        unit, everything = cache.codec.group, math.ceil(cache.max_tokens / cache.block_size) * cache.block_size
        self.tile = everything if tile is None else max(1, checked_size("tile", tile) // unit) * unit
        self.append, self.truncate = cache.append, cache.truncate

    @property
    def lengths(self) -> dict[int, int]:
        return self.cache.lengths

    def attend(
        self,
        q: Array,
        layer: int = 0,
        seqs: Sequence[int] | None = None,
        scale: float | None = None,
        window: int | None = None,
        sinks: Array | None = None,
    ) -> Array:
        """As `KVCache.attend`: q (B, Hq, T, D) -> (B, Hq, T, Dv)."""
        cache, backend, spec = self.cache, self.backend, self.spec
        tables = cache._resolve(layer, seqs).values()
        q = cache._checked("q", q, len(tables), None, spec.head_dim)
        batch, heads, tokens, width = q.shape
        if any(tokens > table.held(layer) for table in tables):
            raise ValueError(f"q asks for the last {tokens} positions, and a sequence holds fewer; append first")
        rules = () if window is None else ((checked_size("window", window), 0),)
        rules += cache.eviction.rules() if cache.eviction else ()
        dtype = "float64" if backend.dtype_name(q) == "float64" else "float32"
        if sinks is not None:
            sinks = backend.astype(checked_sinks(sinks, heads, spec.num_kv_heads, backend), dtype)
        scale = 1 / math.sqrt(width) if scale is None else float(scale)
        # query heads of one KV head become its rows; nothing but these rows is kept of q
        rows = (backend.astype(q, dtype) * scale).reshape(batch, spec.num_kv_heads, -1, width)
        outputs = []
        with backend.exact():
            for row, table in zip(rows, tables, strict=True):
                sight = Sight.of(cache._storage, layer, table, tokens, rules)
                reader = Reader(cache._storage, layer, table, sight, Cut(self.tile, 0, 0), dtype)
                outputs.append(self._attend_one(row, reader, sinks))
        out = backend.xp.stack(outputs).reshape(batch, heads, tokens, spec.value_dim)
        return backend.astype(out, backend.dtype_name(q))

    def _attend_one(self, q: Array, reader: Reader, sinks: Array | None) -> Array:
        """q (Hkv, R, D), scaled -> (Hkv, R, Dv)."""
        whole = None
        for tile in reader.all():
            whole = tile.attend(q) if whole is None else absorb(whole, tile.attend(q))
        if whole is None:  # all that the queries may see was evicted
            return self.backend.zeros((*q.shape[:2], self.spec.value_dim), self.backend.dtype_name(q))
        if sinks is not None:
            whole = with_sinks(whole, sinks)
        whole.o[...] /= self.backend.xp.where(whole.l == 0, self.backend.xp.ones_like(whole.l), whole.l)
        return whole.o


def absorb(a: Partial, b: Partial) -> Partial:
    """`kvlib.attention.merge`, in the memory of ``a`` and ``b``: in a prefill the outputs of a chunk are large."""
    xp = backend_of(a.m).xp
    m = xp.maximum(a.m, b.m)
    shift = xp.where(m == -math.inf, xp.zeros_like(m), m)
    for part in (a, b):
        keep = xp.exp(part.m - shift)
        part.l[...] *= keep
        part.o[...] *= keep
    a.l[...] += b.l
    a.o[...] += b.o
    return Partial(m, a.l, a.o)


def _sizes(tokens: int, chunk: int | Sequence[int] | None) -> list[int]:
    if chunk is None or isinstance(chunk, int | np.integer):
        return plan(tokens, chunk)
    sizes = [checked_size("chunk", size) for size in chunk]
    if sum(sizes) != tokens:
        raise ValueError(f"the chunks must add up to the {tokens} tokens of the prompt, and make {sum(sizes)}")
    return sizes


def _pieces(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(start, size) of every chunk."""
    return list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True))
