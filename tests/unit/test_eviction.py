"""Policies and the choice that follows from their scores, against loops; and caches that evict, against simulations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib.eviction import HeavyHitter, Moves, Policy, SlidingWindow, SnapKV, choose, pack
from tests.conformance import reference

HEADS, WIDTH = 2, 16


class Newest(Policy):
    """A policy as a reader would write one."""

    budget = 5

    def score(self, positions, mass, length):
        return positions


class Loudest(Policy):
    """Keeps what the last 3 queries looked at."""

    budget = 6
    observe = 3

    def score(self, positions, mass, length):
        return np.where(positions == length - 1, np.inf, mass)


def positions(*rows):
    return np.array(rows, np.int32)


# -- choosing --------------------------------------------------------------------------------------------------------


def test_the_best_stay_head_by_head():
    where = positions([0, 1, 2, 3], [4, 5, 6, 7])
    scores = np.array([[5.0, 1, 4, 2], [1, 2, 3, 4]])
    policy = type("Given", (Policy,), {"budget": 3, "score": lambda *_: scores})()
    stays = choose(policy, where, np.zeros((2, 4)), 8, keep=2)
    assert stays.tolist() == [[True, False, True, False], [False, False, True, True]]


def test_ties_go_to_the_newest_wherever_it_lies():
    policy = type("Same", (Policy,), {"budget": 3, "score": lambda self, p, m, n: np.zeros(p.shape)})()
    stays = choose(policy, positions([7, 2, 9, 4]), np.zeros((1, 4)), 10, keep=2)
    assert stays.tolist() == [[True, False, True, False]]


def test_holes_never_stay():
    stays = choose(Newest(), positions([-1, 3, -1, 1]), np.zeros((1, 4)), 4, keep=3)
    assert stays.tolist() == [[False, True, False, True]]


def test_nothing_stays_when_nothing_may():
    assert not choose(Newest(), positions([0, 1]), np.zeros((1, 2)), 2, keep=0).any()


def test_a_score_of_the_wrong_shape_is_named():
    policy = type("Wrong", (Policy,), {"budget": 3, "score": lambda *_: np.zeros(4)})()
    with pytest.raises(ValueError, match=r"must return shape \(1, 2\).*got \(4,\)"):
        choose(policy, positions([0, 1]), np.zeros((1, 2)), 2, keep=1)


@given(st.integers(1, 4), st.integers(0, 12), st.integers(0, 2**16))
def test_pack_brings_all_that_stays_to_the_front(heads, slots, seed):
    rng = np.random.default_rng(seed)
    stays = rng.random((heads, slots)) < rng.random((heads, 1))
    rows = rng.permutation(heads * slots).reshape(heads, slots)
    moves = pack(stays)
    assert moves.kept == (max(map(sum, stays.tolist())) if slots else 0)
    packed = rows.copy()
    packed[~stays] = -1
    moves.apply(packed, -1)
    for head in range(heads):
        assert sorted(packed[head][packed[head] >= 0]) == sorted(rows[head][stays[head]])
        assert np.all(packed[head, moves.kept :] == -1)
        # what lies in front already is left where it is
        assert np.array_equal(packed[head, : moves.kept][stays[head, : moves.kept]],
                              rows[head, : moves.kept][stays[head, : moves.kept]])  # fmt: skip
    assert len(moves.heads) == sum(row[moves.kept :].sum() for row in stays)


def test_moves_apply_to_their_heads():
    rows = np.array([[1, 2, 3], [4, 5, 6]])
    Moves(2, np.array([1]), np.array([2]), np.array([0])).apply(rows, 0)
    assert rows.tolist() == [[1, 2, 0], [6, 5, 0]]


# -- policies --------------------------------------------------------------------------------------------------------


def test_window_prefers_sinks_then_the_newest():
    scores = SlidingWindow(4, sinks=2).score(positions([9, 0, 5, 1, 2]), None, 10)
    assert np.argsort(-scores[0], kind="stable").tolist() == [1, 3, 0, 2, 4]
    assert np.isinf(scores[0]).tolist() == [False, True, False, True, False]
    assert SlidingWindow(4, sinks=2).budget == 6
    assert SlidingWindow(4, sinks=2).rules() == ((4, 2),)


def test_heavy_hitter_keeps_the_recent_and_then_the_heavy():
    where, mass = positions([0, 1, 6, 7, 8, 9]), np.array([[3.0, 9, 1, 0, 0, 0]])
    assert HeavyHitter(6, recent=2).score(where, mass, 10).tolist() == [[3, 9, 1, 0, np.inf, np.inf]]
    assert HeavyHitter(6).score(where, mass, 10).tolist() == [[3, 9, 1, np.inf, np.inf, np.inf]]
    assert HeavyHitter(6).observe is None


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_snapkv_takes_the_maximum_of_the_neighbours(kernel):
    mass = np.random.default_rng(0).random((2, 11))
    where = np.broadcast_to(np.arange(11), (2, 11))
    scores = SnapKV(8, window=3, kernel=kernel).score(where, mass, 11)
    for head in range(2):
        for slot in range(8):
            around = mass[head, max(0, slot - kernel // 2) : slot + kernel // 2 + 1]
            assert scores[head, slot] == around.max()
    assert np.isinf(scores[:, 8:]).all()


def test_units_that_stay():
    """The budget in units: one token less than the budget, for the one that comes; less what waits in the tail."""
    assert HeavyHitter(16).units(waiting=0, unit=1) == 15
    assert HeavyHitter(16).units(waiting=3, unit=4) == 3
    assert HeavyHitter(16).units(waiting=20, unit=4) == 0
    assert SnapKV(16, window=8).units(waiting=0, unit=1) == 16
    # a window must not lose a token that can be seen: rounded up, sinks and window apart
    assert SlidingWindow(10, sinks=3).units(waiting=0, unit=1) == 12
    assert SlidingWindow(10, sinks=3).units(waiting=2, unit=4) == 1 + 2
    assert SlidingWindow(10).units(waiting=30, unit=4) == 0
    assert SlidingWindow(3, sinks=2).units(waiting=5, unit=1) == 2  # a tail longer than the window takes no sink away


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(0), "window must be an integer of at least 1, got 0"),
        (lambda: SlidingWindow(4, -1), "sinks must be an integer of at least 0, got -1"),
        (lambda: SlidingWindow(True), "got True"),
        (lambda: HeavyHitter(1), "at least 2, got 1"),
        (lambda: HeavyHitter(8, 9), "at least 1 and at most 8, got 9"),
        (lambda: SnapKV(8, window=9), "at most 8, got 9"),
        (lambda: SnapKV(64, kernel=4), "must be odd.*got 4"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_budget_must_hold_the_exact_tail():
    spec = kvlib.CacheSpec(HEADS, WIDTH, dtype="float32")
    codec = kvlib.KIVI(4, group=8, residual=8)  # up to 15 tokens wait
    with pytest.raises(ValueError, match="up to 15 tokens"):
        kvlib.KVCache(spec, codec=codec, eviction=HeavyHitter(15))
    kvlib.KVCache(spec, codec=codec, eviction=HeavyHitter(16))
    kvlib.KVCache(spec, codec=codec, eviction=SlidingWindow(4))
    with pytest.raises(TypeError, match="SlidingWindow"):
        kvlib.KVCache(spec, eviction=SlidingWindow)
    with pytest.raises(TypeError, match="got 'window'"):
        kvlib.KVCache(spec, eviction="window")


# -- in a cache, against a simulation --------------------------------------------------------------------------------


def run(policy, tokens=40, prompt=12, block_size=4, group=2, seed=0, **options):
    """Feed a prompt and then token by token. Yields (step, cache, k, v, q, out) after each append and attend."""
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, HEADS, tokens, WIDTH)).astype(np.float32)
    q = (3 * rng.standard_normal((HEADS * group, tokens, WIDTH))).astype(np.float32)
    spec = kvlib.CacheSpec(HEADS, WIDTH, dtype="float32")
    cache = kvlib.KVCache(spec, max_tokens=tokens, block_size=block_size, eviction=policy, **options)
    for start, stop in [(0, prompt), *((n, n + 1) for n in range(prompt, tokens))]:
        cache.append(k[None, :, start:stop], v[None, :, start:stop])
        yield stop, cache, k, v, q, cache.attend(q[None, :, start:stop])[0]


def weights(q, k, visible):
    """Attention weights in float64, summed over the query heads of each KV head: q (Hq, T, D) -> (Hkv, T, S)."""
    scores = np.einsum("hgtd,hsd->hgts", q.reshape(HEADS, -1, *q.shape[1:]).astype(np.float64), k) / np.sqrt(WIDTH)
    scores = np.where(visible[:, None], scores, -np.inf)
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return (exp / exp.sum(-1, keepdims=True)).sum(axis=1)


def check_answer(out, q, k, v, kept, stop, tokens):
    for head in range(HEADS):
        here = np.array(sorted(kept[head]))
        visible = here[None] <= np.arange(stop - tokens, stop)[:, None]
        rows = slice(head * len(q) // HEADS, (head + 1) * len(q) // HEADS)
        expected = reference.attention(q[rows], k[head : head + 1, here], v[head : head + 1, here], visible=visible)
        np.testing.assert_allclose(out[rows], expected, rtol=2e-5, atol=2e-5)


def kept_by(cache):
    _, _, where = cache.read(0)
    return [set(row[row >= 0].tolist()) for row in np.broadcast_to(where, (HEADS, where.shape[-1]))]


@pytest.mark.parametrize("seed", [1, 2, 5])
def test_heavy_hitter_equals_a_simulation(seed):
    policy, prompt = HeavyHitter(9, recent=3), 12
    mass, kept, differ = np.zeros((HEADS, 40)), [set() for _ in range(HEADS)], False
    for stop, cache, k, v, q, out in run(policy, prompt=prompt, seed=seed):
        tokens = prompt if stop == prompt else 1
        for head in range(HEADS):
            score = {p: (np.inf if p >= stop - tokens - 3 else mass[head, p], p) for p in kept[head]}
            kept[head] = set(sorted(score, key=score.get)[-8:]) | set(range(stop - tokens, stop))
        visible = np.zeros((HEADS, tokens, 40), bool)
        for head in range(HEADS):
            for t in range(tokens):
                visible[head, t, [p for p in kept[head] if p <= stop - tokens + t]] = True
        mass += weights(q[:, stop - tokens : stop], k, visible).sum(axis=1)
        assert kept_by(cache) == kept
        check_answer(out, q[:, stop - tokens : stop], k, v, kept, stop, tokens)
        if stop > prompt:
            assert {len(head) for head in kept} == {9}
            assert cache.num_blocks - cache.num_free_blocks == 3  # 9 slots in blocks of 4
        differ |= kept[0] != kept[1]
    assert differ


@pytest.mark.parametrize("chunks", [(20,), (7, 13), (18, 2)])
def test_snapkv_equals_a_simulation_whatever_the_chunks(chunks):
    rng = np.random.default_rng(3)
    prompt, window, budget = 20, 4, 10
    k, v = rng.standard_normal((2, HEADS, 24, WIDTH)).astype(np.float32)
    q = (3 * rng.standard_normal((2 * HEADS, 24, WIDTH))).astype(np.float32)
    visible = np.tril(np.ones((24, 24), bool))[None, prompt - window : prompt, :prompt]
    mass = weights(q[:, prompt - window : prompt], k[:, :prompt], visible).sum(axis=1)
    kept = []
    for head in range(HEADS):
        pooled = [mass[head, max(0, p - 1) : p + 2].max() for p in range(prompt - window)]
        best = sorted(range(prompt - window), key=lambda p: (pooled[p], p))[-(budget - window) :]
        kept.append({*best, *range(prompt - window, prompt)})

    spec = kvlib.CacheSpec(HEADS, WIDTH, dtype="float32")
    policy = SnapKV(budget, window=window, kernel=3)
    cache = kvlib.KVCache(spec, max_tokens=24, block_size=4, eviction=policy)
    start = 0
    for tokens in chunks:
        cache.append(k[None, :, start : start + tokens], v[None, :, start : start + tokens])
        cache.attend(q[None, :, start : start + tokens])
        start += tokens
    assert kept_by(cache) == [set(range(prompt))] * HEADS  # nothing leaves before the prompt has ended
    for stop in range(prompt + 1, 25):
        cache.append(k[None, :, stop - 1 : stop], v[None, :, stop - 1 : stop])
        for head in kept:
            head.add(stop - 1)
        assert kept_by(cache) == kept
        out = cache.attend(q[None, :, stop - 1 : stop])[0]
        check_answer(out, q[:, stop - 1 : stop], k, v, kept, stop, 1)
    assert cache.num_blocks - cache.num_free_blocks == 4  # 14 slots in blocks of 4


def test_a_policy_that_observes_the_last_queries():
    kept = [set() for _ in range(HEADS)]
    for stop, cache, k, v, q, out in run(Loudest(), prompt=12):
        tokens = 12 if stop == 12 else 1
        if stop > 12:  # looked back on with the last three queries before this one, over what was kept
            for head in range(HEADS):
                visible = np.zeros((HEADS, 3, 40), bool)
                for t in range(3):
                    visible[head, t, [p for p in kept[head] if p <= stop - 4 + t]] = True
                visible[1 - head, :, 0] = True
                mass = weights(q[:, stop - 4 : stop - 1], k, visible).sum(axis=1)[head]
                score = {p: (np.inf if p == stop - 2 else mass[p], p) for p in kept[head]}
                kept[head] = set(sorted(score, key=score.get)[-5:]) | {stop - 1}
        else:
            kept = [set(range(12)) for _ in range(HEADS)]
        assert kept_by(cache) == kept, stop
        check_answer(out, q[:, stop - tokens : stop], k, v, kept, stop, tokens)


@pytest.mark.parametrize("codec", ["plain", kvlib.Int(4, "channel", 4), kvlib.KIVI(4, group=4, residual=6)])
@pytest.mark.parametrize("policy", [SlidingWindow(9), SlidingWindow(6, sinks=3)])
def test_a_window_sees_what_it_says_in_any_chunks(codec, policy):
    """Also where whole groups stay for the sake of one of their tokens."""
    spec = kvlib.CacheSpec(HEADS, WIDTH, dtype="float32")
    rng = np.random.default_rng(0)
    k, v, q = rng.standard_normal((3, 1, HEADS, 40, WIDTH)).astype(np.float32)
    caches = [
        kvlib.KVCache(spec, max_tokens=80, block_size=4, codec=codec, eviction=eviction) for eviction in (policy, None)
    ]
    start = 0
    for tokens in (13, 1, 7, 1, 1, 5, 12):
        stop = start + tokens
        caches[0].append(k[:, :, start:stop], v[:, :, start:stop])
        answers = caches[0].attend(q[:, :, start:stop])[0]
        for position in range(start, stop):  # what each query would have been told, had it come alone
            caches[1].append(k[:, :, position : position + 1], v[:, :, position : position + 1])
            all_k, all_v, where = caches[1].read(0)
            visible = (position - where < policy.window) | (where < policy.sinks)
            expected = reference.attention(q[0, :, position : position + 1], all_k, all_v, visible=visible[None])
            np.testing.assert_allclose(answers[:, position - start, None], expected, rtol=2e-5, atol=2e-5)
        assert caches[0].read(0)[2].tolist() == np.flatnonzero(visible).tolist()
        np.testing.assert_array_equal(caches[0].read(0)[0], all_k[:, visible])
        start = stop


def test_nothing_may_be_published_of_a_sequence_that_evicts():
    """Its blocks do not hold what a prefix index would take them for."""
    x = np.ones((1, HEADS, 12, WIDTH), np.float32)
    for policy, computed in ((None, 12), (SlidingWindow(20), 0)):
        cache = kvlib.KVCache(kvlib.CacheSpec(HEADS, WIDTH, dtype="float32"), eviction=policy, block_size=4)
        cache.append(x, x)
        assert cache.computed(0) == computed


def test_a_stream_longer_than_max_tokens():
    """max_tokens bounds what is stored, not the positions that go by."""
    policy = SlidingWindow(6, sinks=2)
    spec = kvlib.CacheSpec(HEADS, WIDTH, dtype="float32")
    cache = kvlib.KVCache(spec, max_tokens=8, eviction=policy)
    row = np.ones((1, HEADS, 1, WIDTH), np.float32)
    for position in range(50):
        cache.append(row * position, row * position)
    assert cache.lengths == {0: 50}
    assert cache.read(0)[2].tolist() == [0, 1, *range(44, 50)]
    assert cache.read(0)[1][0, :, 0].tolist() == [0, 1, *range(44, 50)]
    with pytest.raises(ValueError, match="max_tokens=8"):
        cache.append(np.repeat(row, 2, axis=2), np.repeat(row, 2, axis=2))


def test_forks_evict_apart():
    """Who moves rows in a shared block copies it first."""
    rng = np.random.default_rng(0)
    spec = kvlib.CacheSpec(HEADS, WIDTH, dtype="float32")
    cache = kvlib.KVCache(spec, max_tokens=32, block_size=4, num_blocks=16, eviction=HeavyHitter(8))
    k = rng.standard_normal((1, HEADS, 16, WIDTH)).astype(np.float32)
    cache.append(k, k)
    cache.attend(k)
    twin = cache.fork(0)
    before = [x.copy() for x in cache.read(twin)]
    for _ in range(6):
        step = rng.standard_normal((1, HEADS, 1, WIDTH)).astype(np.float32)
        cache.append(step, step, seqs=[0])
        cache.attend(step, seqs=[0])
    for now, then in zip(cache.read(twin), before, strict=True):
        assert np.array_equal(now, then)
    assert set(cache.block_table(0)).isdisjoint(cache.block_table(twin))
    cache.close(0)
    cache.close(twin)
    assert cache.num_free_blocks == cache.num_blocks


def test_truncation_forgets_the_new_and_does_not_bring_back_the_old():
    for stop, cache, k, *_ in run(SlidingWindow(6, sinks=2), tokens=30):
        if stop == 28:
            cache.truncate(0, 25)
            assert cache.lengths == {0: 25}
            assert kept_by(cache) == [{0, 1, 22, 23, 24}] * HEADS
            np.testing.assert_array_equal(cache.read(0)[0], k[:, [0, 1, 22, 23, 24]])
            break


def test_truncation_into_a_group_that_was_evicted():
    codec = kvlib.Int(8, "channel", 4)
    for stop, cache, k, *_ in run(SlidingWindow(8), tokens=32, codec=codec):
        if stop == 30:
            with pytest.raises(ValueError, match="evicted the group of tokens 8 to 11"):
                cache.truncate(0, 10)
            assert cache.lengths == {0: 30}
            cache.truncate(0, 26)
            where = cache.read(0)[2]
            assert where.tolist() == [20, 21, 22, 23, 24, 25]  # group 20 to 23 stayed for the sake of 22
            np.testing.assert_allclose(cache.read(0)[0], k[:, where], atol=0.05)
            break
