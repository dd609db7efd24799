"""Layers in groups: against float64 dense attention, in steps of any size; all or nothing; back and forth."""

import math

import numpy as np
import pytest

import kvlib
from kvlib.codecs import KIVI
from kvlib.config import ModelConfig
from kvlib.eviction import SlidingWindow
from kvlib.groups import GroupedCache

HEADS, KV_HEADS, WIDTH, TOKENS = 4, 2, 8, 40
WINDOWS = [5, None, 5, 9, None, 9]  # three groups
SHARED = {4: 1, 5: 3}
SPEC = kvlib.CacheSpec(KV_HEADS, WIDTH, len(WINDOWS), "float32")
BACKENDS = ["numpy", "torch"]
STEPS = [7, 1, 1, 12, 4, 1, 14]


def rows(heads: int, seed: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, heads, TOKENS, WIDTH)).astype(np.float32)


QUERIES = [rows(HEADS, 10 + layer) for layer in range(6)]
KEYS, VALUES = ([rows(KV_HEADS, seed + SHARED.get(layer, layer)) for layer in range(6)] for seed in (30, 50))


def expected(layer: int, lo: int, hi: int, window: int | None, batch: int = 2) -> np.ndarray:
    """Positions lo … hi-1, one query at a time, in float64."""
    q, k, v = (x[layer][:batch].astype(np.float64) for x in (QUERIES, KEYS, VALUES))
    out = np.empty((batch, HEADS, hi - lo, WIDTH))
    for b, h, i in np.ndindex(batch, HEADS, hi - lo):
        first = 0 if window is None else max(0, lo + i - window + 1)
        head = h // (HEADS // KV_HEADS)
        scores = k[b, head, first : lo + i + 1] @ q[b, h, lo + i] / math.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        out[b, h, i] = weights @ v[b, head, first : lo + i + 1] / weights.sum()
    return out


def build(**options) -> GroupedCache:
    settings = {"batch": 2, "max_tokens": TOKENS, "chunk": 14, "block_size": 4, "shared": SHARED}
    return GroupedCache.for_windows(SPEC, WINDOWS, **(settings | options))


def arrays(cache, *xs):
    return xs if cache.backend.name == "numpy" else tuple(cache.backend.asarray(x) for x in xs)


def append(cache, lo, hi, layer, seqs=None) -> None:
    chosen = slice(None) if seqs is None else seqs
    k, v = (np.ascontiguousarray(x[layer][chosen, :, lo:hi]) for x in (KEYS, VALUES))
    cache.append(*arrays(cache, k, v), layer=layer, seqs=seqs)


def attend(cache, lo, hi, layer, **options) -> np.ndarray:
    (q,) = arrays(cache, np.ascontiguousarray(QUERIES[layer][: len(cache.lengths), :, lo:hi]))
    return np.asarray(cache.attend(q, layer=layer, **options))


def step(cache, lo, hi) -> list[np.ndarray]:
    """One step through all layers, as a model takes it."""
    out = []
    for layer in range(len(WINDOWS)):
        if layer not in SHARED:
            append(cache, lo, hi, layer)
        out.append(attend(cache, lo, hi, layer))
    return out


def steps(cache, sizes=STEPS, start: int = 0) -> None:
    for size in sizes:
        step(cache, start, start + size)
        start += size


def contents(cache):
    held = [[cache.read(seq, layer) for layer in range(len(WINDOWS))] for seq in cache.lengths]
    free = [c.num_free_blocks for c in cache.caches]
    return cache.lengths, free, [[[np.asarray(x).tolist() for x in parts] for parts in one] for one in held]


@pytest.mark.parametrize("block_size", [None, 1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layer_sees_what_it_should(backend, block_size):
    cache, start = build(backend=backend, block_size=block_size), 0
    for size in STEPS:
        got = step(cache, start, start + size)
        for layer, window in enumerate(WINDOWS):
            want = expected(layer, start, start + size, window)
            np.testing.assert_allclose(got[layer], want, rtol=0, atol=2e-6)
        start += size
    assert cache.lengths == {0: TOKENS, 1: TOKENS}


def test_layers_that_share_a_cache():
    """Half of the layers own nothing: YOCO's upper half. They attend what another has appended, before it evicts."""
    cache = build()
    assert cache.places[4] == cache.places[1] and cache.places[5] == cache.places[3]
    assert sum(c.spec.num_layers for c in cache.caches) == 4 < cache.spec.num_layers == 6
    steps(cache)
    for layer, owner in SHARED.items():
        assert [np.asarray(x).tolist() for x in cache.read(0, layer)] == [
            np.asarray(x).tolist() for x in cache.read(0, owner)
        ]
        before = contents(cache)
        with pytest.raises(ValueError, match=f"layer {layer} shares the cache of layer {owner}: that one appends"):
            cache.append(KEYS[layer][:, :, :1], VALUES[layer][:, :, :1], layer=layer)
        assert contents(cache) == before


def test_windows_scales_and_sinks_are_handed_on():
    cache = build()
    steps(cache)
    plain = attend(cache, 39, 40, 1)
    np.testing.assert_allclose(attend(cache, 39, 40, 1, window=6), expected(1, 39, 40, 6), rtol=0, atol=2e-6)
    np.testing.assert_allclose(
        attend(cache, 39, 40, 1, scale=1 / math.sqrt(WIDTH)), expected(1, 39, 40, None), rtol=0, atol=2e-6
    )
    drained = attend(cache, 39, 40, 1, sinks=np.full(HEADS, 50.0, np.float32))
    assert abs(plain).max() > 0.1 and abs(drained).max() < 1e-6


def test_memory_is_that_of_the_windows():
    everything = kvlib.KVCache(SPEC, 2, TOKENS, block_size=4)
    cache = build(shared=None)
    sizes = {c.eviction and c.eviction.window: c.num_blocks * c.block_size for c in cache.caches}
    assert sizes == {5: 2 * 20, None: 2 * 40, 9: 2 * 24}  # window - 1 + chunk, in whole blocks
    assert cache.nbytes == sum(c.nbytes for c in cache.caches) < everything.nbytes
    for start in range(0, TOKENS, 2):
        for layer in range(len(WINDOWS)):
            append(cache, start, start + 2, layer)
    token = 2 * 4 * KV_HEADS * WIDTH  # bytes in one layer
    assert cache.nbytes_used == 2 * 2 * token * (8 + 12 + 40)  # two sequences, two layers each: whole blocks again
    assert build().nbytes_used == 0
    assert (cache.max_step, cache.max_tokens) == (14, TOKENS)


def test_only_windows_have_no_end():
    cache = GroupedCache.for_windows(SPEC, [5] * 6, batch=1, max_tokens=10, chunk=3)
    assert cache.max_tokens == math.inf and cache.caches[0].max_tokens == 7
    for start in range(0, 39, 3):
        append(cache, start, start + 3, 0, seqs=[0])
    np.testing.assert_allclose(attend(cache, 36, 39, 0), expected(0, 36, 39, 5, batch=1), rtol=0, atol=2e-6)
    assert cache.lengths == {0: 39}
    unlimited = GroupedCache.for_windows(SPEC, [None] * 6)
    assert unlimited.max_step == math.inf and len(unlimited.caches) == 1


def test_a_codec_with_a_tail_in_every_group():
    """Grouped and ungrouped caches encode the same tokens the same way, so they answer alike."""
    codec = KIVI(bits=4, group=4, residual=6)
    cache = build(codec=codec, shared=None)
    whole = kvlib.KVCache(SPEC, 2, TOKENS, block_size=4, codec=codec)
    start = 0
    for size in STEPS:
        for layer, window in enumerate(WINDOWS):
            for each in (cache, whole):
                append(each, start, start + size, layer)
            got = attend(cache, start, start + size, layer)
            np.testing.assert_allclose(
                got, attend(whole, start, start + size, layer, window=window), rtol=0, atol=2e-6
            )
        start += size


# -- sequences -------------------------------------------------------------------------------------------------


def test_fork_truncate_and_go_on():
    cache = build(batch=1, num_blocks=60)
    for layer in (0, 1, 2, 3):
        append(cache, 0, 12, layer, seqs=[0])
    twin = cache.fork(0)
    before = contents(cache)[2][0]
    for layer in (0, 1, 2, 3):
        append(cache, 12, 16, layer, seqs=[0])  # the twin's tokens stay what they were
    assert contents(cache)[2][1] == before
    cache.close(0)
    for layer in (0, 1, 2, 3):
        k, v = (x[layer][:1, :, 12:20] for x in (KEYS, VALUES))
        cache.append(k, v, layer=layer, seqs=[twin])
    cache.truncate(twin, 15)
    assert cache.lengths == {twin: 15}
    for layer in range(6):
        if layer not in SHARED:
            cache.append(*(x[layer][:1, :, 15:16] for x in (KEYS, VALUES)), layer=layer)
        np.testing.assert_allclose(
            attend(cache, 15, 16, layer), expected(layer, 15, 16, WINDOWS[layer], batch=1), rtol=0, atol=2e-6
        )
    assert cache.open() == 2
    cache.reset()
    assert cache.lengths == {0: 0} and all(c.num_free_blocks == c.num_blocks for c in cache.caches)


@pytest.mark.parametrize("back", range(21, 26))
def test_back_into_the_last_step(back):
    cache = build()
    steps(cache, [7, 1, 1, 12])
    step(cache, 21, 25)
    for seq in (0, 1):
        cache.truncate(seq, back)
    got = step(cache, back, back + 3)
    for layer, window in enumerate(WINDOWS):
        np.testing.assert_allclose(got[layer], expected(layer, back, back + 3, window), rtol=0, atol=2e-6)


def test_no_way_back_before_it():
    cache = build()
    steps(cache, [7, 1, 1, 12, 4])
    before = contents(cache)
    with pytest.raises(ValueError, match=r"cannot truncate sequence 0 to 20 tokens: layers \[0, 2\] have evicted 1 of"):
        cache.truncate(0, 20)
    with pytest.raises(ValueError, match=r"to 1 tokens: .* evicted 1 of those that position 1 would see"):
        cache.truncate(0, 1)
    assert contents(cache) == before
    cache.truncate(0, 0)
    assert cache.lengths == {0: 0, 1: 25}
    short = build()
    steps(short, [3, 1])
    short.truncate(0, 2)  # nothing has left a window yet
    assert short.lengths == {0: 2, 1: 4}


@pytest.mark.parametrize("n", [-1, 26, 1.5, True])
def test_truncate_checks_its_number(n):
    cache = build()
    steps(cache, [7, 1, 1, 12, 4])
    before = contents(cache)
    with pytest.raises(ValueError, match="sequence 0 holds 25 tokens: cannot truncate it to"):
        cache.truncate(0, n)
    with pytest.raises(KeyError, match="sequence 7 is not open"):
        cache.truncate(7, 0)
    assert contents(cache) == before


# -- all or nothing --------------------------------------------------------------------------------------------


def test_a_step_that_one_group_cannot_store_changes_none():
    cache = build(num_blocks=13)  # of the group that keeps everything: 52 tokens for two sequences
    steps(cache, [7, 1, 1, 12])
    before = contents(cache)
    with pytest.raises(kvlib.CacheFull, match="needs 2 more blocks, and 1 of 13 are free"):
        append(cache, 21, 25, 0)  # layer 0 has room of its own, layer 1 has not
    assert contents(cache) == before
    cache.close(1)
    append(cache, 21, 25, 0, seqs=[0])
    assert cache.lengths == {0: 25}


def test_the_first_layer_reserves_for_all():
    cache = build()
    append(cache, 0, 9, 0)
    assert [c.num_blocks - c.num_free_blocks for c in cache.caches] == [6, 6, 6]
    for seq in (0, 1):
        cache.truncate(seq, 0)
    assert [c.num_free_blocks for c in cache.caches] == [c.num_blocks for c in cache.caches]


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (KEYS[0][:, :1, :3], ValueError, "k must have shape"),
        (KEYS[0][0, :, :3], ValueError, "k must have shape"),
        ("k", TypeError, "k must be a numpy array"),
        (KEYS[0][:, :, :15], ValueError, "15 more would exceed its max_tokens=18; feed a long prompt in steps of"),
    ],
)
def test_bad_rows_reserve_nothing(k, error, message):
    cache = build()
    steps(cache, [7, 1, 1, 12])
    before = contents(cache)
    with pytest.raises(error, match=message):
        cache.append(k, k, layer=0)
    with pytest.raises(KeyError, match="sequence 5 is not open"):
        cache.append(KEYS[0][:, :, :1], VALUES[0][:, :, :1], layer=0, seqs=[0, 5])
    with pytest.raises(IndexError, match="layer must be an integer from 0 to 5, got 6"):
        cache.append(KEYS[0][:, :, :1], VALUES[0][:, :, :1], layer=6)
    assert contents(cache) == before


# -- building one ----------------------------------------------------------------------------------------------


def cache_of(layers: int, **options) -> kvlib.KVCache:
    return kvlib.KVCache(kvlib.CacheSpec(KV_HEADS, WIDTH, layers, "float32"), **({"max_tokens": 16} | options))


def test_groups_of_any_shape():
    """Groups may differ in spec, codec, block size and eviction."""
    narrow = kvlib.KVCache(kvlib.CacheSpec(1, 4, 1, "float32"), max_tokens=16, codec="int8")
    cache = GroupedCache([cache_of(1, eviction=SlidingWindow(4, sinks=2)), narrow], [(0, 0), (1, 0)])
    with pytest.raises(AttributeError, match="different specs"):
        cache.spec  # noqa: B018
    assert "layers [0]: KVCache" in repr(cache) and "layers [1]: KVCache" in repr(cache)
    cache.append(np.ones((1, 2, 9, 8), np.float32), np.ones((1, 2, 9, 8), np.float32), layer=0)
    cache.append(np.ones((1, 1, 9, 4), np.float32), np.ones((1, 1, 9, 4), np.float32), layer=1)
    assert cache.lengths == {0: 9} and cache.max_tokens == 16 and cache.max_step == 16 - 5


@pytest.mark.parametrize(
    ("caches", "places", "error", "message"),
    [
        ([], [], ValueError, "places must name every layer"),
        ([cache_of(2)], [(0, 0)], ValueError, r"\[\(0, 1\)\] is in one but not both"),
        ([cache_of(1)], [(0, 0), (0, 1)], ValueError, r"\[\(0, 1\)\] is in one but not both"),
        ([cache_of(1), cache_of(1, batch=2)], [(0, 0), (1, 0)], ValueError, "the same batch"),
        ([cache_of(1), cache_of(1, backend="torch")], [(0, 0), (1, 0)], ValueError, "one backend"),
        ([SPEC], [(0, 0)], TypeError, "must be kvlib.KVCache objects, got a CacheSpec"),
    ],
)
def test_groups_that_do_not_fit(caches, places, error, message):
    with pytest.raises(error, match=message):
        GroupedCache(caches, places)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(windows=[5]), "one entry for each of 6 layers, got 1"),
        (dict(windows=[0] * 6), "SlidingWindow.window must be"),
        (dict(chunk=0), "chunk must be an integer of at least 1, got 0"),
        (dict(chunk=True), "chunk must be an integer"),
        (dict(shared={4: 0}), "layer 4 cannot share the cache of layer 0: .* the same window"),
        (dict(shared={1: 4}), "layer 1 cannot share the cache of layer 4: that must be an earlier layer"),
        (dict(shared={2: 0, 0: 0}), "layer 2 cannot share the cache of layer 0"),
        (dict(shared={7: 1}), "layer 7 cannot share"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        GroupedCache.for_windows(SPEC, **({"windows": WINDOWS} | options))


def test_a_group_used_by_itself_is_noticed():
    cache = build()
    cache.caches[1].open()
    with pytest.raises(RuntimeError, match="the groups have drifted apart"):
        cache.open()


# -- under a model ---------------------------------------------------------------------------------------------

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
PROMPT = np.random.default_rng(4).integers(0, 13, (1, 30))


@pytest.fixture
def model() -> kvlib.Transformer:
    config = ModelConfig.from_dict(TINY)
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(s, dtype=np.float32) for n, s in config.tensor_shapes().items()}
    return kvlib.Transformer(config, weights, kvlib.arrays.numpy_backend, "float32")


@pytest.mark.parametrize("stopped_in", [("append", 1), ("append", 2), ("attend", 0), ("attend", 2)])
def test_an_interrupted_step_is_taken_back(model, monkeypatch, stopped_in):
    """Windows have evicted by then; what the step's first token sees is still there."""
    cache = model.new_cache(1, 64, chunk=9, block_size=2)
    model(PROMPT[:, :9], cache)
    model(PROMPT[:, 9:17], cache)
    method, at = stopped_in
    original = getattr(GroupedCache, method)

    def interrupted(self, *args, layer=0, **options):
        if layer == at:
            raise KeyboardInterrupt
        return original(self, *args, layer=layer, **options)

    with monkeypatch.context() as patch:
        patch.setattr(GroupedCache, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(PROMPT[:, 17:22], cache)
    assert cache.lengths == {0: 17}
    got = model(PROMPT[:, 17:22], cache)
    np.testing.assert_allclose(got, model(PROMPT[:, :22])[:, 17:], rtol=0, atol=1e-4)


def test_a_full_pool_leaves_the_model_as_it_was(model):
    cache = model.new_cache(1, 64, chunk=9, block_size=2, num_blocks=9)
    model(PROMPT[:, :9], cache)
    model(PROMPT[:, 9:17], cache)
    free = [c.num_free_blocks for c in cache.caches]
    with pytest.raises(kvlib.CacheFull):
        model(PROMPT[:, 17:20], cache)
    assert cache.lengths == {0: 17} and [c.num_free_blocks for c in cache.caches] == free
    np.testing.assert_allclose(model(PROMPT[:, 17:18], cache), model(PROMPT[:, :18])[:, 17:], rtol=0, atol=1e-4)


def test_generation_feeds_a_long_prompt_in_steps(model):
    cache = model.new_cache(1, 64, chunk=7)
    prompt = PROMPT[0].tolist()
    with pytest.raises(ValueError, match="feed a long prompt in steps of at most max_step tokens"):
        model([prompt], cache)
    assert cache.lengths == {0: 0}
    assert list(kvlib.generate(model, prompt, 12, cache=cache)) == list(kvlib.generate(model, prompt, 12, cache=False))
    assert cache.lengths == {0: 41}
    with pytest.raises(ValueError, match="the cache holds 41 of at most 64 tokens"):
        kvlib.generate(model, prompt, 12, cache=cache)


def test_a_refused_step_copies_nothing():
    """Copy-on-write in the first group used to be done before the second was asked."""
    spec = kvlib.CacheSpec(2, 16, 3, "float32")
    cache = GroupedCache.for_windows(spec, [4, None, 4], batch=2, max_tokens=32, chunk=8, block_size=4, num_blocks=3)
    k = np.ones((1, 2, 6, 16), np.float32)
    for layer in range(3):
        cache.append(k, k, layer=layer, seqs=[0])
    twin = cache.fork(0)
    before = [(each.num_free_blocks, each.block_table(0), each.block_table(twin)) for each in cache.caches]
    with pytest.raises(kvlib.CacheFull):
        cache.append(k, k, layer=0, seqs=[twin])
    assert [(each.num_free_blocks, each.block_table(0), each.block_table(twin)) for each in cache.caches] == before
