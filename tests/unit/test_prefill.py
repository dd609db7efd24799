"""Chunked prefill: the same answer however a prompt is cut, and the memory that was predicted."""

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib.codecs import Int, Split
from kvlib.config import ModelConfig
from kvlib.eviction import HeavyHitter, SlidingWindow
from kvlib.memory import measure
from kvlib.model import Transformer
from kvlib.peak import attention_peak, prefill_peak
from kvlib.prefill import Tiled, plan, prefill, prefill_attention

HEADS, KV_HEADS, WIDTH = 2, 1, 32


def model(layers: int = 2, dtype: str = "float32", backend: str = "numpy", device: str | None = None) -> Transformer:
    config = ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 50,
            "hidden_size": HEADS * WIDTH,
            "intermediate_size": 160,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": 8192,
        }
    )
    rng, where = np.random.default_rng(1), kvlib.arrays.get_backend(backend, device)
    shapes = config.tensor_shapes().items()
    weights = {n: where.astype(where.asarray(0.2 * rng.standard_normal(s)), dtype) for n, s in shapes}
    return Transformer(config, weights, where, dtype)


def noise(tokens: int, batch: int = 1, dtype: str = "float32") -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(tokens)
    return tuple(rng.standard_normal((batch, h, tokens, WIDTH)).astype(dtype) for h in (HEADS, KV_HEADS, KV_HEADS))


def cache_of(tokens: int, batch: int = 1, layers: int = 1, **how) -> kvlib.KVCache:
    spec = kvlib.CacheSpec(KV_HEADS, WIDTH, num_layers=layers, dtype=how.pop("dtype", "float32"))
    return kvlib.KVCache(spec, batch, tokens, **how)


# -- the plan ----------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 60), st.integers(0, 60), st.integers(1, 20))
def test_a_plan_spends_the_budget_and_no_more(tokens, budget, decodes, multiple):
    if (budget - decodes) // multiple < 1:
        with pytest.raises(ValueError, match=f"budget of {budget} tokens leaves no room.*{decodes} decodes"):
            plan(tokens, budget, decodes, multiple)
        return
    sizes = plan(tokens, budget, decodes, multiple)
    assert sum(sizes) == tokens and len(set(sizes[:-1])) <= 1
    assert all(size % multiple == 0 and budget - multiple < size + decodes <= budget for size in sizes[:-1])
    assert 1 <= sizes[-1] <= budget - decodes


def test_without_a_budget_a_prompt_is_one_chunk():
    assert plan(1000) == [1000]
    for bad in ({"tokens": 0}, {"tokens": 5, "budget": 0}, {"tokens": 5, "decodes": -1}):
        with pytest.raises(ValueError, match="integer"):
            plan(**bad)


# -- the same answer ---------------------------------------------------------------------------------

TAIL = Split(Int(8, "channel", 4), Int(8, "token", 8), residual=5)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("tile", [1, 7, 16, None])
@pytest.mark.parametrize(
    "how",
    [{}, {"block_size": 4}, {"block_size": 24}, {"codec": "int8", "block_size": 8}, {"codec": TAIL, "block_size": 8}],
    ids=str,
)
def test_tiles_change_nothing(backend, tile, how):
    """Against the cache's own attention; queries that saw a token exact while its group was open still do."""
    array = torch.from_numpy if backend == "torch" else np.asarray
    q, k, v = map(array, noise(50, batch=2, dtype="float64"))
    cache, twin = (cache_of(50, 2, backend=backend, dtype="float64", **how) for _ in range(2))
    for start, stop in ((0, 30), (30, 31), (31, 50)):
        here = slice(start, stop)
        for each in (cache, twin):
            each.append(k[:, :, here], v[:, :, here])
        for options in ({}, {"window": 9}, {"scale": 0.3, "sinks": array(np.array([0.5, -1.0]))}):
            ours = Tiled(cache, tile).attend(q[:, :, here], **options)
            np.testing.assert_allclose(ours, twin.attend(q[:, :, here], **options), rtol=0, atol=1e-12)


def test_tiles_of_a_cache_with_a_window_or_latent():
    q, k, v = noise(40, dtype="float64")
    cache = cache_of(64, dtype="float64", block_size=4, eviction=SlidingWindow(10, 2))
    spec = kvlib.CacheSpec(1, WIDTH, latent=20, dtype="float64")
    latent = kvlib.KVCache(spec, 1, 64, block_size=4)
    for start in range(0, 40, 5):
        here = slice(start, start + 5)
        cache.append(k[:, :, here], v[:, :, here])
        latent.append(k[:, :, here])
        for each in (cache, latent):
            ours = Tiled(each, 3).attend(q[:, :, here])
            np.testing.assert_allclose(ours, each.attend(q[:, :, here]), rtol=0, atol=1e-12)


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.sampled_from([1, 5, 128, None]),
    st.sampled_from([None, 3, 8]),
    st.integers(1, 3),
)
def test_a_prompt_may_be_cut_anywhere(sizes, tile, block_size, batch):
    llm = model(dtype="float64")
    ids = np.random.default_rng(sum(sizes)).integers(0, 50, (batch, sum(sizes)))
    cache, whole = (kvlib.KVCache(llm.spec, batch, 120, block_size=block_size) for _ in range(2))
    logits = prefill(llm, ids, cache, sizes, tile)
    np.testing.assert_allclose(logits, llm(ids, whole, last_only=True), rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits, prefill(llm, ids, kvlib.KVCache(llm.spec, batch, 120)), rtol=0, atol=2e-5)
    assert set(cache.lengths.values()) == {sum(sizes)}


def test_attention_of_a_layer_by_chunks():
    q, k, v = noise(60, 2, "float64")
    expected = kvlib.attention.dense(q, k, v)
    for chunk in (None, 7, [20, 1, 39]):
        for tile in (5, None):
            found = prefill_attention(q, k, v, cache_of(60, 2, dtype="float64", block_size=8), chunk, tile)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_prompt_goes_behind_what_is_there():
    llm = model(dtype="float64")
    ids = np.random.default_rng(0).integers(0, 50, (1, 30))
    cache = kvlib.KVCache(llm.spec, 3, 40)
    prefill(llm, ids[:, :11], cache, 4, seqs=[1])
    logits = prefill(llm, ids[:, 11:], cache, 4, seqs=[1])
    np.testing.assert_allclose(logits, llm(ids, last_only=True), rtol=0, atol=2e-5)
    assert cache.lengths == {0: 0, 1: 30, 2: 0}


@pytest.mark.parametrize("error, blocks", [(kvlib.CacheFull, 5), (KeyboardInterrupt, 20)])
def test_a_prefill_that_fails_leaves_nothing_behind(error, blocks, monkeypatch):
    llm = model()
    cache = kvlib.KVCache(llm.spec, 2, 80, block_size=4, num_blocks=blocks)
    llm([[1, 2, 3]], cache, [0])
    if error is KeyboardInterrupt:
        attend, calls = Tiled.attend, []

        def interrupted(self, *args, **options):
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return attend(self, *args, **options)

        monkeypatch.setattr(Tiled, "attend", interrupted)
    with pytest.raises(error):
        prefill(llm, np.ones((1, 30), int), cache, 8, seqs=[0])
    assert cache.lengths == {0: 3, 1: 0} and cache.num_free_blocks == blocks - 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda c: prefill(model(), [1, 2], c), r"\(B, T\).*got shape \(2,\)"),
        (lambda c: prefill(model(), [[1, 2, 3]], c, [1, 1]), "add up to the 3 tokens of the prompt, and make 2"),
        (lambda c: prefill(model(), [[1, 2, 3]], c, 0), "budget must be an integer"),
        (lambda c: prefill(model(), [[1, 2, 3]], c, tile=0), "tile must be an integer"),
        (lambda c: Tiled(c).attend(noise(3)[0]), "asks for the last 3 positions"),
        (lambda c: Tiled(cache_of(64, eviction=HeavyHitter(8, 8))), "learns from the cache's own attention"),
        (lambda c: attention_peak(cache_of(64, codec="int8"), 2, 9), "plain codec"),
        (lambda c: measure(list, torch.device("cpu")), "counts the memory of CUDA"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(kvlib.KVCache(model().spec, 1, 64))


# -- the memory --------------------------------------------------------------------------------------

# None: the whole prompt, which for 8K in one shot would take most of a gigabyte
CHUNKS = {512: (128, 256, None), 2048: (128, 512, None), 8192: (128, 512, 2048)}
LONG = [(tokens, chunk) for tokens, chunks in CHUNKS.items() for chunk in chunks]


@pytest.fixture(scope="module", autouse=True)
def warm():
    """What Python and NumPy set up when code runs first is no part of a prefill."""
    measure(lambda: prefill(model(), np.ones((1, 8), int), cache_of(8, layers=2), 4))


def close(predicted, measured) -> bool:
    return abs(predicted.nbytes / measured.nbytes - 1) <= 0.05


@pytest.mark.parametrize("tile", [256, None])
@pytest.mark.parametrize("tokens, chunk", LONG)
def test_the_peak_of_a_layer_was_predicted(tokens, chunk, tile):
    q, k, v = noise(tokens)
    cache = cache_of(tokens)
    predicted = attention_peak(cache, HEADS, tokens, chunk, tile)
    measured = measure(lambda: prefill_attention(q, k, v, cache, chunk, tile))
    assert close(predicted, measured)
    assert predicted.cache == cache.nbytes_used


@pytest.mark.parametrize("tile", [256, None])
@pytest.mark.parametrize("tokens, chunk", LONG)
def test_the_peak_of_a_model_was_predicted(tokens, chunk, tile):
    llm = model(layers=1 if tokens == 8192 else 3)
    ids = np.random.default_rng(0).integers(0, 50, (1, tokens))
    cache = kvlib.KVCache(llm.spec, 1, tokens)
    predicted = prefill_peak(llm, cache, tokens, chunk, tile)
    measured = measure(lambda: prefill(llm, ids, cache, chunk, tile))
    assert close(predicted, measured)
    assert predicted.cache == cache.nbytes_used


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "how", [{"block_size": 16}, {"dtype": "float16"}, {"dtype": "float16", "block_size": 32}], ids=str
)
def test_the_peak_was_predicted_for_paged_and_narrow_caches_and_batches(batch, how):
    tokens = 1500
    for chunk, tile in ((256, 128), (256, None), (700, 64), (None, None)):
        cache = cache_of(tokens, batch, **how)
        predicted = attention_peak(cache, HEADS, tokens, chunk, tile)
        work = functools.partial(prefill_attention, *noise(tokens, batch), cache, chunk, tile)
        assert close(predicted, measure(work))
        assert predicted.cache == cache.nbytes_used


def test_a_wide_feed_forward_block_can_be_the_worst_moment():
    llm = model()
    ids = np.random.default_rng(0).integers(0, 50, (2, 600))
    cache = kvlib.KVCache(llm.spec, 2, 600)
    predicted = prefill_peak(llm, cache, 600, 300, tile=16)
    assert predicted.moment == "the feed-forward block"
    assert close(predicted, measure(lambda: prefill(llm, ids, cache, 300, tile=16)))


def test_layers_of_several_kinds_have_several_caches():
    grouped = kvlib.GroupedCache.for_windows(model().spec, [None, 4], 1, 64)
    with pytest.raises(TypeError, match="must be a KVCache, got GroupedCache"):
        prefill(model(), [[1, 2, 3]], grouped)


def test_from_n_squared_to_a_chunk_of_rows_to_tiles():
    """Scores of 2 heads and the mask, in float32; and everything that is measured falls with them."""
    n, chunk, tile = 2048, 256, 128
    found = {}
    for name, cut in {"n² ": (None, None), "C n": (chunk, None), "C W": (chunk, tile)}.items():
        cache = cache_of(n)
        work = functools.partial(prefill_attention, *noise(n), cache, *cut)
        found[name] = attention_peak(cache, HEADS, n, *cut).scores, measure(work).nbytes
    scores = [found[name][0] for name in found]
    assert scores == [(HEADS + 1) * 4 * size for size in (n * n, chunk * n, chunk * tile)]
    peaks = [found[name][1] for name in found]
    assert peaks[0] > 5 * peaks[1] > 10 * peaks[2]


def test_twice_the_prompt_takes_four_times_the_scores_or_twice_or_as_many():
    def scores(tokens, *cut):
        return attention_peak(cache_of(tokens), HEADS, tokens, *cut).scores

    for tokens in (1024, 4096):
        assert scores(2 * tokens, None, None) == 4 * scores(tokens, None, None)
        assert scores(2 * tokens, 256, None) == 2 * scores(tokens, 256, None)
        assert scores(2 * tokens, 256, 128) == scores(tokens, 256, 128)


def test_what_a_model_is_not_listed_for():
    llm = model()
    for change in ({"qk_norm": True}, {"activation": "gelu_tanh"}, {"qkv_bias": True}):
        odd = type("Odd", (), {"config": llm.config.__class__(**{**fields(llm.config), **change}), "dtype": "float32"})
        with pytest.raises(ValueError, match="architecture of Llama"):
            prefill_peak(odd, cache_of(64), 32)


def fields(config: ModelConfig) -> dict:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_measuring_inside_a_measurement_and_after_an_error():
    outer = measure(lambda: measure(lambda: np.ones(100_000)).nbytes)
    assert math.isclose(outer.result, 800_000, rel_tol=0.01)
    with pytest.raises(ZeroDivisionError):
        measure(lambda: 1 / 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here")
@pytest.mark.parametrize("tokens, chunk", LONG)
@pytest.mark.parametrize("tile", [256, None])
def test_the_peak_of_a_layer_was_predicted_on_cuda(tokens, chunk, tile):
    q, k, v = (torch.from_numpy(x).cuda() for x in noise(tokens))
    prefill_attention(q, k, v, cache_of(tokens, backend="torch", device="cuda"), chunk, tile)  # workspaces
    cache = cache_of(tokens, backend="torch", device="cuda")
    predicted = attention_peak(cache, HEADS, tokens, chunk, tile)
    assert close(predicted, measure(lambda: prefill_attention(q, k, v, cache, chunk, tile), "cuda"))
