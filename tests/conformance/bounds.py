"""How far an answer may be from the float64 reference: the one place where the suite's bounds come from.

Three things can move an output, and each has a bound that follows from a number format or from what the codec
itself states:

1. Storage. A codec changes an element x of K or V by at most `stored_error`. A lossless codec changes nothing
   that is already in its dtype, and rounds the rest. A lossy codec states its bound: it has a method
   ``max_error(rows: (..., T, D) float64 array) -> array of the same shape``, and joins this suite by having it.
   Tokens that wait in the open tail are off by the rounding to the spec's dtype alone.
2. Softmax. If every score of a row moves by at most e, every weight changes by a factor within
   exp(-2e) … exp(2e), so that |sum(w' v' - w v)| <= (exp(2e) - 1) * max|v| + max|v' - v|. See `output_error`.
3. Arithmetic and the output's own dtype. See `ARITHMETIC`.
"""

import math

import numpy as np

import kvlib
from kvlib.codecs import Codec, Plain, Split
from tests.conformance import reference
from tests.conformance.reference import SUBNORMAL, UNIT_ROUNDOFF

# kvlib's promise for float32: at most 2e-6 of the largest output. The same number of units in the last
# place for float64.
ARITHMETIC = {"float32": 2e-6, "float64": 2e-6 * UNIT_ROUNDOFF["float64"] / UNIT_ROUNDOFF["float32"]}


def rounding(x: np.ndarray, dtype: str) -> np.ndarray:
    """The most that rounding to ``dtype`` can move each element of ``x``."""
    return np.maximum(np.abs(x) * UNIT_ROUNDOFF[dtype], SUBNORMAL[dtype] / 2)


def lossless(codec: Split) -> bool:
    return isinstance(codec.k, Plain) and isinstance(codec.v, Plain)


def closed_tokens(codec: Split, length: int) -> int:
    """How many of a sequence's first tokens are encoded, when nothing was cut off: the rest lie exact in the tail."""
    return max(0, (length - codec.residual) // codec.group * codec.group) if codec.tail else length


def stored_error(
    cache: kvlib.KVCache, side: str, x: np.ndarray, in_dtype: str, closed: int | None = None
) -> np.ndarray:
    """The most that storing ``x`` (..., S, D), the tokens 0 … S-1 of a sequence in ``in_dtype``, can move each number.

    ``side`` is "k" or "v". ``closed``: tokens that are encoded; None is what follows from their number.
    """
    codec, x = cache.codec, np.asarray(x, np.float64)
    if not x.size:
        return np.zeros_like(x)
    one = codec.k if side == "k" or cache.spec.latent else codec.v
    if not codec.tail:
        return _encoded_error(one, x, in_dtype)
    closed = closed_tokens(codec, x.shape[-2]) if closed is None else closed
    waited = reference.rounded(x, cache.spec.dtype)  # what lies in the tail, and what is encoded later
    error = np.abs(waited - x)
    if closed:
        error[..., :closed, :] += _encoded_error(one, waited[..., :closed, :], cache.spec.dtype)
    return error


def stored_errors(
    cache: kvlib.KVCache, k: np.ndarray, v: np.ndarray, in_dtype: str, closed: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`stored_error` of both sides; where V is a view of K, so is its error."""
    k_error = stored_error(cache, "k", k, in_dtype, closed)
    if cache.spec.latent:
        return k_error, k_error[..., : cache.spec.latent]
    return k_error, stored_error(cache, "v", v, in_dtype, closed)


def _encoded_error(codec: Codec, x: np.ndarray, in_dtype: str) -> np.ndarray:
    if not isinstance(codec, Plain):
        return codec.max_error(x)
    if (
        UNIT_ROUNDOFF[codec.dtype] <= UNIT_ROUNDOFF[in_dtype]
        and SUBNORMAL[codec.dtype] <= SUBNORMAL[in_dtype]
    ):
        return np.zeros_like(x)  # every number of in_dtype is a number of codec.dtype
    return rounding(x, codec.dtype)


def output_error(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    k_error: np.ndarray,
    v_error: np.ndarray,
    expected: np.ndarray,
    out_dtype: str,
    scale: float | None = None,
) -> np.ndarray:
    """The bound on |out - expected| for one sequence, broadcastable to (Hq, T, Dv).

    Shapes as in `reference.attention`; ``k_error`` and ``v_error`` have the shapes of k and v.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[0] // k.shape[0]
    score_error = abs(scale) * np.abs(q) @ np.repeat(k_error, group, axis=0).swapaxes(1, 2)  # (Hq, T, S)
    score_error = score_error.max(axis=-1, keepdims=True)
    storage = np.expm1(2 * score_error) * np.abs(v).max() + v_error.max()
    compute_dtype = "float64" if out_dtype == "float64" else "float32"
    arithmetic = ARITHMETIC[compute_dtype] * np.abs(expected).max()
    bound = storage + arithmetic
    if out_dtype != compute_dtype:
        bound = bound + rounding(np.abs(expected) + bound, out_dtype)
    return bound


def decoded_error(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None) -> float:
    """The bound on |out - attention over k and v|, where k and v are the rows as `read` decodes them, all in float32.

    A codec may multiply codes, offsets and turned rows instead of the rows. None of these has a number larger than
    twice the norm of a row, and an offset once that: a product of D of them with q is summed up of magnitudes below
    3 sqrt(D) |q| |k|, and is off by at most D + 8 roundings of that, in any order. The same for the values.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale

    def norm(x: np.ndarray) -> float:
        return float(np.linalg.norm(x, axis=-1).max())

    width, length = k.shape[-1], k.shape[-2]
    unit = 3 * UNIT_ROUNDOFF["float32"]
    score_error = abs(scale) * (width + 8) * unit * math.sqrt(width) * norm(q) * norm(k)
    value_error = (length + v.shape[-1] + 8) * unit * math.sqrt(v.shape[-1]) * norm(v)
    return float(np.expm1(2 * score_error) * np.abs(v).max() + value_error)
