"""Activations, norms and interleaved rotations against torch and transformers."""

import numpy as np
import pytest

from kvlib import ops
from kvlib.arrays import get_backend
from kvlib.rope import rotate

X = np.concatenate([np.linspace(-12, 12, 241), [-1e4, -100, 100, 1e4]]).astype(np.float32)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("silu", lambda f, x: f.silu(x)),
        ("gelu_tanh", lambda f, x: f.gelu(x, approximate="tanh")),
        ("sigmoid", lambda f, x: f.sigmoid(x)),
    ],
)
def test_activations(torch, backend, name, theirs):
    expected = theirs(torch.nn.functional, torch.from_numpy(X).double()).numpy()
    kind = get_backend(backend)
    with np.errstate(all="raise", under="ignore"):
        got = kind.to_numpy(getattr(ops, name)(kind.asarray(X)))
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)
    assert set(ops.ACTIVATIONS) == {"silu", "gelu_tanh"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gemma_norm(torch, transformers, dtype):
    """(1 + w), multiplied before rounding; Llama's own rounds first, and in bfloat16 that is another number."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    generator = torch.Generator().manual_seed(0)
    norm = Gemma3RMSNorm(64, eps=1e-6)
    weight = torch.randn(64, generator=generator).to(getattr(torch, dtype))
    norm.weight = torch.nn.Parameter(weight)
    x = torch.randn(7, 64, generator=generator).to(weight.dtype)
    with torch.no_grad():
        expected = norm(x)
    got = ops.rms_norm(x, weight, 1e-6, offset=1.0)
    assert got.dtype == x.dtype
    assert (got - expected).abs().max() <= (1e-6 if dtype == "float32" else 0.02)
    assert not torch.equal(ops.rms_norm(x, weight, 1e-6), got)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_interleaved_rotation(torch, backend):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 3, 5, 8)).astype(np.float32)
    cos, sin = rng.standard_normal((2, 1, 5, 4)).astype(np.float32)
    doubled = [torch.from_numpy(np.concatenate([x, x], axis=-1)) for x in (cos, sin)]
    expected = apply_rotary_pos_emb_interleave(torch.from_numpy(q), torch.from_numpy(k), *doubled)
    kind = get_backend(backend)
    for x, want in zip((q, k), expected, strict=True):
        got = rotate(*(kind.asarray(y) for y in (x, cos[:, None], sin[:, None])), interleaved=True)
        np.testing.assert_allclose(kind.to_numpy(got), want.numpy(), rtol=0, atol=1e-6)
