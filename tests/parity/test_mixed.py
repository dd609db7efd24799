"""Latents, windows, sinks and experts against transformers: every family, backend and kind of cache."""

import json

import numpy as np
import pytest

import kvlib
from kvlib.config import ModelConfig

from .conftest import MIXED, PLACES, WINDOW, build, learned, loaded, logits_of

TOLERANCE = 1e-4  # absolute, on float32 logits of a few units
CHUNKS = (23, 1, 30, 1, 1, 4)
CACHES = ["contiguous", "paged", "fitting", "fitting-paged"]


@pytest.fixture(params=PLACES)
def model(request, mixed, torch):
    return loaded(mixed, request.param, torch)


@pytest.fixture(params=CACHES)
def cache(request, model):
    """One that keeps everything in every layer, or one that fits the model; contiguous or in small blocks."""
    block_size = 4 if "paged" in request.param else None
    if "fitting" in request.param:
        return model.new_cache(1, 128, chunk=max(CHUNKS), block_size=block_size)
    where = {"backend": model.backend.name, "device": model.backend.device}
    return kvlib.KVCache(model.spec, 1, 128, block_size=block_size, **where)


def test_the_reference_says_something(mixed, torch):
    """Generations that repeat one token, or hang on a near tie, would prove nothing."""
    assert len(set(mixed.generated)) >= 15
    tokens = torch.tensor([mixed.prompt[0].tolist() + mixed.generated])
    with torch.no_grad():
        best = mixed.model(tokens).logits[0, mixed.prompt.shape[1] - 1 : -1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 5 * TOLERANCE


def test_every_parameter_matters(mixed, torch):
    """Otherwise a model that drops a sink, a correction or a norm would pass."""
    prompt = torch.from_numpy(mixed.prompt)
    for name, parameter in learned(mixed.model).items():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(torch.ones_like(kept) if "norm" in name else torch.zeros_like(kept))
            changed = mixed.model(prompt).logits[0].numpy()
            parameter.copy_(kept)
        change = abs(changed - mixed.logits).max()
        assert change > 10 * TOLERANCE, f"{name} changes the logits by only {change}"


def test_windows_matter(mixed):
    """A model that sees everything answers otherwise: so a window that is not kept would be noticed."""
    model = kvlib.Transformer.from_pretrained(mixed.path)
    settings = json.loads((mixed.path / "config.json").read_text())
    blind = kvlib.Transformer(
        ModelConfig.from_dict({**settings, "sliding_window": 1000}), model._weights, model.backend, model.dtype
    )
    difference = abs(np.asarray(blind(mixed.prompt))[0] - mixed.logits).max()
    assert difference > 100 * TOLERANCE if model.config.sliding_window else difference < TOLERANCE


def test_one_pass(model, mixed, record_property):
    got = logits_of(model, mixed.prompt)[0]
    record_property("max_difference", float(abs(got - mixed.logits).max()))
    np.testing.assert_allclose(got, mixed.logits, rtol=0, atol=TOLERANCE)


def test_chunks(model, cache, mixed, record_property):
    pieces = np.split(mixed.prompt, np.cumsum(CHUNKS)[:-1], axis=1)
    got = np.concatenate([logits_of(model, piece, cache)[0] for piece in pieces])
    record_property("max_difference", float(abs(got - mixed.cached_logits).max()))
    np.testing.assert_allclose(got, mixed.cached_logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cache", ["contiguous", "fitting-paged"], indirect=True)
def test_greedy_generation(model, cache, mixed):
    prompt, new = mixed.prompt[0].tolist(), len(mixed.generated)
    assert list(kvlib.generate(model, prompt, new, cache=cache)) == mixed.generated == mixed.recomputed


@pytest.mark.parametrize("kind", [None, False], ids=["default-cache", "no-cache"])
def test_greedy_generation_unprepared(model, mixed, kind):
    prompt, new = mixed.prompt[0].tolist(), len(mixed.generated)
    assert list(kvlib.generate(model, prompt, new, cache=kind)) == mixed.generated


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_round_trip(mixed, backend, tmp_path, torch, transformers):
    """What kvlib writes, transformers reads, and gives the same logits; nothing of the config is lost."""
    model = kvlib.Transformer.from_pretrained(mixed.path, backend)
    model.save_pretrained(tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is type(mixed.model) and theirs.dtype == torch.float32
    assert not any(report.values()), report
    with torch.no_grad():
        logits = theirs(torch.from_numpy(mixed.prompt)).logits[0].numpy()
    np.testing.assert_allclose(logits, mixed.logits, rtol=0, atol=1e-6)
    again = kvlib.Transformer.from_pretrained(tmp_path, backend)
    assert again.config == model.config
    assert np.array_equal(*(np.asarray(m(mixed.prompt)) for m in (model, again)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_torch(mixed, torch, transformers, dtype):
    """Rounding weights and activations costs kvlib no more than it costs transformers."""
    half = transformers.AutoModelForCausalLM.from_pretrained(mixed.path, dtype=getattr(torch, dtype))
    with torch.no_grad():
        theirs = half(torch.from_numpy(mixed.prompt)).logits[0].float().numpy()
    model = kvlib.Transformer.from_pretrained(mixed.path, "torch", dtype=dtype)
    ours = logits_of(model, mixed.prompt, model.new_cache(1, 64))[0]
    assert model.spec.dtype == dtype

    def error(logits: np.ndarray) -> float:
        return float(np.median(abs(logits - mixed.logits)))  # where rounding changes a token's experts, it is lost

    assert 0 < error(ours) < 1.2 * error(theirs), (error(ours), error(theirs))


def test_layers_that_guess_ahead_are_left_out(torch, transformers, tmp_path):
    """DeepSeek-V3 comes with one layer more than it counts; more than it announces is an error, as ever."""
    from safetensors.numpy import load_file, save_file

    build(torch, transformers, "deepseek-v3").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    before = kvlib.Transformer.from_pretrained(tmp_path)
    save_file(tensors | {"model.layers.3.enorm.weight": np.ones(64, np.float32)}, tmp_path / "model.safetensors")
    assert kvlib.Transformer.from_pretrained(tmp_path).num_parameters == before.num_parameters
    save_file(tensors | {"model.layers.4.enorm.weight": np.ones(64, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds model.layers.4.enorm.weight, which config.json does not ask for"):
        kvlib.Transformer.from_pretrained(tmp_path)


def test_the_correction_stays_exact(torch, transformers, tmp_path):
    """It decides between near ties, so a half-precision model keeps it in float32; transformers does too."""
    model = build(torch, transformers, "deepseek-v3")
    model.save_pretrained(tmp_path)
    ours = kvlib.Transformer.from_pretrained(tmp_path, "torch", dtype="bfloat16")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(ours._weights[name], learned(model)[name])
    assert ours._weights["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_what_the_cache_stores(model, mixed):
    """A latent model stores one row to a token; windows hold no more than they can see, and one step."""
    config, spec = model.config, model.spec
    if config.latent:
        assert (spec.num_kv_heads, spec.head_dim, spec.latent, spec.stored_value_dim) == (1, 24, 16, 0)
        assert spec.elements_per_token == 3 * 24
        return
    fitting = model.new_cache(1, 4096, chunk=10, block_size=1)
    for start in range(0, 60, 10):
        model(mixed.prompt[:, start : start + 10], fitting)
    windows = [cache.eviction.window if cache.eviction else None for cache in fitting.caches]
    assert set(windows) == set(config.windows)
    for window, cache in zip(windows, fitting.caches, strict=True):
        assert cache.num_blocks == (4096 if window is None else WINDOW - 1 + 10)
        assert len(cache.block_table(0)) == (60 if window is None else WINDOW - 1 + 10)


def test_all_families_are_here():
    """The list that the tests above go through, by name: an empty fixture would test nothing."""
    assert {prefix for prefix, _ in MIXED.values()} == {
        "Mistral", "Qwen3", "Gemma3", "GptOss", "DeepseekV3", "DeepseekV2"
    }  # fmt: skip
