"""Attention as a fold over tiles.

A tile is some keys and values, whatever stored them. Attending one tile gives a `Partial`; two partials `merge` into
the partial of both tiles, in any order and any grouping. So the functions below are at once online softmax, flash
attention, chunked prefill and split-KV decoding: only who cuts the tiles differs.

Sources: online softmax, Milakov & Gimelshein 2018 (arXiv:1805.02867); FlashAttention, Dao et al. 2022
(arXiv:2205.14135); split-KV ("Flash-Decoding"), Dao et al. 2023.
"""

import functools
import math
from collections.abc import Callable, Iterable
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
        """The attention output, (..., R, Dv); zero where a row has seen nothing."""
        xp = backend_of(self.l).xp
        return self.o / xp.where(self.l == 0, xp.ones_like(self.l), self.l)


def attend_tile(q: Array, k: Array, v: Array, bias: Array | None = None, strip: int = 0) -> Partial:
    """Attend one tile: q (..., R, D), already scaled; k (..., S, D); v (..., S, Dv).

    ``bias`` is added to the scores and must broadcast to (..., T, S), where T divides R (rows repeat it): 0 where a key
    may be seen, -inf where not. A row that sees nothing gets m = -inf, l = 0, o = 0, which merges as nothing.
    ``strip`` cuts the two products, see `score`.
    """
    return attend_scores(score(q, k, strip), lambda weights: mix(weights, v, strip), bias)


def attend_scores(scores: Array, mix_values: Callable[[Array], Array], bias: Array | None = None) -> Partial:
    """What is left of a tile once its keys have become scores (..., R, S), which this overwrites.

    ``mix_values`` turns weights (..., R, S) into weighted sums of the values (..., R, Dv). So keys and values need
    never exist as rows: a codec that can score and mix what it stores is enough.
    """
    backend, xp = backend_of(scores), backend_of(scores).xp
    if bias is not None:
        add_bias(scores, bias)
    m = xp.max(scores, axis=-1, keepdims=True)
    scores -= m if bias is None else _finite(m)
    weights = backend.exp_(scores)
    return Partial(m, xp.sum(weights, axis=-1, keepdims=True), mix_values(weights))


def add_bias(scores: Array, bias: Array) -> None:
    """Add bias (..., T, S) to scores (..., R, S) in place: a row is a query head of a group and a position."""
    by_position = scores.reshape(*scores.shape[:-2], -1, *bias.shape[-2:])
    by_position += bias if bias.ndim == 2 else bias[..., None, :, :]


def score(q: Array, k: Array, strip: int = 0) -> Array:
    """q (..., R, D) k^T (..., S, D) -> (..., R, S).

    With ``strip``, as a stack of products over ``strip`` keys each: a small product runs on the thread that asks for
    it, where a large one would wake BLAS's own threads. So several threads can each attend a tile of their own.
    """
    whole = k.shape[-2] // strip * strip if strip else 0
    if not whole:
        return q @ k.mT
    backend, xp = backend_of(q), backend_of(q).xp
    scores = backend.empty((*k.shape[:-2], q.shape[-2], k.shape[-2]), backend.dtype_name(q))
    by_strip = scores[..., :whole].reshape(*scores.shape[:-1], -1, strip).swapaxes(-3, -2)  # (..., strips, R, strip)
    xp.matmul(q[..., None, :, :], _strips(k[..., :whole, :], strip).mT, out=by_strip)
    if whole < k.shape[-2]:
        scores[..., whole:] = q @ k[..., whole:, :].mT
    return scores


def mix(weights: Array, v: Array, strip: int = 0) -> Array:
    """Weights (..., R, S) v (..., S, Dv) -> (..., R, Dv); ``strip`` as in `score`."""
    whole = v.shape[-2] // strip * strip if strip else 0
    if not whole:
        return weights @ v
    by_strip = weights[..., :whole].reshape(*weights.shape[:-1], -1, strip).swapaxes(-3, -2)
    o = backend_of(v).xp.sum(by_strip @ _strips(v[..., :whole, :], strip), axis=-3)
    return o if whole == v.shape[-2] else o + weights[..., whole:] @ v[..., whole:, :]


def merge(a: Partial, b: Partial) -> Partial:
    """The partial of two tiles together. Associative and commutative, up to rounding."""
    backend, xp = backend_of(a.m), backend_of(a.m).xp
    m = xp.maximum(a.m, b.m)
    shift = _finite(m)
    keep_a, keep_b = backend.exp_(a.m - shift), backend.exp_(b.m - shift)
    return Partial(m, a.l * keep_a + b.l * keep_b, a.o * keep_a + b.o * keep_b)


def mass(scores: Array, whole: Partial) -> Array:
    """The attention weights of a tile, (..., S), added up over rows: scores (..., R, S), which this overwrites, and the
    partial of the same rows over all tiles.
    """
    scores -= _finite(whole.m)
    weights = backend_of(scores).exp_(scores)
    xp = backend_of(scores).xp
    return xp.sum(weights / xp.where(whole.l == 0, xp.ones_like(whole.l), whole.l), axis=-2)


def with_sinks(whole: Partial, sinks: Array) -> Partial:
    """Learned sinks (Hkv, group) join the softmax of rows (Hkv, group x positions) as one more key, of value zero.

    Source: gpt-oss, OpenAI 2025 (arXiv:2508.10925).
    """
    xp = backend_of(whole.m).xp
    by_head = whole.m.reshape(*sinks.shape, -1)
    m = (xp.zeros_like(by_head) + sinks[..., None]).reshape(whole.m.shape)
    return merge(whole, Partial(m, xp.ones_like(m), xp.zeros_like(whole.o)))


def fold(partials: Iterable[Partial]) -> Partial:
    """Merge the partials of all tiles, one after another: flash attention without the fusion."""
    return functools.reduce(merge, partials)


def causal_bias(q_positions: Array, k_positions: Array, dtype: str) -> Array:
    """(T, S): 0 where the key's position is not after the query's, -inf where it is."""
    backend = backend_of(q_positions)
    visible = k_positions[None, :] <= q_positions[:, None]
    zero = backend.zeros(visible.shape, dtype)
    return backend.xp.where(visible, zero, zero - math.inf)


def dense(
    q: Array,
    k: Array,
    v: Array,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: Array | None = None,
) -> Array:
    """The textbook formula, with the whole score matrix at once: what every cache is compared with.

    q (..., Hq, T, D), the last T positions; k (..., Hkv, S, D); v (..., Hkv, S, Dv); Hq a multiple of Hkv, T <= S.
    Returns (..., Hq, T, Dv) in the dtype of q. ``scale`` defaults to 1 / sqrt(D). With ``window`` a query sees its own
    position and the window - 1 before it. ``sinks`` (Hq,) are scores that join each softmax and give no value.
    """
    backend, xp = backend_of(q), backend_of(q).xp
    *lead, hq, t, d = q.shape
    hkv, s = k.shape[-3:-1]
    scale = 1 / math.sqrt(d) if scale is None else scale
    scores = (q * scale).reshape(*lead, hkv, hq // hkv, t, d) @ k[..., :, None, :, :].mT
    positions = backend.asarray(xp.arange(s))
    if causal:
        scores = scores + causal_bias(positions[s - t :], positions, backend.dtype_name(q))
    if window is not None:
        too_old = positions[None, :] <= positions[s - t :, None] - window
        scores = xp.where(too_old, backend.zeros((), backend.dtype_name(q)) - math.inf, scores)
    top = xp.max(scores, axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.reshape(hkv, hq // hkv, 1, 1)
        top = xp.maximum(top, sinks)
    weights = xp.exp(scores - top)
    total = xp.sum(weights, axis=-1, keepdims=True)
    weights = weights / (total if sinks is None else total + xp.exp(sinks - top))
    return (weights @ v[..., :, None, :, :]).reshape(*lead, hq, t, v.shape[-1])


def _strips(x: Array, strip: int) -> Array:
    """(..., S, D) -> (..., S / strip, strip, D)."""
    return x.reshape(*x.shape[:-2], -1, strip, x.shape[-1])


def _finite(m: Array) -> Array:
    """``m`` with -inf replaced by 0, so that a row that has seen nothing gives exp(-inf) = 0 and not NaN."""
    xp = backend_of(m).xp
    return xp.where(m == -math.inf, xp.zeros_like(m), m)
