"""The arithmetic that every decoder shares: linear maps, root-mean-square norms, activations."""

import math
from collections.abc import Callable

from kvlib.arrays import Array, backend_of

Weights = dict[str, Array]


def linear(x: Array, w: Weights, name: str) -> Array:
    """x (..., inputs) -> x W^T + b (..., outputs). W is stored as (outputs, inputs); b may be absent."""
    rows = x.reshape(-1, x.shape[-1]) @ w[f"{name}.weight"].mT  # one matrix product, whatever the batch
    if f"{name}.bias" in w:
        rows = rows + w[f"{name}.bias"]
    return rows.reshape(*x.shape[:-1], -1)


def rms_norm(x: Array, weight: Array, eps: float, offset: float = 0.0) -> Array:
    """x over its root mean square, times ``weight`` (RMSNorm, Zhang & Sennrich 2019, arXiv:1910.07467).

    ``offset`` is what a checkpoint has taken off its weights: 1 for Gemma, which also rounds after the product.
    """
    backend = backend_of(x)
    wide = backend.astype(x, "float32")
    mean_square = backend.xp.mean(wide * wide, axis=-1, keepdims=True)
    unit = wide / backend.xp.sqrt(mean_square + eps)
    if offset:
        return backend.astype((offset + backend.astype(weight, "float32")) * unit, backend.dtype_name(x))
    return weight * backend.astype(unit, backend.dtype_name(x))


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), in float32."""
    return 1 / _growth(backend_of(x).astype(x, "float32"))


def silu(x: Array) -> Array:
    """x * sigmoid(x), in the dtype of x (Elfwing et al. 2017, arXiv:1702.03118)."""
    backend = backend_of(x)
    wide = backend.astype(x, "float32")
    return backend.astype(wide / _growth(wide), backend.dtype_name(x))


def gelu_tanh(x: Array) -> Array:
    """GELU by way of tanh, in the dtype of x (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2)."""
    backend = backend_of(x)
    wide = backend.astype(x, "float32")
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return backend.astype(0.5 * wide * (1 + backend.xp.tanh(inner)), backend.dtype_name(x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": silu, "gelu_tanh": gelu_tanh}


def split_heads(x: Array, width: int) -> Array:
    """(B, T, H * width) -> (B, H, T, width)."""
    return x.reshape(*x.shape[:2], -1, width).swapaxes(1, 2)


def join_heads(x: Array) -> Array:
    """(B, H, T, width) -> (B, T, H * width)."""
    batch, heads, tokens, width = x.shape
    return x.swapaxes(1, 2).reshape(batch, tokens, heads * width)


def _growth(x: Array) -> Array:
    """1 + e^-x; e^80 still fits float32, and beyond it the reciprocal is under 1e-34."""
    xp = backend_of(x).xp
    return 1 + xp.exp(xp.clip(-x, None, 80.0))
