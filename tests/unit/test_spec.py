"""CacheSpec: what it refuses, and bytes per token against figures computed by hand and published."""

import dataclasses

import pytest

from kvlib import CacheSpec


@pytest.mark.parametrize("name", ["num_kv_heads", "head_dim", "num_layers", "v_head_dim", "latent"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, False, "8", [8], float("inf")], ids=repr)
def test_sizes_are_positive_integers(name, value):
    with pytest.raises(ValueError) as info:
        CacheSpec(**{"num_kv_heads": 2, "head_dim": 8} | {name: value})
    assert str(info.value) == f"CacheSpec.{name} must be a positive integer, got {value!r}"


@pytest.mark.parametrize("name", ["num_kv_heads", "head_dim", "num_layers"])
def test_only_the_value_sizes_may_be_left_out(name):
    with pytest.raises(ValueError, match=f"CacheSpec.{name} must be a positive integer, got None"):
        CacheSpec(**{"num_kv_heads": 2, "head_dim": 8} | {name: None})


@pytest.mark.parametrize("dtype", ["int8", "fp16", "", None, "Float16"])
def test_dtype(dtype):
    with pytest.raises(ValueError, match="one of float64, float32, float16, bfloat16, got"):
        CacheSpec(2, 8, dtype=dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {"head_dim": 8, "latent": 9},
        {"head_dim": 8, "latent": 4, "v_head_dim": 8},
        {"head_dim": 8, "latent": 8, "v_head_dim": 4},
    ],
)
def test_latent_and_widths_agree(settings):
    with pytest.raises(ValueError, match=f"latent={settings['latent']}.*head_dim=8"):
        CacheSpec(1, **settings)


def test_latent_of_the_whole_key_is_allowed():
    spec = CacheSpec(1, 8, latent=8)
    assert (spec.value_dim, spec.stored_value_dim, spec.elements_per_token) == (8, 0, 8)


def test_widths():
    same, narrow, latent = CacheSpec(2, 8), CacheSpec(2, 8, v_head_dim=4), CacheSpec(1, 8, latent=6)
    assert [(s.value_dim, s.stored_value_dim) for s in (same, narrow, latent)] == [(8, 8), (4, 4), (6, 0)]


def test_bytes_by_hand():
    # three layers of two heads, keys of 8 and values of 4: 3 * 2 * (8 + 4) = 72 numbers
    for dtype, size in {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}.items():
        spec = CacheSpec(num_kv_heads=2, head_dim=8, num_layers=3, v_head_dim=4, dtype=dtype)
        assert spec.elements_per_token == 72
        assert spec.bytes_per_token == 72 * size


# Bytes per token at two bytes a number, with the shapes from each model's config.json.
PUBLISHED = {
    "Llama-3-8B": (131_072, {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128}),
    "Llama-3.1-70B": (327_680, {"num_layers": 80, "num_kv_heads": 8, "head_dim": 128}),
    # DeepSeek-V3 (2025), Table 1: 327.680, 516.096 and 70.272 KB
    "Qwen2.5-72B": (327_680, {"num_layers": 80, "num_kv_heads": 8, "head_dim": 128}),
    "Llama-3.1-405B": (516_096, {"num_layers": 126, "num_kv_heads": 8, "head_dim": 128}),
    "DeepSeek-V3": (70_272, {"num_layers": 61, "num_kv_heads": 1, "head_dim": 512 + 64, "latent": 512}),
    # DeepSeek-V2: 34,560 numbers
    "DeepSeek-V2": (69_120, {"num_layers": 60, "num_kv_heads": 1, "head_dim": 512 + 64, "latent": 512}),
    # PagedAttention (Kwon et al. 2023), section 3: "800 KB"
    "OPT-13B": (800 * 1024, {"num_layers": 40, "num_kv_heads": 40, "head_dim": 128}),
}


@pytest.mark.parametrize("model", list(PUBLISHED))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bytes_as_published(model, dtype):
    bytes_per_token, shape = PUBLISHED[model]
    assert CacheSpec(**shape, dtype=dtype).bytes_per_token == bytes_per_token


def test_a_spec_does_not_change():
    spec = CacheSpec(2, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.head_dim = 9
    assert spec == CacheSpec(2, 8, 1, "float16")
    assert len({spec, CacheSpec(2, 8), CacheSpec(2, 9)}) == 2
