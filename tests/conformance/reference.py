"""What the caches are compared with: float64 NumPy that shares no code with kvlib."""

import math

import ml_dtypes
import numpy as np

# Half a unit in the last place, relative to the number, and the spacing of the numbers closest to zero
# (IEEE 754; bfloat16 is float32 with 16 bits fewer).
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SUBNORMAL = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
NUMPY_DTYPE = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
}


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float | None = None,
    visible: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Attention of one sequence, one query head at a time, in float64.

    q (Hq, T, D), the last T positions; k (Hkv, S, D); v (Hkv, S, Dv) -> (Hq, T, Dv). Query head h reads
    K/V head h // (Hq / Hkv). ``visible`` and ``sinks`` as in `weights`.
    """
    group = q.shape[0] // k.shape[0]
    each = weights(q, k, scale, visible, sinks)
    return np.stack([each[head] @ np.asarray(v[head // group], np.float64) for head in range(len(q))])


def weights(
    q: np.ndarray,
    k: np.ndarray,
    scale: float | None = None,
    visible: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """The attention weights (Hq, T, S) of q (Hq, T, D) and k (Hkv, S, D), in float64.

    ``visible`` (T, S) says which keys a query sees; None is causal. A query that sees none has weights of zero.
    ``sinks`` (Hq,): a score for each head that takes part in the softmax, and whose weight is left out.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    query_heads, tokens, width = q.shape
    kv_heads, length, _ = k.shape
    scale = 1 / math.sqrt(width) if scale is None else scale
    if visible is None:
        visible = np.arange(length)[None, :] <= np.arange(length - tokens, length)[:, None]
    out = np.zeros((query_heads, tokens, length))
    for head in range(query_heads):
        kv_head = head // (query_heads // kv_heads)
        scores = np.where(visible, scale * (q[head] @ k[kv_head].T), -np.inf)
        if sinks is not None:
            scores = np.concatenate([np.full((tokens, 1), sinks[head]), scores], axis=1)
        top = scores.max(axis=1, keepdims=True, initial=-np.inf)
        powers = np.exp(scores - np.where(np.isfinite(top), top, 0))
        total = powers.sum(axis=1, keepdims=True)
        out[head] = (powers / np.where(total == 0, 1, total))[:, -length:] if length else 0
    return out


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """``x`` rounded to ``dtype``, as float64."""
    return np.asarray(x, np.float64).astype(NUMPY_DTYPE[dtype]).astype(np.float64)
