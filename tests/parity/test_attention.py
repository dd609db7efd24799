"""Attention against torch's own, and against the formula in float64."""

import math

import numpy as np
import pytest

import kvlib
from kvlib.attention import dense

# (query heads, KV heads, new tokens, all tokens, head_dim, value_dim)
SHAPES = [
    (4, 4, 1, 37, 16, 16),
    (8, 2, 1, 129, 32, 32),
    (8, 1, 5, 64, 24, 24),
    (6, 3, 33, 33, 8, 8),
    (4, 2, 7, 40, 16, 12),
]
IDS = ["mha-decode", "gqa-decode", "mqa-chunk", "gqa-prefill", "gqa-chunk-narrow-v"]


def draw(hq: int, hkv: int, t: int, s: int, d: int, dv: int, batch: int = 2) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(7)
    shapes = ((batch, hq, t, d), (batch, hkv, s, d), (batch, hkv, s, dv))
    return tuple(2 * rng.standard_normal(shape) for shape in shapes)


def slow_float64(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float | None = None,
    window: int | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """One query at a time, one head at a time, straight from the definition."""
    batch, hq, t, d = q.shape
    hkv, s = k.shape[1:3]
    scale = 1 / math.sqrt(d) if scale is None else scale
    out = np.empty((batch, hq, t, v.shape[-1]))
    for b, h, i in np.ndindex(batch, hq, t):
        seen = s - t + i + 1  # the last query sees everything: the mask's corner is at the lower right
        visible = slice(0 if window is None else max(0, seen - window), seen)
        scores = k[b, h // (hq // hkv), visible] @ q[b, h, i] * scale
        weights = np.exp(scores)
        drained = 0 if sinks is None else np.exp(sinks[h])
        out[b, h, i] = weights @ v[b, h // (hq // hkv), visible] / (weights.sum() + drained)
    return out


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))


def attend_through_cache(q, k, v, backend: str, block_size: int | None, scale: float | None):
    batch, hkv, s, d = k.shape
    spec = kvlib.CacheSpec(hkv, d, dtype="float32", v_head_dim=v.shape[-1])
    cache = kvlib.KVCache(spec, batch, max_tokens=s, block_size=block_size, backend=backend)
    cache.append(k, v)
    return cache.attend(q, scale=scale)


WAYS = {
    "dense": lambda q, k, v, backend, scale: dense(q, k, v, scale),
    "contiguous": lambda q, k, v, backend, scale: attend_through_cache(q, k, v, backend, None, scale),
    "paged": lambda q, k, v, backend, scale: attend_through_cache(q, k, v, backend, 16, scale),
}


@pytest.mark.parametrize("scale", [None, 0.3], ids=["default-scale", "given-scale"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("way", WAYS)
def test_against_float64(way, backend, shape, scale, torch):
    q, k, v = draw(*shape)
    single = [x.astype(np.float32) for x in (q, k, v)]
    expected = slow_float64(*(x.astype(np.float64) for x in single), scale)
    arrays = single if backend == "numpy" else [torch.from_numpy(x) for x in single]
    got = WAYS[way](*arrays, backend, scale)
    assert relative(np.asarray(got), expected) <= 2e-6


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("way", WAYS)
def test_against_torch(way, shape, torch):
    hq, hkv, t, s, *_ = shape
    q, k, v = (torch.from_numpy(x.astype(np.float32)) for x in draw(*shape))
    mask = torch.ones(t, s, dtype=torch.bool).tril(diagonal=s - t)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=hq != hkv)
    assert relative(WAYS[way](q, k, v, "torch", None).numpy(), expected.numpy()) <= 2e-6


def test_the_mask_is_aligned_at_the_lower_right(torch):
    """torch's is_causal aligns at the upper left: right for a whole prompt, wrong for its last tokens."""
    q, k, v = (torch.from_numpy(x.astype(np.float32)) for x in draw(4, 2, 7, 40, 16, 16))
    upper_left = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert relative(dense(q, k, v).numpy(), upper_left.numpy()) > 0.1


def test_dense_without_mask(torch):
    q, k, v = (torch.from_numpy(x.astype(np.float32)) for x in draw(4, 2, 7, 40, 16, 16))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert relative(dense(q, k, v, causal=False).numpy(), expected.numpy()) <= 2e-6


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("sinks", [False, True], ids=["no-sinks", "sinks"])
@pytest.mark.parametrize("window", [None, 1, 5, 1000])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[4]], ids=["decode", "prefill", "chunk"])
def test_windows_and_sinks(shape, window, sinks, backend, torch):
    q, k, v = (x.astype(np.float32) for x in draw(*shape))
    sinks = np.linspace(-2, 8, shape[0], dtype=np.float32) if sinks else None  # from no matter to most of the weight
    expected = slow_float64(*(x.astype(np.float64) for x in (q, k, v)), window=window, sinks=sinks)
    if backend == "torch":
        q, k, v, sinks = (x if x is None else torch.from_numpy(x) for x in (q, k, v, sinks))
    assert relative(np.asarray(dense(q, k, v, window=window, sinks=sinks)), expected) <= 2e-6
