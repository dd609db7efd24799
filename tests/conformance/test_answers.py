"""The answer does not depend on who computes it: not on the chunking, the tiling, the storage, the
backend.
"""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlib.arrays
import kvlib.tiling
from kvlib.tiling import Cut
from tests.conformance import bounds, reference
from tests.conformance.conftest import ENTRIES, Setup

LAYERS = 2


def fill(cache, k, v, chunks, layers=1):
    """Append the tokens of k and v (B, Hkv, S, D) chunk by chunk; K and V change places in every other layer."""
    start = 0
    for size in chunks:
        for layer in range(layers):
            pair = [x[:, :, start : start + size] for x in (k, v)[:: -1 if layer % 2 else 1]]
            cache.append(*pair, layer=layer)
        start += size
    return cache


def bits(x):
    """An array's shape and bytes, so that == means bit for bit."""
    if isinstance(x, torch.Tensor):
        x = x.cpu().contiguous().view(torch.uint8).numpy()
    return x.shape, x.tobytes()


# -- promise 1: any chunking -----------------------------------------------------------------------


def test_chunks_store_and_answer_what_one_append_does(setup, rng):
    spec = setup.spec(num_layers=LAYERS)
    (k, k_in), (v, v_in), (q, q_in) = (setup.draw(rng, 1, heads, 59, 32) for heads in (2, 2, 8))
    whole = fill(setup.cache(spec), k_in, v_in, [59], LAYERS)
    pieces = fill(setup.cache(spec), k_in, v_in, [37, 1, 1, 20], LAYERS)
    for layer in range(LAYERS):
        for one, many in zip(whole.read(0, layer), pieces.read(0, layer), strict=True):
            assert bits(one) == bits(many)
        for tokens in (1, 5, 59):
            last = q_in[:, :, -tokens:]
            stored = (v[0], k[0]) if layer % 2 else (k[0], v[0])
            for cache in (whole, pieces):
                setup.check(cache, cache.attend(last, layer)[0], q[0, :, -tokens:], *stored)


def test_chunked_prefill_gives_every_position_its_own_answer(setup, rng):
    """Attending after each chunk, as a chunked prefill does, sees exactly the tokens up to there."""
    (k, k_in), (v, v_in), (q, q_in) = (setup.draw(rng, 1, heads, 59, 32) for heads in (2, 2, 8))
    cache, stop = setup.cache(), 0
    for size in (37, 1, 1, 20):
        start, stop = stop, stop + size
        cache.append(k_in[:, :, start:stop], v_in[:, :, start:stop])
        out = cache.attend(q_in[:, :, start:stop])
        setup.check(cache, out[0], q[0, :, start:stop], k[0, :, :stop], v[0, :, :stop])


@pytest.mark.parametrize("entry_name", list(ENTRIES))
@given(sizes=st.lists(st.integers(1, 24), min_size=1, max_size=8))
def test_any_chunks_at_all(entry_name, sizes):
    setup, rng = Setup(entry_name, "numpy", "float32"), np.random.default_rng(5)
    total = sum(sizes)
    (_, k_in), (_, v_in) = (setup.draw(rng, 2, 2, total, 32) for _ in range(2))
    whole = fill(setup.cache(batch=2, max_tokens=total), k_in, v_in, [total])
    pieces = fill(setup.cache(batch=2, max_tokens=total), k_in, v_in, sizes)
    for seq in (0, 1):
        for one, many in zip(whole.read(seq), pieces.read(seq), strict=True):
            assert bits(one) == bits(many)


def test_read_gives_back_what_was_stored(setup, rng):
    (k, k_in), (v, v_in) = setup.draw(rng, 2, 2, 41, 32), setup.draw(rng, 2, 2, 41, 32)
    cache = fill(setup.cache(batch=2), k_in, v_in, [20, 21])
    for seq in (0, 1):
        k_out, v_out, positions = cache.read(seq)
        assert positions.tolist() == list(range(41))
        for side, given_, exact, out in (("k", k_in[seq], k[seq], k_out), ("v", v_in[seq], v[seq], v_out)):
            assert tuple(out.shape) == exact.shape
            assert out.dtype == given_.dtype  # the spec's
            if bounds.lossless(cache.codec):
                assert bits(out) == bits(given_)
            else:
                bound = bounds.stored_error(cache, side, exact, setup.dtype)
                bound = bound + bounds.rounding(np.abs(exact) + bound, setup.dtype)
                assert np.all(np.abs(setup.host(out) - exact) <= bound)


def test_read_of_nothing_has_shapes(setup):
    k, v, positions = setup.cache(setup.spec(v_head_dim=(width := setup.width(7)))).read(0)
    assert (tuple(k.shape), tuple(v.shape), positions.shape) == ((2, 0, 32), (2, 0, width), (0,))


def test_what_comes_out_is_a_copy(setup32, rng):
    """Writing into an answer, or into what was appended, does not reach the cache."""
    (_, k_in), (_, q_in) = setup32.draw(rng, 1, 2, 20, 32), setup32.draw(rng, 1, 2, 20, 32)
    cache = fill(setup32.cache(), k_in, k_in, [20])
    before = [bits(x) for x in cache.read(0)]
    for array in (*cache.read(0), cache.attend(q_in), cache.attend(q_in[:, :, -1:]), k_in, q_in):
        array[...] = 77
    assert [bits(x) for x in cache.read(0)] == before


def test_what_goes_in_is_left_alone(setup, rng):
    (_, k_in), (_, v_in), (_, q_in) = (setup.draw(rng, 1, heads, 20, 32) for heads in (2, 2, 8))
    before = [bits(x) for x in (k_in, v_in, q_in)]
    cache = fill(setup.cache(), k_in, v_in, [20])
    cache.attend(q_in)
    cache.attend(q_in[:, :, -1:])
    assert [bits(x) for x in (k_in, v_in, q_in)] == before


# -- promise 2: float64 dense attention ------------------------------------------------------------

# Hkv, Hq, and the spec's widths, or the next that the codec can store: the ratios 1, 4 and 8; V narrower and wider than
# K; V a view of K
SHAPES = {
    "mha-32": (3, 3, {"head_dim": 32}),
    "gqa4-64": (2, 8, {"head_dim": 64}),
    "mqa8-128": (1, 8, {"head_dim": 128}),
    "narrow-v": (2, 8, {"head_dim": 64, "v_head_dim": 40}),
    "wide-v": (2, 2, {"head_dim": 32, "v_head_dim": 64}),
    "latent": (1, 8, {"head_dim": 72, "latent": 64}),
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_matches_dense_attention(setup, shape, rng):
    kv_heads, heads, widths = SHAPES[shape]
    widths = {name: width if name == "latent" else setup.width(width) for name, width in widths.items()}
    spec = setup.spec(num_kv_heads=kv_heads, **widths)
    (k, k_in), (v, v_in), (q, q_in) = (
        setup.draw(rng, 2, h, 150, w)
        for h, w in ((kv_heads, spec.head_dim), (kv_heads, spec.value_dim), (heads, spec.head_dim))
    )
    if spec.latent:
        v, v_in = k[..., : spec.latent], None
    cache = setup.cache(spec, batch=2, max_tokens=150)
    start = 0
    for length in (1, 17, 150):
        cache.append(k_in[:, :, start:length], None if spec.latent else v_in[:, :, start:length])
        start = length
        for tokens in {1, min(5, length), length}:
            out = cache.attend(q_in[:, :, length - tokens : length])
            for seq in (0, 1):
                setup.check(
                    cache,
                    out[seq],
                    q[seq, :, length - tokens : length],
                    k[seq, :, :length],
                    v[seq, :, :length],
                )


# How the work is cut: tokens in a tile, keys in one product of it (0: all), runs of tiles for different
# threads (0: no threads). Blocks end at multiples of 16, 5 or 1 token, so that most of these tiles begin
# and end inside one.
CUTS = {
    "one-tile": Cut(tile=1000, strip=0, pieces=0),
    "many-tiles": Cut(tile=30, strip=0, pieces=0),
    "strips-and-a-rest": Cut(tile=200, strip=64, pieces=0),
    "strips-longer-than-tiles": Cut(tile=30, strip=64, pieces=0),
    "tiles-of-one-token": Cut(tile=1, strip=1, pieces=0),
    "threads": Cut(tile=33, strip=8, pieces=3),
    "more-threads-than-tiles": Cut(tile=300, strip=16, pieces=9),
    "a-last-run-of-one-token": Cut(tile=53, strip=0, pieces=10),  # 531 = 5 * 106 + 1
}


def planned(name, storage):
    """A cut of `CUTS`, with tiles that end between two groups of the codec."""
    cut = CUTS[name]
    return dataclasses.replace(cut, tile=-(-cut.tile // storage.unit) * storage.unit)


# one of each way of storing rows: a view, gathered blocks, gathered tokens, decoded rows, groups and a tail
@pytest.mark.parametrize("entry", ["contiguous", "paged", "paged-token", "outside-codec", "token-groups", "kivi-2bit"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cut", list(CUTS))
def test_no_cut_changes_the_answer(setup32, cut, threads, rng, monkeypatch):
    monkeypatch.setattr(Cut, "plan", classmethod(lambda cls, storage, *_: planned(cut, storage)))
    monkeypatch.setattr(kvlib.threads, "num_threads", lambda: threads)
    lengths = (531, 400, 64)
    (k, k_in), (v, v_in), (q, q_in) = (setup32.draw(rng, 3, heads, 531, 32) for heads in (2, 2, 8))
    cache = setup32.cache(batch=3, max_tokens=531)
    for seq, length in enumerate(lengths):
        cache.append(k_in[seq : seq + 1, :, :length], v_in[seq : seq + 1, :, :length], seqs=[seq])
    for tokens in (1, 2, 64):
        out = cache.attend(q_in[:, :, :tokens])
        for seq, length in enumerate(lengths):
            setup32.check(cache, out[seq], q[seq, :, :tokens], k[seq, :, :length], v[seq, :, :length])
    out = cache.attend(q_in[:1], seqs=[0])  # the whole prefill
    setup32.check(cache, out[0], q[0], k[0], v[0])


@pytest.fixture(scope="module")
def long_context():
    """32,768 tokens with 8 query heads on 2 K/V heads of 128, and what float64 says of the last 1 and 3
    positions.
    """
    rng = np.random.default_rng(7)
    q, k, v = (
        rng.standard_normal((heads, tokens, 128)).astype(np.float32)
        for heads, tokens in ((8, 3), (2, 32768), (2, 32768))
    )
    return q, k, v


@pytest.mark.parametrize("entry", ["contiguous", "paged", "paged-token", "outside-codec", "paged-int4", "kivi-2bit"])
def test_a_long_context(setup32, long_context, monkeypatch):
    """Real tile sizes, real strips, real spans; two threads; one long chunk and a few decode steps."""
    for module in (kvlib.tiling, kvlib.threads):
        monkeypatch.setattr(module, "num_threads", lambda: 2)
    q, k, v = long_context
    cache = setup32.cache(setup32.spec(head_dim=128), max_tokens=32768)
    k_in, v_in, q_in = (setup32.array(x[None]) for x in (k, v, q))
    fill(cache, k_in, v_in, [32765, 1, 1, 1])
    for tokens in (1, 3):
        setup32.check(cache, cache.attend(q_in[:, :, -tokens:])[0], q[:, -tokens:], k, v)


def test_ragged_batch_in_any_order(setup, rng):
    """Sequences of different lengths in one call, some left out, in an order that is not that of their
    ids.
    """
    lengths, seqs = {0: 3, 1: 40, 2: 16, 3: 33}, [3, 0, 2]
    (k, k_in), (v, v_in), (q, q_in) = (setup.draw(rng, 4, heads, 45, 32) for heads in (2, 2, 8))
    cache = setup.cache(batch=4)
    for seq, length in lengths.items():
        cache.append(k_in[[seq], :, :length], v_in[[seq], :, :length], seqs=[seq])
    untouched = [bits(x) for x in cache.read(1)]
    late = (np.stack([x[seq, :, lengths[seq] : lengths[seq] + 5] for seq in seqs]) for x in (k, v))
    cache.append(*(setup.array(x) for x in late), seqs=seqs)
    assert cache.lengths == {0: 8, 1: 40, 2: 21, 3: 38}
    assert [bits(x) for x in cache.read(1)] == untouched
    out = cache.attend(q_in[seqs][:, :, :5], seqs=seqs)
    for row, seq in enumerate(seqs):
        stop = lengths[seq] + 5
        setup.check(cache, out[row], q[seq, :, :5], k[seq, :, :stop], v[seq, :, :stop])


@pytest.mark.parametrize("in_dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("q_dtype", ["float32", "float64"])
def test_stores_in_its_own_dtype_whatever_comes_in(setup, in_dtype, q_dtype, rng):
    """The reference sees the numbers before they were rounded: the bound is the rounding of the storage
    dtype.
    """
    (k, k_in), (v, v_in) = (setup.draw(rng, 1, 2, 37, 32, dtype=in_dtype) for _ in range(2))
    q, q_in = setup.draw(rng, 1, 4, 4, 32, dtype=q_dtype)
    cache = fill(setup.cache(), k_in, v_in, [37])
    setup.check(cache, cache.attend(q_in)[0], q[0], k[0], v[0], in_dtype=in_dtype, out_dtype=q_dtype)
    if bounds.lossless(cache.codec):
        for out, exact in zip(cache.read(0), (k, v), strict=False):
            assert np.array_equal(setup.host(out), reference.rounded(exact[0], setup.dtype))


def test_float64_is_kept_to_float64(entry, place, rng):
    setup = Setup(entry, place, "float64")
    (k, k_in), (v, v_in), (q, q_in) = (setup.draw(rng, 1, heads, 300, 32) for heads in (2, 2, 8))
    cache = fill(setup.cache(max_tokens=300), k_in, v_in, [300])
    for tokens in (1, 300):
        setup.check(cache, cache.attend(q_in[:, :, -tokens:])[0], q[0, :, -tokens:], k[0], v[0])


@pytest.mark.parametrize("scale", [0.5, np.float64(0.5), 0, 1])
def test_scale(setup, scale, rng):
    (k, k_in), (v, v_in), (q, q_in) = (setup.draw(rng, 1, heads, 29, 32) for heads in (2, 2, 8))
    cache = fill(setup.cache(), k_in, v_in, [29])
    setup.check(cache, cache.attend(q_in, scale=scale)[0], q[0], k[0], v[0], scale=scale)


@pytest.mark.parametrize("offset", [-3000.0, 3000.0])
def test_scores_far_from_zero_neither_overflow_nor_vanish(setup32, offset, rng):
    """exp(3000) is infinite and exp(-3000) is zero, in float64 too; softmax only sees differences."""
    k, v, q = (rng.standard_normal((heads, 300, 32)) for heads in (2, 2, 8))
    k[..., 0], q[..., 0] = offset, 1  # one column adds the same to every score …
    k, v, q = (reference.rounded(x, "float32") for x in (k, v, q))
    cache = setup32.cache(max_tokens=300)
    fill(cache, *(setup32.array(x[None]) for x in (k, v)), [300])
    # … but its rounding, in float32, is that of a number that large: |error| <= (D + 2) u sum |q| |k| for
    # a dot product summed in any order, with q scaled first.
    dot = (32 + 2) * 2.0**-24 * np.abs(k)
    for tokens in (1, 300):
        out = setup32.host(cache.attend(setup32.array(q[None, :, -tokens:]), scale=1.0)[0])
        expected = reference.attention(q[:, -tokens:], k, v, 1.0)
        assert np.all(np.isfinite(out))
        if bounds.lossless(cache.codec):
            bound = bounds.output_error(q[:, -tokens:], k, v, dot, np.zeros_like(v), expected, "float32", 1.0)
            assert np.all(np.abs(out - expected) <= bound)


def test_arrays_laid_out_in_any_way(setup, rng):
    """A model's projections arrive as (B, T, H, D) seen with two axes swapped; slices and steps are views
    too.
    """
    (k, k_in), (v, v_in), (q, q_in) = (setup.draw(rng, 2, 23, heads, 32) for heads in (2, 2, 2))
    cache = setup.cache(batch=2)
    cache.append(k_in.swapaxes(1, 2), v_in.swapaxes(1, 2))
    k, v, q = (x.swapaxes(1, 2) for x in (k, v, q))
    for tokens in (1, 23):
        out = cache.attend(q_in.swapaxes(1, 2)[:, :, -tokens:])
        for seq in (0, 1):
            setup.check(cache, out[seq], q[seq, :, -tokens:], k[seq], v[seq])
    every_other = setup.cache(batch=2)
    every_other.append(k_in.swapaxes(1, 2)[:, :, ::2], v_in.swapaxes(1, 2)[:, :, ::2])
    out = every_other.attend(q_in.swapaxes(1, 2)[:, :, ::2])
    for seq in (0, 1):
        setup.check(every_other, out[seq], q[seq, :, ::2], k[seq, :, ::2], v[seq, :, ::2])


def test_read_only_numpy_arrays(entry, rng):
    setup = Setup(entry, "numpy", "float32")
    (k, k_in), (q, q_in) = setup.draw(rng, 1, 2, 9, 32), setup.draw(rng, 1, 2, 9, 32)
    k_in.flags.writeable = q_in.flags.writeable = False
    cache = fill(setup.cache(), k_in, k_in, [9])
    setup.check(cache, cache.attend(q_in)[0], q[0], k[0], k[0])


@pytest.mark.parametrize("built_in", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("used_in", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_torch_modes(entry, built_in, used_in, rng):
    """A cache holds numbers, not graphs: parameters may come in, and inference mode may begin or end at
    any time.
    """
    setup = Setup(entry, "torch", "float32")
    (k, k_in), (q, q_in) = setup.draw(rng, 1, 2, 9, 32), setup.draw(rng, 1, 2, 9, 32)
    k_in, q_in = k_in.requires_grad_(), q_in.requires_grad_()
    with built_in():
        cache = setup.cache(batch=1, num_blocks=40)
    with used_in():
        cache.append(k_in, k_in)
        twin = cache.fork(0)
        cache.append(k_in, k_in, seqs=[twin])  # copies a shared block
        out = cache.attend(q_in, seqs=[0])
    assert not out.requires_grad
    setup.check(cache, out[0], q[0], k[0], k[0])


def test_autocast_does_not_reach_the_cache(entry, rng):
    """Inside torch.autocast a float32 product would quietly be one of bfloat16 numbers."""
    setup = Setup(entry, "torch", "float32")
    (k, k_in), (v, v_in), (q, q_in) = (setup.draw(rng, 1, heads, 30, 32) for heads in (2, 2, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = fill(setup.cache(), k_in, v_in, [30])
        outs = {tokens: cache.attend(q_in[:, :, -tokens:]) for tokens in (1, 30)}
    for tokens, out in outs.items():
        setup.check(cache, out[0], q[0, :, -tokens:], k[0], v[0])


def test_threads_of_the_caller(entry, rng):
    """Several caches attended at once, each from a thread of its own, do not get into each other's way."""
    setup = Setup(entry, "numpy", "float32")
    caches, queries = [], []
    for _ in range(4):
        k_in, v_in, q_in = (setup.draw(rng, 1, heads, 300, 32)[1] for heads in (2, 2, 8))
        caches.append(fill(setup.cache(max_tokens=300), k_in, v_in, [300]))
        queries.append(q_in[:, :, -3:])
    alone = [bits(cache.attend(q)) for cache, q in zip(caches, queries, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            together = pool.map(lambda pair: bits(pair[0].attend(pair[1])), zip(caches, queries, strict=True))
            assert list(together) == alone


# -- promise 5: NumPy and torch --------------------------------------------------------------------


def test_numpy_and_torch_store_the_same_bits_and_give_the_same_answer(entry, dtype, rng):
    """The same calls, with numbers that the storage dtype has to round."""
    k, v, q = (rng.standard_normal((2, heads, 70, 32)) for heads in (2, 2, 8))
    stored, answers = [], []
    for place in ("numpy", "torch"):
        setup = Setup(entry, place, dtype)
        cache = setup.cache(batch=2)
        fill(cache, setup.array(k, "float32"), setup.array(v, "float32"), [50, 1, 19])
        twin = cache.fork(1)
        cache.truncate(twin, 33)
        cache.append(setup.array(k[:1, :, :9], "float32"), setup.array(v[:1, :, :9], "float32"), seqs=[0])
        stored.append([setup.host(x) for seq in (0, 1, twin) for x in cache.read(seq)[:2]])
        answers.append(
            [setup.host(cache.attend(setup.array(q[:, :, :t], "float32"), seqs=[0, twin])) for t in (1, 33)]
        )
    for one, other in zip(*stored, strict=True):
        assert np.array_equal(one, other)
    decoded = map(bounds.decoded_error, [q] * 3, stored[1][::2], stored[1][1::2])
    off = 0 if bounds.lossless(cache.codec) else max(decoded)
    for one, other in zip(*answers, strict=True):
        assert np.abs(one - other).max() <= 2 * (bounds.ARITHMETIC["float32"] * np.abs(one).max() + off)


def test_default_scale_is_one_over_root_d(setup32, rng):
    (_, k_in), (_, q_in) = setup32.draw(rng, 1, 2, 9, 32), setup32.draw(rng, 1, 2, 9, 32)
    cache = fill(setup32.cache(), k_in, k_in, [9])
    assert bits(cache.attend(q_in)) == bits(cache.attend(q_in, scale=1 / math.sqrt(32)))
