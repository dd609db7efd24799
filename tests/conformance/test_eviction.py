"""Corners of eviction that the grid's story does not pass: each failed once."""

import numpy as np
import pytest

import kvlib
from kvlib.codecs import Int, Split
from kvlib.eviction import HeavyHitter, Policy, SlidingWindow, SnapKV

SPEC = kvlib.CacheSpec(2, 8, 1, "float32")


@pytest.fixture
def rows(rng):
    """Rows (1, heads, tokens, 8) of noise."""
    return lambda heads, tokens: rng.standard_normal((1, heads, tokens, 8)).astype(np.float32)


def test_a_query_that_sees_nothing_gets_zeros(rows):
    """After a rollback to tokens that had left, a window may hold none of what is there."""
    cache = kvlib.KVCache(SPEC, max_tokens=64, block_size=16, eviction=SlidingWindow(4, sinks=2))
    cache.append(rows(2, 20), rows(2, 20))
    cache.append(rows(2, 1), rows(2, 1))
    cache.truncate(0, 10)
    assert cache.read(0)[2].tolist() == [0, 1]
    assert np.isfinite(cache.attend(rows(4, 1))).all()
    for tokens in (1, 2):
        assert not cache.attend(rows(4, tokens), window=3).any()
        assert not cache.attend(rows(4, tokens), window=3, sinks=np.zeros(4, np.float32)).any()


def test_snapkv_chooses_again_when_a_sequence_begins_again(rows):
    cache = kvlib.KVCache(SPEC, max_tokens=64, block_size=16, eviction=SnapKV(8, window=2, kernel=3))
    for _ in range(2):
        cache.append(rows(2, 20), rows(2, 20))
        cache.attend(rows(4, 20))
        cache.append(rows(2, 1), rows(2, 1))
        assert cache.read(0)[0].shape[1] == 9
        cache.truncate(0, 0)


def test_snapkv_looks_back_with_the_positions_that_its_queries_had():
    """The last four queries, at 16 … 19, cannot have seen token 25, however much they would have liked it."""
    cache = kvlib.KVCache(SPEC, max_tokens=64, block_size=16, eviction=SnapKV(8, window=4, kernel=1))
    q, k = np.zeros((1, 4, 20, 8), np.float32), np.zeros((1, 2, 31, 8), np.float32)
    q[..., 0], k[:, :, [2, 3], 0], k[:, :, 25, 0] = 3, 5, 9
    cache.append(k[:, :, :20], k[:, :, :20])
    cache.attend(q)
    cache.append(k[:, :, 20:30], k[:, :, 20:30])
    cache.append(k[:, :, 30:], k[:, :, 30:])
    positions = cache.read(0)[2]
    assert {2, 3, 26, 27, 28, 29, 30} <= set(positions.tolist())
    assert 25 not in positions


def test_snapkv_does_not_count_a_query_twice(rows):
    """Two calls of attend for the same positions: what counts are the last, not both in a row."""
    k, q = rows(2, 20), rows(4, 4)
    kept = []
    for asked in ([q[:, :, 2:]], [q[:, :, 2:], q[:, :, 2:]], [q[:, :, :2], q[:, :, 2:]]):
        cache = kvlib.KVCache(SPEC, max_tokens=64, eviction=SnapKV(8, window=4, kernel=1))
        cache.append(k, k)
        for queries in asked:
            cache.attend(queries)
        cache.append(k[:, :, :1], k[:, :, :1])
        kept.append(cache.read(0)[2].tolist())
    assert kept[0] == kept[1] == kept[2]


def test_a_group_that_is_opened_again_has_not_the_mass_of_others(rows):
    """Tokens 8 to 10 waited and were attended to; after the cut 4 and 5 wait in their place."""
    codec = Split(Int(8, "channel", 4), Int(8))
    cache = kvlib.KVCache(SPEC, max_tokens=64, block_size=16, codec=codec, eviction=HeavyHitter(16))
    cache.append(rows(2, 11), rows(2, 11))
    cache.attend(rows(4, 11))
    slots = cache._tables[0].slots
    assert (slots.tail_mass > 0).all()
    cache.truncate(0, 10)
    assert (slots.tail_mass[..., :2] > 0).all()
    cache.truncate(0, 6)
    assert not slots.tail_mass.any()
    assert not slots.mass[:, :, 1:].any()


def test_what_a_policy_does_to_its_arguments_stays_its_own(rows):
    class Careless(Policy):
        budget, observe = 6, None

        def score(self, positions, mass, length):
            mass[:] = positions
            positions[:] = 0
            return mass

    cache = kvlib.KVCache(SPEC, max_tokens=64, eviction=Careless())
    cache.append(rows(2, 20), rows(2, 20))
    cache.attend(rows(4, 20))
    cache.append(rows(2, 1), rows(2, 1))
    assert cache.read(0)[2].tolist() == [15, 16, 17, 18, 19, 20]


def test_a_policy_is_derived_from_policy():
    class Stranger:
        budget = 4

        def score(self, positions, mass, length):
            return positions

    with pytest.raises(TypeError, match=r"eviction must be None or a kvlib\.eviction\.Policy"):
        kvlib.KVCache(SPEC, eviction=Stranger())
