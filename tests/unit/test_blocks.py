"""BlockPool: every block is free or held, and is free exactly when nobody holds it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.blocks import BlockPool, CacheFull


def held(pool: BlockPool) -> dict[int, int]:
    return {block: int(count) for block, count in enumerate(pool.refs) if count}


def state(pool: BlockPool) -> tuple:
    return held(pool), pool.num_free, pool._free[: pool.num_free].tolist()


def test_blocks_come_in_order_and_are_distinct():
    pool = BlockPool(5)
    assert (len(pool), pool.num_free) == (5, 5)
    assert pool.allocate(2).tolist() == [0, 1]
    assert pool.allocate(0).tolist() == []
    assert pool.allocate(3).tolist() == [2, 3, 4]
    assert pool.num_free == 0
    assert held(pool) == dict.fromkeys(range(5), 1)


def test_released_blocks_come_again():
    pool = BlockPool(4)
    pool.allocate(4)
    pool.release([2, 0])
    assert pool.num_free == 2
    assert sorted(pool.allocate(2).tolist()) == [0, 2]


@pytest.mark.parametrize("count", [4, 5, 100])
def test_too_many(count):
    pool = BlockPool(5)
    pool.allocate(2)
    before = state(pool)
    with pytest.raises(CacheFull, match=f"needs {count} more blocks, and 3 of 5 are free") as info:
        pool.allocate(count)
    assert (info.value.needed, info.value.free, info.value.total) == (count, 3, 5)
    assert state(pool) == before
    assert len(pool.allocate(3)) == 3


@pytest.mark.parametrize("given_back", [0, 1, 2, 3])
def test_who_keeps_blocks_is_asked_for_those_that_are_missing(given_back):
    """Once, with their number, and not while there are enough; too few or none, and the pool gives nothing out."""
    pool, asked = BlockPool(7), []
    pool.allocate(3)

    def reclaim(missing: int) -> None:
        asked.append(missing)
        pool.release(range(given_back))

    pool.reclaim = reclaim
    assert pool.allocate(4).tolist() == [3, 4, 5, 6]
    pool.release([5, 6])
    assert asked == []
    if given_back < 2:
        with pytest.raises(CacheFull) as info:
            pool.allocate(4)
        assert (info.value.needed, info.value.free) == (4, 2 + given_back)
        assert held(pool) == dict.fromkeys(range(given_back, 5), 1)
    else:
        assert set(pool.allocate(4).tolist()) <= {*range(given_back), 5, 6}
        assert pool.num_free == given_back - 2
    assert asked == [2]


def test_a_negative_number_of_blocks():
    pool = BlockPool(5)
    with pytest.raises(ValueError, match="-1"):
        pool.allocate(-1)
    assert state(pool) == ({}, 5, [4, 3, 2, 1, 0])


def test_shared_blocks_are_freed_by_the_last_holder():
    pool = BlockPool(3)
    ids = pool.allocate(2)
    pool.share(ids)
    pool.share(ids[:1])
    assert held(pool) == {0: 3, 1: 2}
    pool.release(ids)
    pool.release(ids)
    assert (held(pool), pool.num_free) == ({0: 1}, 2)
    pool.release(ids[:1])
    assert (held(pool), pool.num_free) == ({}, 3)


def test_one_block_named_several_times():
    pool = BlockPool(3)
    pool.allocate(1)
    pool.share([0, 0])
    assert held(pool) == {0: 3}
    pool.release([0, 0])
    assert (held(pool), pool.num_free) == ({0: 1}, 2)


@pytest.mark.parametrize(
    "ids, says",
    [
        ([2], "they are free"),
        ([0, 2], r"\[2\].*they are free"),
        ([-1], "ids run from 0 to 3"),
        ([0, 4], "ids run from 0 to 3"),
    ],
)
@pytest.mark.parametrize("what", ["share", "release"])
def test_blocks_that_nobody_holds(what, ids, says):
    pool = BlockPool(4)
    pool.allocate(2)
    before = state(pool)
    with pytest.raises(ValueError, match=f"cannot {what} blocks .*{says}"):
        getattr(pool, what)(ids)
    assert state(pool) == before


@pytest.mark.parametrize("ids", [[0, 0], [1, 0, 0], [1, 1, 1]])
def test_release_more_often_than_held(ids):
    pool = BlockPool(4)
    pool.allocate(2)
    pool.share([1])
    before = state(pool)
    with pytest.raises(ValueError, match=r"released more often than they are held"):
        pool.release(ids)
    assert state(pool) == before


@pytest.mark.parametrize("nothing", [[], (), np.zeros(0, np.int32), range(0)], ids=repr)
def test_nothing_to_share_or_release(nothing):
    pool = BlockPool(2)
    pool.allocate(1)
    before = state(pool)
    pool.share(nothing)
    pool.release(nothing)
    assert state(pool) == before


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 999)), max_size=60),
)
def test_conservation(blocks, acts):
    """Against a plain Counter: the same counts, and a free list that is exactly the blocks with none."""
    pool, shadow = BlockPool(blocks), Counter()
    for act, number in acts:
        if act == "allocate":
            count, free = number % 4, blocks - len(shadow)
            if count > free:
                with pytest.raises(CacheFull):
                    pool.allocate(count)
            else:
                ids = pool.allocate(count).tolist()
                assert not set(ids) & set(shadow)
                shadow.update(ids)
        elif shadow:
            ids = [sorted(shadow)[number % len(shadow)]] * (1 + number % 2)
            if act == "share":
                pool.share(ids)
                shadow.update(ids)
            elif len(ids) > shadow[ids[0]]:
                with pytest.raises(ValueError):
                    pool.release(ids)
            else:
                pool.release(ids)
                shadow = +(shadow - Counter(ids))
        assert held(pool) == dict(shadow)
        free = pool._free[: pool.num_free].tolist()
        assert sorted(free + list(shadow)) == list(range(blocks))
    assert sum(array.nbytes for array in pool.arrays()) == 8 * blocks
