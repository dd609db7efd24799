"""Rotary embedding: frequencies, angles and rotation against transformers; both spellings of config.json."""

import numpy as np
import pytest

from kvlib.arrays import get_backend
from kvlib.rope import cos_sin, frequencies, read_rope, rotate

LLAMA31 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
QWEN_YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768)
SCALINGS = {
    "default": dict(rope_type="default", rope_theta=1e4),
    "linear": dict(rope_type="linear", rope_theta=1e4, factor=3.0),
    "llama3": LLAMA31,
    "yarn": QWEN_YARN,
    "yarn-settings": {**QWEN_YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn-factor": {**QWEN_YARN, "attention_factor": 0.7},
    "yarn-mscale": {**QWEN_YARN, "mscale": 0.8, "mscale_all_dim": 1.4},
}


def embedding_of(transformers, rope: dict, head_dim: int):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            max_position_embeddings=131072,
            rope_parameters=dict(rope),
        )
    )


@pytest.mark.parametrize("head_dim", [24, 64, 128])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_frequencies(transformers, scaling, head_dim):
    theirs = embedding_of(transformers, SCALINGS[scaling], head_dim)
    turn, scale = frequencies(read_rope({"rope_parameters": SCALINGS[scaling]}), head_dim)
    expected = theirs.inv_freq.numpy()
    assert turn.dtype == np.float32 and scale == pytest.approx(theirs.attention_scaling, rel=1e-12)
    assert np.all(np.abs(turn - expected) <= 2 * np.spacing(expected))  # two roundings apart at most


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("scaling", ["default", "llama3", "yarn"])
def test_rotation(torch, transformers, scaling, backend):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    kvlib_backend = get_backend(backend)
    positions = np.array([[0, 1, 2, 63, 500], [7, 8, 9, 10, 1000]])  # two sequences, each where it is
    q, k = np.random.default_rng(0).standard_normal((2, 2, 4, 5, 64)).astype(np.float32)
    theirs = embedding_of(transformers, SCALINGS[scaling], 64)
    expected = apply_rotary_pos_emb(
        *map(torch.from_numpy, (q, k)), *theirs(torch.zeros(1), torch.from_numpy(positions))
    )

    turn, scale = frequencies(read_rope({"rope_parameters": SCALINGS[scaling]}), 64)
    cos, sin = cos_sin(positions, kvlib_backend.asarray(turn), scale, kvlib_backend)
    for x, want in zip((q, k), expected, strict=True):
        got = kvlib_backend.to_numpy(rotate(kvlib_backend.asarray(x), cos, sin))
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=2e-4)


def test_only_the_distance_counts():
    """What RoPE is for: scores depend on how far apart two tokens are, not on where they are."""
    rng, backend = np.random.default_rng(3), get_backend("numpy")
    q, k = rng.standard_normal((2, 1, 1, 1, 64)).astype(np.float32)
    turn, scale = frequencies(read_rope({}), 64)

    def score(at_q: int, at_k: int) -> float:
        turned = [
            rotate(x, *cos_sin(np.array([[p]]), turn, scale, backend)) for x, p in ((q, at_q), (k, at_k))
        ]
        return float(turned[0][0, 0, 0] @ turned[1][0, 0, 0])

    assert score(105, 100) == pytest.approx(score(5, 0), abs=1e-4)
    assert abs(score(5, 0) - score(6, 0)) > 0.1


def test_both_spellings_read_the_same():
    new = {"rope_parameters": LLAMA31}
    old = {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA31.items() if k != "rope_theta"}}
    older = {
        **old,
        "rope_scaling": {"type" if k == "rope_type" else k: v for k, v in old["rope_scaling"].items()},
    }
    assert read_rope(new) == read_rope(old) == read_rope(older) == LLAMA31
    assert read_rope({"rope_theta": 5e5}) == read_rope({"rope_theta": 5e5, "rope_scaling": None})
    assert read_rope({}) == {"rope_type": "default", "rope_theta": 10000.0}


def test_the_original_context_may_stand_beside():
    scaling = {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 1e6}
    assert read_rope({**scaling, "max_position_embeddings": 777})["original_max_position_embeddings"] == 777
    beside = {**scaling, "max_position_embeddings": 777, "original_max_position_embeddings": 32768}
    assert read_rope(beside) == QWEN_YARN
    inside = {**beside["rope_scaling"], "original_max_position_embeddings": 99}
    assert read_rope({**beside, "rope_scaling": inside}) == QWEN_YARN  # transformers lets the outer one win


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported.*cached keys"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "'longrope' is not supported; supported: default, linear",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' needs factor"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            "factor must be a positive number, got 0",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
            "factor must be a positive number, got '2'",
        ),
        ({"rope_parameters": {"rope_type": "default", "twist": 3}}, "does not know: twist"),
        ({"rope_parameters": {**LLAMA31, "high_freq_factor": 1.0}}, "high_freq_factor above low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"rope_theta": -1.0}, "rope_theta must be a positive number, got -1.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "does not know: full_attention"),
    ],
)
def test_what_is_not_supported_says_so(config, message):
    with pytest.raises(ValueError, match=message):
        read_rope(config)
