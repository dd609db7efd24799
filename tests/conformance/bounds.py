"""How far an answer may be from the float64 reference: the one place where the suite's bounds come from.

Three things can move an output, and each has a bound that follows from a number format or from what the codec
itself states:

1. Storage. A codec changes an element x of K or V by at most `stored_error`. A lossless codec changes nothing
   that is already in its dtype, and rounds the rest. A lossy codec states its bound: it has a method
   ``max_error(rows: (..., D) float64 array) -> array of the same shape``, and joins this suite by having it.
2. Softmax. If every score of a row moves by at most e, every weight changes by a factor within
   exp(-2e) … exp(2e), so that |sum(w' v' - w v)| <= (exp(2e) - 1) * max|v| + max|v' - v|. See `output_error`.
3. Arithmetic and the output's own dtype. See `ARITHMETIC`.
"""

import math

import numpy as np

from kvlib.codecs import Plain
from tests.conformance.reference import SUBNORMAL, UNIT_ROUNDOFF

# kvlib's promise for float32: at most 2e-6 of the largest output. The same number of units in the last
# place for float64.
ARITHMETIC = {"float32": 2e-6, "float64": 2e-6 * UNIT_ROUNDOFF["float64"] / UNIT_ROUNDOFF["float32"]}


def rounding(x: np.ndarray, dtype: str) -> np.ndarray:
    """The most that rounding to ``dtype`` can move each element of ``x``."""
    return np.maximum(np.abs(x) * UNIT_ROUNDOFF[dtype], SUBNORMAL[dtype] / 2)


def lossless(codec: object) -> bool:
    return isinstance(codec, Plain)


def stored_error(codec: object, x: np.ndarray, in_dtype: str) -> np.ndarray:
    """The most that storing ``x``, given in ``in_dtype``, can move each of its elements. x (..., D)."""
    if not lossless(codec):
        return codec.max_error(np.asarray(x, np.float64))
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
