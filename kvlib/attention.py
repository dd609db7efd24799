"""Attention as a fold over tiles.

A tile is some keys and values, whatever stored them. Attending one tile gives a `Partial`; two partials `merge` into
the partial of both tiles, in any order and any grouping. So the functions below are at once online softmax, flash
attention, chunked prefill and split-KV decoding: only who cuts the tiles differs.

Sources: online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867); FlashAttention, Dao et al. 2022
(arXiv:2205.14135); split-KV ("Flash-Decoding"), Dao et al. 2023.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

from kvlib.arrays import Array, backend_of


class Partial(NamedTuple):
    """What one tile contributes to the attention of R query rows.

    m: (..., R, 1) the largest score of each row; l: (..., R, 1) the sum of exp(score - m);
    o: (..., R, Dv) the sum of exp(score - m) * value.
    """

    m: Array
    l: Array  # noqa: E741  the letter that the papers use
    o: Array

    def normalise(self) -> Array:
        """The attention output, (..., R, Dv)."""
        return self.o / self.l


def attend_tile(q: Array, k: Array, v: Array, bias: Array | None = None) -> Partial:
    """Attend one tile: q (..., R, D), already scaled; k (..., S, D); v (..., S, Dv).

    ``bias`` is added to the scores and must broadcast to (..., T, S), where T divides R (rows repeat it): 0 where a key
    may be seen, -inf where not. A row that sees nothing gets m = -inf, l = 0, o = 0, which merges as nothing.
    """
    backend, xp = backend_of(q), backend_of(q).xp
    scores = q @ k.mT
    if bias is not None:
        by_position = scores.reshape(*scores.shape[:-2], -1, *bias.shape[-2:])
        by_position += bias
    m = xp.max(scores, axis=-1, keepdims=True)
    scores -= m if bias is None else _finite(m)
    weights = backend.exp_(scores)
    return Partial(m, xp.sum(weights, axis=-1, keepdims=True), weights @ v)


def merge(a: Partial, b: Partial) -> Partial:
    """The partial of two tiles together. Associative and commutative, up to rounding."""
    backend, xp = backend_of(a.m), backend_of(a.m).xp
    m = xp.maximum(a.m, b.m)
    shift = _finite(m)
    keep_a, keep_b = backend.exp_(a.m - shift), backend.exp_(b.m - shift)
    return Partial(m, a.l * keep_a + b.l * keep_b, a.o * keep_a + b.o * keep_b)


def attend_strips(q: Array, k: Array, v: Array, strip: int) -> Partial:
    """`attend_tile` for few rows and many keys, as a stack of products over ``strip`` keys each.

    Same shapes and same answer as ``attend_tile(q, k, v)``. A small product runs on the thread that asks for it, where
    a large one would wake BLAS's own threads: so several threads can each attend a tile of their own.
    """
    backend, xp = backend_of(q), backend_of(q).xp
    whole = k.shape[-2] // strip * strip
    if whole < k.shape[-2]:
        rest = attend_tile(q, k[..., whole:, :], v[..., whole:, :])
        return merge(attend_strips(q, k[..., :whole, :], v[..., :whole, :], strip), rest) if whole else rest

    def strips(x: Array) -> Array:
        return x.reshape(*x.shape[:-2], -1, strip, x.shape[-1])

    scores = q[..., None, :, :] @ strips(k).mT  # (..., strips, R, strip)
    m = xp.max(scores, axis=(-3, -1), keepdims=True)
    scores -= m
    weights = backend.exp_(scores)
    o = xp.sum(weights @ strips(v), axis=-3)
    return Partial(m[..., 0, :, :], xp.sum(weights, axis=(-3, -1))[..., None], o)


def fold(partials: Iterable[Partial]) -> Partial:
    """Merge the partials of all tiles, one after another: flash attention without the fusion."""
    return functools.reduce(merge, partials)


def causal_bias(q_positions: Array, k_positions: Array, dtype: str) -> Array:
    """(T, S): 0 where the key's position is not after the query's, -inf where it is."""
    backend = backend_of(q_positions)
    visible = k_positions[None, :] <= q_positions[:, None]
    zero = backend.zeros(visible.shape, dtype)
    return backend.xp.where(visible, zero, zero - math.inf)


def dense(q: Array, k: Array, v: Array, scale: float | None = None, causal: bool = True) -> Array:
    """The textbook formula, with the whole score matrix at once: what every cache is compared with.

    q (..., Hq, T, D), the last T positions; k (..., Hkv, S, D); v (..., Hkv, S, Dv); Hq a multiple of Hkv, T <= S.
    Returns (..., Hq, T, Dv) in the dtype of q. ``scale`` defaults to 1 / sqrt(D).
    """
    backend, xp = backend_of(q), backend_of(q).xp
    *lead, hq, t, d = q.shape
    hkv, s = k.shape[-3:-1]
    scale = 1 / math.sqrt(d) if scale is None else scale
    scores = (q * scale).reshape(*lead, hkv, hq // hkv, t, d) @ k[..., :, None, :, :].mT
    if causal:
        positions = backend.asarray(xp.arange(s))
        scores = scores + causal_bias(positions[s - t :], positions, backend.dtype_name(q))
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    return (weights @ v[..., :, None, :, :]).reshape(*lead, hq, t, v.shape[-1])


def _finite(m: Array) -> Array:
    """``m`` with -inf replaced by 0, so that a row that has seen nothing gives exp(-inf) = 0 and not NaN."""
    xp = backend_of(m).xp
    return xp.where(m == -math.inf, xp.zeros_like(m), m)
