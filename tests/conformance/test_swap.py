"""Swap: what leaves for the host and comes back is what it was, bit for bit, for every cache."""

import contextlib

import numpy as np
import pytest

import kvlib
from kvlib.swap import put_back, take_out
from tests.conformance.conftest import Setup
from tests.conformance.graph import changed, snapshot

TOKENS = (19, 1, 5)  # appended at once, so that tails and runs are there


def filled(setup: Setup, **settings) -> kvlib.KVCache:
    """Sequences 0 and 1 of two layers with noise, appended in pieces and attended to."""
    cache = setup.cache(setup.spec(num_layers=2), batch=2, **settings)
    rng = np.random.default_rng(7)
    for tokens in TOKENS:
        grow(cache, setup, rng, tokens, [0, 1])
    return cache


def grow(
    cache: kvlib.KVCache, setup: Setup, rng: np.random.Generator, tokens: int, seqs: list[int]
) -> list[np.ndarray]:
    """The same ``tokens`` to each of ``seqs``, in both layers: what each of them answers."""
    outs = []
    for layer in range(2):
        q, k, v = (setup.array(rng.standard_normal((1, heads, tokens, 32))) for heads in (4, 2, 2))
        for seq in seqs:
            cache.append(k, v, layer, [seq])
            outs.append(setup.host(cache.attend(q, layer, [seq])))
    return outs


def rows(cache: kvlib.KVCache, setup: Setup, seq: int) -> list[np.ndarray]:
    return [setup.host(x) if i % 3 < 2 else x for layer in range(2) for i, x in enumerate(cache.read(seq, layer))]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_there_and_back(setup):
    """While it is away its neighbour writes over its blocks; then both go on as if nothing had happened."""
    cache = filled(setup, num_blocks=160)
    before, held = rows(cache, setup, 1), cache.block_table(1)
    free = cache.num_free_blocks
    away = take_out(cache, 1)
    assert away.length == sum(TOKENS) and away.num_blocks == len(held)
    assert list(cache.lengths) == [0] and cache.num_free_blocks == free + len(held)
    grow(cache, setup, np.random.default_rng(1), 40, [0])
    back = put_back(cache, away)
    assert cache.lengths == {0: sum(TOKENS) + 40, back: sum(TOKENS)} and len(cache.block_table(back)) == len(held)
    assert same(rows(cache, setup, back), before)

    other = filled(setup, num_blocks=160)  # never swapped
    for tokens in (1, 1, 12):
        ours, its = (grow(c, setup, np.random.default_rng(tokens), tokens, [s]) for c, s in ((cache, back), (other, 1)))
        assert same(ours, its)
    for c, seq in ((cache, back), (other, 1)):
        with contextlib.suppress(ValueError):  # it has evicted a group that the cut goes through: then both have
            c.truncate(seq, sum(TOKENS) + 2)
    assert same(rows(cache, setup, back), rows(other, setup, 1))


def test_what_is_away_is_on_the_host(setup32):
    cache = filled(setup32, num_blocks=160)
    stored = sum(x.nbytes for x in cache._storage.arrays()) // cache.num_blocks * len(cache.block_table(0))
    away = take_out(cache, 0)
    for x in (*away.planes, *(away.table.tail.arrays() if away.table.tail else ())):
        assert isinstance(x, np.ndarray) or x.device.type == "cpu"
    assert away.nbytes == stored + sum(x.nbytes for x in away.table.arrays())


def test_it_may_come_back_twice_and_elsewhere(setup32):
    cache = filled(setup32, num_blocks=160)
    elsewhere = setup32.cache(cache.spec, batch=0, num_blocks=160)
    before = rows(cache, setup32, 0)
    away = take_out(cache, 0)
    here, twin, there = put_back(cache, away), put_back(cache, away), put_back(elsewhere, away)
    grow(cache, setup32, np.random.default_rng(2), 9, [here])
    assert same(rows(cache, setup32, twin), before) and same(rows(elsewhere, setup32, there), before)


def test_shared_blocks_stay_with_who_shares_them(setup32):
    cache = filled(setup32, num_blocks=160)
    before = rows(cache, setup32, 0)
    twin = cache.fork(0)
    free = cache.num_free_blocks
    away = take_out(cache, 0)
    assert cache.num_free_blocks == free and same(rows(cache, setup32, twin), before)
    back = put_back(cache, away)
    assert not set(cache.block_table(back)) & set(cache.block_table(twin))
    assert cache.num_free_blocks == free - away.num_blocks and same(rows(cache, setup32, back), before)


def test_no_room_to_come_back_changes_nothing(setup32):
    cache = filled(setup32)
    away = take_out(cache, 0)
    while cache.num_free_blocks >= away.num_blocks:
        put_back(cache, away)
    before = snapshot(cache)
    with pytest.raises(kvlib.CacheFull, match=f"needs {away.num_blocks} more blocks"):
        put_back(cache, away)
    assert not changed(before, snapshot(cache))


def test_what_cannot_be_written_takes_no_block():
    cache = kvlib.KVCache(kvlib.CacheSpec(2, 32, dtype="float32"), 1, 40, block_size=4)
    cache.append(np.ones((1, 2, 9, 32), np.float32), np.ones((1, 2, 9, 32), np.float32))
    away = take_out(cache, 0)
    before = snapshot(cache._tables.open_tables), cache.num_free_blocks, cache.pool.refs.tolist()
    with pytest.raises(ValueError, match="broadcast"):
        put_back(cache, away._replace(planes=[away.planes[0], away.planes[1][:, :2]]))
    assert (snapshot(cache._tables.open_tables), cache.num_free_blocks, cache.pool.refs.tolist()) == before


@pytest.mark.parametrize(
    "other, named",
    [
        ({"block_size": 8}, "block_size is 8 here and was 4"),
        ({"codec": "int8"}, "codec is"),
        ({"max_tokens": 99}, "max_tokens is 99"),
        ({"backend": "torch"}, "backend is 'torch' here and was 'numpy'"),
    ],
)
def test_another_form_of_cache_is_refused(other, named):
    spec = kvlib.CacheSpec(2, 32, dtype="float32")
    how = {"max_tokens": 40, "block_size": 4}
    cache, elsewhere = kvlib.KVCache(spec, 1, **how), kvlib.KVCache(spec, 0, **(how | other))
    cache.append(np.ones((1, 2, 3, 32), np.float32), np.ones((1, 2, 3, 32), np.float32))
    away = take_out(cache, 0)
    with pytest.raises(ValueError, match=named):
        put_back(elsewhere, away)
    assert elsewhere.lengths == {} and elsewhere.num_free_blocks == elsewhere.num_blocks
    with pytest.raises(KeyError, match="sequence 0 is not open"):
        take_out(cache, 0)


def test_an_empty_sequence_and_a_latent_one():
    cache = kvlib.KVCache(kvlib.CacheSpec(1, 12, num_layers=1, latent=8, dtype="float32"), 2, 16, block_size=4)
    cache.append(np.arange(60, dtype=np.float32).reshape(1, 1, 5, 12), seqs=[1])
    before = cache.read(1)
    assert take_out(cache, 0).length == 0
    back = put_back(cache, take_out(cache, 1))
    assert all(np.array_equal(x, y) for x, y in zip(cache.read(back), before, strict=True))
