"""Open, fork, truncate, close, reset: what each sequence sees, and which block belongs to whom."""

from collections import Counter

import numpy as np
import pytest
import torch

import kvlib
from tests.conformance import bounds
from tests.conformance.conftest import ENTRIES, Setup
from tests.conformance.graph import changed, snapshot


class Text:
    """Tokens to append: the same (K, V) rows again and again, so that two caches can be told the same
    story.
    """

    def __init__(self, setup: Setup, layers: int = 1, tokens: int = 60) -> None:
        rng = np.random.default_rng(17)
        self.setup, self.layers = setup, layers
        self.rows = rng.standard_normal((layers, 2, 1, 2, tokens, 32))

    def append(
        self, cache: kvlib.KVCache, seq: int, start: int, stop: int, layers=None, plus: float = 0.0
    ) -> None:
        """Tokens start … stop-1 of the text (plus a constant) to the given layers of one sequence."""
        for layer in range(self.layers) if layers is None else layers:
            k, v = (self.setup.array(x[:, :, start:stop] + plus) for x in self.rows[layer])
            cache.append(k, v, layer=layer, seqs=[seq])


def contents(cache: kvlib.KVCache, seq: int, stop: int | None = None) -> list[tuple]:
    """K and V of a sequence (its first ``stop`` tokens) in every layer, bit for bit, as `read` gives them."""
    rows = [x[:, :stop] for layer in range(cache.spec.num_layers) for x in cache.read(seq, layer)[:2]]
    return [(tuple(x.shape), cache.backend.to_numpy(x).tobytes()) for x in rows]


def fresh(text: Text, *parts: tuple | int, layers=None) -> list[tuple]:
    """The contents of a new cache that was told (start, stop, plus), …: what a sequence ought to contain.

    A part that is a number is the length to which that cache is truncated.
    """
    cache = text.setup.cache(text.setup.spec(num_layers=text.layers))
    for part in parts:
        if isinstance(part, int):
            cache.truncate(0, part)
        else:
            text.append(cache, 0, *part[:2], layers, part[2])
    return contents(cache, 0)


def cut(cache: kvlib.KVCache, length: int, n: int) -> list[tuple | int]:
    """What is left of the first ``length`` tokens of a text after truncation to ``n``, as parts for `fresh`.

    That is the first n tokens. But a group of tokens that was encoded is not made exact again: there, a new cache
    that is truncated likewise (what it then holds is checked against a shadow in test_grid.py).
    """
    if n >= bounds.closed_tokens(cache.codec, n) == bounds.closed_tokens(cache.codec, length):
        return [(0, n, 0)] if n else []
    if cache.codec.tail:  # what several tokens at once have encoded is still exact, until the next one comes
        return [(0, length - 1, 0), (length - 1, length, 0), n]
    return [(0, n, 0)] if n else []


def holders(cache: kvlib.KVCache) -> Counter:
    """Block id -> how many open sequences have it in their table."""
    return Counter(block for seq in cache.lengths for block in cache.block_table(seq))


def conserved(cache: kvlib.KVCache) -> None:
    """Free + held = all, each block is counted as often as it is held, and the free list holds exactly
    the rest.
    """
    held = holders(cache)
    assert cache.num_free_blocks + len(held) == cache.num_blocks
    pool = cache._tables.pool
    assert {block: int(n) for block, n in enumerate(pool.refs) if n} == dict(held)
    free = pool._free[: pool.num_free].tolist()
    assert len(set(free)) == len(free)
    assert set(free) == set(range(cache.num_blocks)) - set(held)


# -- fork ------------------------------------------------------------------------------------------


def test_fork_shares_until_somebody_writes(setup):
    text = Text(setup)
    cache = setup.cache(num_blocks=200)
    text.append(cache, 0, 0, 21)
    used = len(holders(cache))
    twin = cache.fork(0)
    assert len(holders(cache)) == used
    assert cache.lengths == {0: 21, twin: 21}
    assert contents(cache, twin) == contents(cache, 0) == fresh(text, (0, 21, 0))
    text.append(cache, twin, 21, 30, plus=1)
    text.append(cache, 0, 21, 40)
    assert contents(cache, twin) == fresh(text, (0, 21, 0), (21, 30, 1))
    assert contents(cache, 0) == fresh(text, (0, 40, 0))
    shared = 21 // cache.block_size  # whole blocks before the fork stay shared for ever
    assert cache.block_table(0)[:shared] == cache.block_table(twin)[:shared]
    assert not set(cache.block_table(0)[shared:]) & set(cache.block_table(twin)[shared:])
    conserved(cache)


@pytest.mark.parametrize("entry", [name for name in ENTRIES if not Setup(name, "numpy", "float32").codec.tail])
def test_a_full_block_is_never_copied(setup32):
    """A fork at a block boundary costs nothing but the new block."""
    size = setup32.cache().block_size
    text = Text(setup32, tokens=2 * size)
    cache = setup32.cache(max_tokens=2 * size, block_size=size, num_blocks=3)
    text.append(cache, 0, 0, size)
    twin = cache.fork(0)
    for seq in (0, twin):
        text.append(cache, seq, size, size + 1, plus=seq)
    assert cache.num_free_blocks == 0
    assert holders(cache)[cache.block_table(0)[0]] == 2
    conserved(cache)


def test_copy_on_write_between_the_layers_of_one_step(setup):
    """The first layer's append copies the shared block, with what every other layer has in it so far."""
    text = Text(setup, layers=3)
    cache = setup.cache(setup.spec(num_layers=3), num_blocks=300)
    text.append(cache, 0, 0, 18)
    text.append(cache, 0, 18, 23, layers=[0, 1])  # layer 2 has not come yet
    twin = cache.fork(0)
    text.append(cache, twin, 18, 23, layers=[2], plus=5)  # the fork finishes its step first
    text.append(cache, twin, 23, 25, plus=5)
    text.append(cache, 0, 18, 23, layers=[2])
    text.append(cache, 0, 23, 24)
    assert contents(cache, 0) == fresh(text, (0, 24, 0))
    own = setup.cache(setup.spec(num_layers=3))
    text.append(own, 0, 0, 18)
    text.append(own, 0, 18, 23, layers=[0, 1])
    text.append(own, 0, 18, 23, layers=[2], plus=5)
    text.append(own, 0, 23, 25, plus=5)
    assert contents(cache, twin) == contents(own, 0)
    conserved(cache)


def test_both_holders_in_one_call(setup):
    """Parent, child and grandchild write into the same shared block in one append: the last one keeps the
    block.
    """
    text = Text(setup)
    cache = setup.cache(num_blocks=300)
    text.append(cache, 0, 0, 19)
    child = cache.fork(0)
    grandchild = cache.fork(child)
    seqs = [child, 0, grandchild]
    before = len(holders(cache))
    k = np.concatenate([text.rows[0, 0][:, :, 19:22] + seq for seq in seqs])
    cache.append(setup.array(k), setup.array(k), seqs=seqs)
    for seq in seqs:
        expected = setup.cache()
        text.append(expected, 0, 0, 19)
        part = setup.array(text.rows[0, 0][:, :, 19:22] + seq)
        expected.append(part, part)
        assert contents(cache, seq) == contents(expected, 0)
    partial = 19 % cache.block_size > 0
    new_each = -(-22 // cache.block_size) - -(-19 // cache.block_size)
    assert len(holders(cache)) == before + 2 * partial + 3 * new_each
    conserved(cache)


@pytest.mark.parametrize("close_first", ["parent", "child"])
def test_either_side_of_a_fork_may_go_first(setup, close_first):
    text = Text(setup)
    cache = setup.cache(num_blocks=200)
    text.append(cache, 0, 0, 21)
    twin = cache.fork(0)
    gone, stays = (0, twin) if close_first == "parent" else (twin, 0)
    cache.close(gone)
    conserved(cache)
    blocks = cache.block_table(stays)
    text.append(cache, stays, 21, 22)
    assert cache.block_table(stays)[: len(blocks)] == blocks  # alone again: no copy
    assert contents(cache, stays) == fresh(text, (0, 22, 0))
    other = cache.open()
    text.append(cache, other, 5, 40)  # takes the freed blocks, if any
    assert contents(cache, stays) == fresh(text, (0, 22, 0))
    conserved(cache)


def test_fork_of_an_empty_sequence(setup32):
    text = Text(setup32)
    cache = setup32.cache(num_blocks=200)
    twin = cache.fork(0)
    text.append(cache, twin, 0, 9)
    assert cache.lengths == {0: 0, twin: 9}
    text.append(cache, 0, 3, 7)
    assert contents(cache, twin) == fresh(text, (0, 9, 0))
    assert contents(cache, 0) == fresh(text, (3, 7, 0))
    conserved(cache)


# -- truncate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 4, 5, 15, 16, 17, 32, 33, 39, 40])
def test_truncate_then_go_on(setup, n):
    """Speculative decoding's rollback: forget, then write something else in the same place."""
    text = Text(setup, layers=2)
    cache = setup.cache(setup.spec(num_layers=2), num_blocks=200)
    text.append(cache, 0, 0, 39)
    text.append(cache, 0, 39, 40)
    before = contents(cache, 0, stop=n)
    cache.truncate(0, n)
    assert cache.lengths == {0: n}
    assert len(cache.block_table(0)) == -(-n // cache.block_size)
    assert contents(cache, 0) == before
    rest = cut(cache, 40, n)
    assert contents(cache, 0) == fresh(text, *rest) if n else cache.read(0)[0].shape[1] == 0
    text.append(cache, 0, 40, 50)
    assert contents(cache, 0) == fresh(text, *rest, (40, 50, 0))
    conserved(cache)


def test_truncate_to_the_same_length_changes_nothing(setup32):
    text = Text(setup32)
    cache = setup32.cache(num_blocks=200)
    text.append(cache, 0, 0, 21)
    before = snapshot(cache)
    cache.truncate(0, 21)
    assert changed(before, snapshot(cache)) == []


def test_truncate_leaves_the_other_holder_alone(setup):
    """Both keep a part of the same block; the shorter one must not write into what the longer one still
    reads.
    """
    text = Text(setup)
    cache = setup.cache(num_blocks=200)
    text.append(cache, 0, 0, 29)
    text.append(cache, 0, 29, 30)
    twin = cache.fork(0)
    cache.truncate(twin, 19)
    text.append(cache, twin, 50, 60)
    assert contents(cache, 0) == fresh(text, (0, 30, 0))
    assert contents(cache, twin) == fresh(text, *cut(cache, 30, 19), (50, 60, 0))
    conserved(cache)


def test_truncate_where_a_layer_lags(setup32):
    """Layers that have fewer than n tokens keep all they have, and go on from there."""
    text = Text(setup32, layers=2)
    cache = setup32.cache(setup32.spec(num_layers=2), num_blocks=200)
    text.append(cache, 0, 0, 20, layers=[0])
    text.append(cache, 0, 0, 8, layers=[1])
    cache.truncate(0, 12)
    assert [cache.read(0, layer)[2].size for layer in (0, 1)] == [12, 8]
    text.append(cache, 0, 8, 12, layers=[1])
    if cache.codec.tail:  # layer 0 has opened its last group again
        assert contents(cache, 0)[2:] == fresh(text, (0, 12, 0))[2:]
    else:
        assert contents(cache, 0) == fresh(text, (0, 12, 0))
    before = contents(cache, 0, stop=5)
    if cache.codec.tail:  # what several tokens at once have encoded is still exact, until the next one comes
        text.append(cache, 0, 12, 13)
    cache.truncate(0, 5)
    assert contents(cache, 0) == before
    if not cache.codec.tail:
        assert before == fresh(text, (0, 5, 0))
    conserved(cache)


# -- close, open, reset ----------------------------------------------------------------------------


def test_closed_ids_do_not_come_back_until_reset(setup32):
    cache = setup32.cache(batch=2)
    assert cache.open() == 2
    cache.close(2)
    cache.close(0)
    assert cache.open() == 3
    assert cache.fork(1) == 4
    assert list(cache.lengths) == [1, 3, 4]
    cache.reset()
    assert list(cache.lengths) == [0, 1]
    assert cache.open() == 2


def test_reset_is_a_new_beginning(setup):
    text = Text(setup, layers=2)
    cache = setup.cache(setup.spec(num_layers=2), batch=2, num_blocks=200)
    text.append(cache, 0, 0, 33)
    cache.fork(0)
    text.append(cache, 1, 2, 9)
    cache.reset()
    assert cache.lengths == {0: 0, 1: 0}
    assert cache.num_free_blocks == cache.num_blocks
    assert cache.nbytes_used == setup.cache(setup.spec(num_layers=2), batch=2).nbytes_used  # tails, if any
    text.append(cache, 1, 10, 20)
    assert contents(cache, 1) == fresh(text, (10, 20, 0))
    assert cache.read(0)[2].size == 0
    conserved(cache)


def poison(cache: kvlib.KVCache) -> None:
    """NaN, or the largest integer, into every slot that no sequence has taken, and into every free place of its tail.

    Bytes of 255 as a scale are NaN or infinite too, in e8m0, e4m3 and the upper half of a bfloat16.
    """
    taken = np.zeros((cache.spec.num_layers, cache.num_blocks, cache.block_size), bool)
    for seq, table in cache._tables.open_tables.items():
        for layer in range(cache.spec.num_layers):
            for index, block in enumerate(cache.block_table(seq)):
                taken[layer, block, : max(0, table.stored[layer] - index * cache.block_size)] = True
            for array in (table.tail.k, table.tail.v) if table.tail else ():
                array[layer, :, table.waiting[layer] :] = float("nan")
    for array in cache._storage.arrays():
        kind = str(array.dtype).removeprefix("torch.")
        fill = float("nan") if "float" in kind else np.iinfo(kind).max
        hidden = ~taken[:, :, :: cache.block_size // array.shape[3]]  # one row for each token, or for each group
        hidden = hidden if isinstance(array, np.ndarray) else torch.from_numpy(hidden).to(array.device)
        array.swapaxes(2, 3)[hidden] = fill  # (layers, blocks, slots, heads, columns)


def test_what_others_left_behind_is_never_seen(setup):
    """Blocks come from sequences that were closed or cut. Whatever is in them, no answer shows it."""
    text = Text(setup)
    cache = setup.cache(batch=2, num_blocks=None, max_tokens=48)
    text.append(cache, 0, 0, 48)
    text.append(cache, 1, 0, 47)
    text.append(cache, 1, 47, 48)
    cache.close(0)
    cache.truncate(1, 21)
    poison(cache)
    new = cache.open()
    text.append(cache, new, 10, 27)
    text.append(cache, 1, 40, 41)
    poison(cache)
    assert contents(cache, new) == fresh(text, (10, 27, 0))
    assert contents(cache, 1) == fresh(text, *cut(cache, 48, 21), (40, 41, 0))
    for tokens in (1, 7):
        q = setup.array(np.ones((2, 4, tokens, 32)))
        assert np.isfinite(setup.host(cache.attend(q))).all()


def test_a_pool_serves_more_sequences_than_it_could_hold_at_once(setup32):
    """Twenty sequences of up to three blocks through a pool of seven, in an order that mixes up the free
    list.
    """
    cache = setup32.cache()
    size = max(4, cache.codec.group) if cache.block_size > 16 else cache.block_size
    text = Text(setup32, tokens=3 * size)
    cache = setup32.cache(batch=0, block_size=size, max_tokens=3 * size, num_blocks=7)
    live: dict[int, int] = {}
    for turn in range(20):
        length = 1 + (turn * 5) % (3 * size)
        while cache.num_free_blocks < -(-length // size):
            seq = sorted(live, key=lambda s: (s * 7) % 5)[0]
            assert contents(cache, seq) == fresh(text, (0, live.pop(seq), 0))
            cache.close(seq)
            conserved(cache)
        seq = cache.open()
        text.append(cache, seq, 0, length)
        live[seq] = length
    for seq, length in live.items():
        assert contents(cache, seq) == fresh(text, (0, length, 0))
