"""The open tail: whatever the pieces in which tokens come, every query is told what it would have been told alone."""

import numpy as np
import pytest

import kvlib
from kvlib import KIVI, HeavyHitter, Int, SlidingWindow, Split

HEADS, WIDTH, TOKENS = 2, 16, 60
CODECS = {
    "kivi": KIVI(2, group=4, residual=9),
    "channel": Int(4, "channel", 8),
    "sixes": Int(4, "channel", 6),
    "residual": Split(Int(8), Int(2, group_size=8), residual=5),
    "groups": Split(Int(4, "channel", 8), Int(4, "channel", 4), residual=8),
}
CHUNKS = [(60,), (1, 58, 1), (7, 20, 33), (33, 1, 26)]


@pytest.fixture(params=list(CODECS))
def codec(request):
    return CODECS[request.param]


@pytest.fixture(params=["numpy", "torch"])
def backend(request):
    return request.param


def build(codec, backend="numpy", layers=1, **options):
    spec = kvlib.CacheSpec(HEADS, WIDTH, num_layers=layers, dtype="float32")
    return kvlib.KVCache(spec, max_tokens=80, block_size=24, codec=codec, backend=backend, **options)


def rows(heads=HEADS, seed=0):
    return np.random.default_rng(seed).standard_normal((1, heads, TOKENS, WIDTH)).astype(np.float32)


def run(cache, chunks, start=0, extra=None):
    """Append and attend in ``chunks`` -> the outputs of all positions, (Hq, T, D)."""
    array = (lambda x: x) if cache.backend.name == "numpy" else cache.backend.torch.tensor
    k, v, q = rows(), rows(seed=1), 2 * rows(2 * HEADS, seed=2)
    found = []
    for tokens in chunks:
        here = np.s_[:, :, start : start + tokens]
        cache.append(array(k[here]), array(v[here]))
        found.append(np.asarray(cache.attend(array(q[here]), **(extra or {}))))
        start += tokens
    return np.concatenate(found, axis=2)[0]


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("extra", [{}, {"window": 11}], ids=["all", "window"])
def test_every_query_is_told_what_it_would_be_told_alone(codec, backend, chunks, extra):
    alone, together = build(codec, backend), build(codec, backend)
    expected = run(alone, [1] * TOKENS, extra=extra)
    np.testing.assert_allclose(run(together, chunks, extra=extra), expected, rtol=2e-5, atol=2e-5)
    for one, other in zip(alone.read(0), together.read(0), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_so_is_one_that_looks_through_a_window_of_the_policy(codec, chunks):
    policy = SlidingWindow(13, sinks=2)
    alone, together = build(codec, eviction=policy), build(codec, eviction=policy)
    np.testing.assert_allclose(run(together, chunks), run(alone, [1] * TOKENS), rtol=2e-5, atol=2e-5)
    for one, other in zip(alone.read(0), together.read(0), strict=True):
        assert np.array_equal(one, other)


def test_attention_is_counted_once_for_a_token_seen_in_two_ways(codec):
    """As much mass as queries, wherever it fell: in a group that has closed since, or in the tail."""
    cache = build(codec, eviction=HeavyHitter(70))
    run(cache, (33, 1, 26))
    slots = cache._tables[0].slots
    assert slots.mass.sum() + slots.tail_mass.sum() == pytest.approx(2 * HEADS * TOKENS, rel=1e-5)


def test_what_was_just_encoded_is_let_go_of(codec):
    """The exact rows of a long prompt are held for its own queries: those of one layer at a time, and until the next
    token at the longest.
    """
    cache = build(codec, layers=3)
    before, k = cache.nbytes, rows()
    for layer in range(3):
        cache.append(k, k, layer=layer)
        assert before < cache.nbytes <= before + 2 * k.nbytes
        assert np.array_equal(cache.attend(k, layer=layer), cache.attend(k, layer=layer))
    cache.append(k[:, :, :1], k[:, :, :1], layer=0)
    assert cache.nbytes == before


def test_a_short_run_is_held_until_the_next_token(codec):
    cache = build(codec)
    before = cache.nbytes
    run(cache, (30, 12))
    assert before < cache.nbytes <= before + 2 * (cache.codec.tail + 12) * HEADS * WIDTH * 4
    run(cache, (1,), start=42)
    assert cache.nbytes == before
    run(cache, (12,), start=43)
    assert cache.nbytes > before
    cache.truncate(0, 0)
    assert cache.nbytes == before


def test_the_callers_arrays_are_not_kept(codec):
    ours, theirs = build(codec), build(codec)
    k, v, q = rows(), rows(seed=1), rows(2 * HEADS, seed=2)
    ours.append(k, v)
    theirs.append(k.copy(), v.copy())
    k[:], v[:] = 0, 0
    assert np.array_equal(ours.attend(q), theirs.attend(q))


@pytest.mark.parametrize("n", [49, 47, 45, 40, 37, 31, 30])
def test_the_last_append_can_be_taken_back_exactly(codec, n):
    """As draft tokens are: a cut through a group finds the rows that it was encoded from."""
    drafted, straight = build(codec), build(codec)
    run(drafted, (30, 20))
    drafted.truncate(0, n)
    run(straight, (30, *([n - 30] if n > 30 else [])))
    again = run(drafted, [1] * (TOKENS - n), start=n)
    np.testing.assert_allclose(run(straight, [1] * (TOKENS - n), start=n), again, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("n", [22, 10])
def test_a_cut_before_it_decodes(codec, n):
    """There the exact rows are gone: the group's first tokens come back with the error of its codec, and no more."""
    cache = build(codec)
    run(cache, (40, 20))
    before = cache.read(0)
    cache.truncate(0, n)
    for now, then in zip(cache.read(0), before, strict=True):
        assert np.array_equal(now, then[..., :n, :] if now.ndim == 3 else then[:n])


def test_twins_keep_what_their_queries_may_see(codec):
    """What one of them appends takes nothing from the other."""
    cache, alone = build(codec), build(codec)
    k, v, q = rows(), rows(seed=1), 2 * rows(2 * HEADS, seed=2)
    for each in (cache, alone):
        each.append(k, v)
    twin = cache.fork(0)
    cache.append(k[:, :, :1], v[:, :, :1], seqs=[0])
    assert np.array_equal(cache.attend(q, seqs=[twin]), alone.attend(q))


@pytest.mark.parametrize("n", [49, 44, 37, 32])
def test_what_is_left_of_the_last_append_still_sees_itself(codec, n):
    """After a rollback the queries of the tokens that stayed are told what they would be told alone; twice over."""
    drafted, alone = build(codec), build(codec)
    expected = run(alone, [1] * n)
    run(drafted, (30, 20))
    for end in (n, n - 1):
        drafted.truncate(0, end)
        found = np.asarray(drafted.attend(2 * rows(2 * HEADS, seed=2)[:, :, 30:end]))[0]
        np.testing.assert_allclose(found, expected[:, 30:end], rtol=2e-5, atol=2e-5)
