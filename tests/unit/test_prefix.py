"""HashChain and RadixTree: what is published, what is found, what goes first. Both must give every answer."""

import hashlib
import heapq
import struct
import subprocess
import sys

import numpy as np
import pytest

from kvlib.blocks import BlockPool, CacheFull
from kvlib.prefix import HashChain, RadixTree

BOTH = pytest.mark.parametrize("index_class", [HashChain, RadixTree])
A, B, C, D = ([n, n + 1, n + 2, n + 3] for n in (10, 20, 30, 40))  # blocks of four tokens


def build(index_class, blocks=8, size=4):
    pool = BlockPool(blocks)
    return pool, index_class(pool, size)


def serve(index, tokens, salt="", keep=False):
    """One request from admission to its end: what it matched, and its blocks."""
    found = index.match(tokens, salt)
    index.pool.share(found)
    own = found + index.pool.allocate(-(-len(tokens) // index.block_size) - len(found)).tolist()
    index.insert(tokens, own, len(tokens), salt)
    if not keep:
        index.pool.release(own)
    return found, own


def state(index):
    arrays = [index.pool.refs, index._published, index._above, index._below]
    sizes = [index.num_blocks, index.evictable, index.pool.num_free, len(index._queue)]
    return [array.tolist() for array in arrays], sizes


# -- the three ways in which a hit goes wrong --------------------------------------------------------------------------


@BOTH
def test_a_block_that_is_still_being_computed_is_not_found(index_class):
    pool, index = build(index_class)
    prompt = A + B + C
    blocks = pool.allocate(3)
    assert index.insert(prompt, blocks, computed=0) == ([], [], {})
    assert index.match(prompt) == []
    index.insert(prompt, blocks, computed=7)  # planned, allocated, and one token short of two blocks
    assert index.match(prompt) == blocks[:1].tolist()
    index.insert(prompt, blocks, computed=8)
    assert index.match(prompt) == blocks[:2].tolist()
    assert pool.refs[blocks].tolist() == [2, 2, 1]


@BOTH
def test_a_partial_block_is_not_found(index_class):
    pool, index = build(index_class)
    found, blocks = serve(index, A + B + [1, 2, 3], keep=True)
    assert (found, index.num_blocks, pool.refs[blocks].tolist()) == ([], 2, [2, 2, 1])
    assert index.match(A + B + [1, 2, 3, 4, 5]) == blocks[:2]
    assert index.match(A + B[:3]) == blocks[:1]  # nor a part of a complete one
    assert index.match(A[:3]) == []


@BOTH
@pytest.mark.parametrize(
    "length, hit", [(0, 0), (1, 0), (4, 0), (5, 1), (7, 1), (8, 1), (9, 2), (11, 2), (12, 2), (13, 3)]
)
def test_the_last_token_is_left_to_compute(index_class, length, hit):
    _, index = build(index_class)
    prompt = A + B + C + D
    _, blocks = serve(index, prompt)
    assert index.match(prompt[:length]) == blocks[:hit]


# -- keys --------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("salts", [("", "b"), ("a", "b"), ("a", "")])
def test_a_salt_separates_tenants(index_class, salts):
    one, other = salts
    _, index = build(index_class)
    _, blocks = serve(index, [*A, *B, 1], one)
    assert index.match([*A, *B, 1], other) == []
    _, others = serve(index, [*A, *B, 1], other)
    assert not set(blocks[:2]) & set(others[:2])
    assert index.num_blocks == 4
    assert index.match([*A, *B, 1], one) == blocks[:2]
    assert index.match([*A, *B, 1], other) == others[:2]


@BOTH
def test_a_prompt_of_many_blocks(index_class):
    _pool, index = build(index_class, blocks=1000, size=1)
    _, own = serve(index, range(700))
    assert index.match(range(700)) == own[:-1]
    assert index.match([*range(600), 0, 1]) == own[:600]
    assert index.evict(300) == 300
    assert index.match(range(700)) == own[:400]


@BOTH
def test_the_same_tokens_elsewhere_are_another_block(index_class):
    """Keys and values depend on everything before them."""
    _, index = build(index_class)
    _, blocks = serve(index, [*A, *B, *A, 1])
    assert len(set(blocks)) == 4
    assert index.match([*B, *A, 1]) == []
    assert index.match([*A, *A, 1]) == blocks[:1]
    assert index.match([*A, *B, *B, 1]) == blocks[:2]


def test_hashes_are_those_of_the_definition():
    _, index = build(HashChain, size=2)
    key = hashlib.sha256(b"tenant").digest()
    expected = []
    for pair in ((1, 2), (3, -4)):
        key = hashlib.sha256(key + struct.pack("<qq", *pair)).digest()
        expected.append(key)
    assert index.keys([1, 2, 3, -4, 5], "tenant") == expected
    assert index.keys(np.array([1, 2, 3, -4, 5], np.int32), "tenant") == expected


def test_hashes_are_the_same_in_another_process(root):
    code = (
        "from kvlib.blocks import BlockPool; from kvlib.prefix import HashChain\n"
        "print(*(key.hex() for key in HashChain(BlockPool(1), 2).keys([1, 2, 3, 4], 'tenant')))"
    )
    run = [sys.executable, "-c", code]
    env = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    done = subprocess.run(run, env=env, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [key.hex() for key in build(HashChain, size=2)[1].keys([1, 2, 3, 4], "tenant")]


@BOTH
def test_tokens_come_as_a_list_or_as_an_array(index_class):
    _, index = build(index_class)
    _, blocks = serve(index, np.array([*A, *B, 1], np.int32))
    assert index.match([*A, *B, 1]) == index.match(np.array([*A, *B, 1])) == blocks[:2]
    assert all(type(block) is int for block in index.match([*A, *B, 1]))


@BOTH
@pytest.mark.parametrize("tokens", [[1.0, 2.0], [[1, 2]], ["a"], [True, False]], ids=repr)
def test_tokens_are_flat_integers(index_class, tokens):
    _, index = build(index_class, size=1)
    with pytest.raises(TypeError, match="flat list of integers"):
        index.match(tokens)


@BOTH
@pytest.mark.parametrize("salt", [None, 3, b"a"])
def test_a_salt_is_a_string(index_class, salt):
    _, index = build(index_class)
    with pytest.raises(TypeError, match="salt must be a string"):
        index.match(A, salt)


# -- insert ------------------------------------------------------------------------------------------------------------


@BOTH
def test_two_that_compute_the_same_prefix_at_once(index_class):
    """The block that is published first wins; the other learns its name, and may give its own back."""
    pool, index = build(index_class)
    first, second = pool.allocate(2), pool.allocate(3)
    index.insert(A + B, first, 8)
    done = index.insert(A + B + C, second, 12)
    assert done.blocks == [*first.tolist(), int(second[2])]
    assert done.new == second[2:].tolist()
    assert done.duplicates == dict(zip(second[:2].tolist(), first.tolist(), strict=True))
    assert pool.refs[second].tolist() == [1, 1, 2]
    pool.share(list(done.duplicates.values()))  # the table now reads done.blocks
    pool.release(list(done.duplicates))
    pool.release(first)
    assert pool.num_free == 5
    assert pool.refs[done.blocks].tolist() == [2, 2, 2]
    assert index.match([*A, *B, *C, 1]) == done.blocks
    assert index.insert(A + B + C, done.blocks, 12) == (done.blocks, [], {})


@BOTH
def test_bad_inserts_change_nothing(index_class):
    pool, index = build(index_class)
    _, blocks = serve(index, A + B, keep=True)
    mine = pool.allocate(2).tolist()
    before = state(index)
    for tokens, given, computed, says in [
        (A + C, mine, 9, "from 0 to the 8 tokens"),
        (A + C, mine, -1, "from 0 to the 8 tokens"),
        (A + C, mine[:1], 8, r"2 complete blocks of 4, got 2 keys and 1 blocks"),
        (A + C, [mine[0], 7], 8, "they are free"),
        (A + C, [7, mine[0]], 8, "they are free"),
        (A + C, [mine[0], -1], 8, "ids run from 0 to 7"),
        (A + C, [mine[0], mine[0]], 8, "named twice"),
        (C + D, [mine[0], mine[0]], 8, "named twice"),
        (A + C, [blocks[0], blocks[1]], 8, rf"published for other tokens: \[{blocks[1]}\]"),
        (A + C, [blocks[1], mine[0]], 8, rf"published for other tokens: \[{blocks[1]}\]"),
        (C + D, [mine[0], blocks[0]], 8, rf"published for other tokens: \[{blocks[0]}\]"),
    ]:
        with pytest.raises(ValueError, match=says):
            index.insert(tokens, given, computed)
        assert state(index) == before
    for keys, given, computed in [([1], mine, 8), ([1], mine, -1), ([1, 2], mine[:1], 8)]:
        with pytest.raises(ValueError, match=rf"got {len(keys)} keys and {len(given)} blocks"):
            index.insert_keys(keys, given, computed)
        assert state(index) == before
    assert index.match([*A, *C, 1]) == blocks[:1]
    assert index.match([*C, *D, 1]) == []


@BOTH
def test_a_pool_has_one_index(index_class):
    pool, _ = build(index_class)
    with pytest.raises(ValueError, match="has a prefix index already"):
        index_class(pool, 4)


@BOTH
@pytest.mark.parametrize("size", [0, -1])
def test_a_block_has_tokens(index_class, size):
    with pytest.raises(ValueError, match=f"at least 1, got {size}"):
        index_class(BlockPool(3), size)


@BOTH
def test_repr(index_class):
    _, index = build(index_class)
    serve(index, A + B)
    assert repr(index) == f"{index_class.__name__}(2 blocks of 4 tokens, 2 evictable)"


# -- eviction ----------------------------------------------------------------------------------------------------------


@BOTH
def test_tails_go_first_the_oldest_first(index_class):
    """Two that share A: A-B-C, then A-D. Of the first, C and B go; then D; A, which both need, is last."""
    pool, index = build(index_class)
    _, (a, b, c) = serve(index, A + B + C)
    _, (_, d) = serve(index, A + D)
    for gone in (c, b, d, a):
        assert pool.refs[gone] == 1
        assert index.evict(1) == 1
        assert pool.refs[gone] == 0
    assert index.evict(1) == 0
    assert (index.num_blocks, pool.num_free) == (0, 8)


@BOTH
def test_a_match_makes_a_prefix_recent(index_class):
    _, index = build(index_class)
    serve(index, A + B)
    _, (c, d) = serve(index, C + D)
    index.match([*A, *B, 1])
    assert index.evict(2) == 2
    assert index.pool.refs[[c, d]].tolist() == [0, 0]
    assert len(index.match([*A, *B, 1])) == 2


@BOTH
@pytest.mark.parametrize("salt", ["", "tenant"])
def test_a_peek_finds_what_a_match_finds_and_changes_nothing(index_class, salt):
    _, index = build(index_class)
    serve(index, A + B, salt)
    serve(index, C + D, salt)
    before = state(index), index._used.tolist()
    peeked = [index.peek(tokens, salt) for tokens in ([], A, A + B, [*A, *B, 1], A + D, D)]
    assert (state(index), index._used.tolist()) == before
    assert peeked == [index.match(tokens, salt) for tokens in ([], A, A + B, [*A, *B, 1], A + D, D)]
    assert index.peek([*A, *B, 1], "another") == []
    assert [len(found) for found in peeked] == [0, 0, 1, 2, 1, 0]


@BOTH
def test_a_peek_leaves_the_oldest_the_oldest(index_class):
    _, index = build(index_class)
    _, (a, b) = serve(index, A + B)
    serve(index, C + D)
    assert index.peek([*A, *B, 1]) == [a, b]
    index.evict(2)
    assert index.pool.refs[[a, b]].tolist() == [0, 0]


@BOTH
def test_a_match_does_not_make_the_rest_recent(index_class):
    """A-B and then C-D; a prompt that begins with A alone leaves B the oldest."""
    _, index = build(index_class)
    _, (a, b) = serve(index, A + B)
    _, (c, d) = serve(index, C + D)
    assert index.match(A + D) == [a]
    for gone in (b, d, c, a):
        index.evict(1)
        assert index.pool.refs[gone] == 0


@BOTH
def test_what_is_held_stays_with_all_above_it(index_class):
    pool, index = build(index_class)
    _, (a, b, c) = serve(index, A + B + C)
    pool.share([b])  # a lock: whoever it is, it needs no more than a reference
    assert (index.num_blocks, index.evictable, index.protected) == (3, 1, 2)
    assert index.evict(3) == 1
    assert pool.refs[[a, b, c]].tolist() == [1, 2, 0]
    pool.release([b])
    assert (index.evictable, index.evict(3), pool.num_free) == (2, 2, 8)


@BOTH
def test_blocks_that_are_not_published_do_not_count(index_class):
    pool, index = build(index_class)
    serve(index, A + B)
    fork = pool.allocate(2)
    pool.share(fork)
    assert (index.num_blocks, index.evictable, index.protected) == (2, 2, 0)


@BOTH
@pytest.mark.parametrize("count", [0, -1])
def test_nothing_to_evict(index_class, count):
    _, index = build(index_class)
    serve(index, A + B)
    before = state(index)
    if count < 0:
        with pytest.raises(ValueError, match="cannot evict -1 blocks"):
            index.evict(count)
    else:
        assert index.evict(count) == 0
    assert state(index) == before


@BOTH
def test_the_queue_does_not_grow_with_use(index_class):
    _, index = build(index_class)
    serve(index, A + B)
    for _ in range(100):
        serve(index, [*A, *B, 1])
        index.match([*A, *B, 1])
    assert len(index._queue) == 1


@BOTH
def test_eviction_looks_at_leaves_not_at_blocks(index_class, monkeypatch):
    """A held sequence of a hundred blocks costs one look, and so does each block that goes."""
    looks = []
    _, index = build(index_class, blocks=300, size=1)
    serve(index, list(range(100)), keep=True)
    serve(index, list(range(100, 300)))
    pop = heapq.heappop
    monkeypatch.setattr("heapq.heappop", lambda heap: looks.append(heap) or pop(heap))
    assert index.evict(50) == 50
    assert len(looks) <= 53


# -- the pool asks -----------------------------------------------------------------------------------------------------


def test_the_pool_asks_for_what_is_missing_and_only_then():
    pool, asked = BlockPool(5), []
    pool.reclaim = asked.append
    pool.allocate(2)
    pool.allocate(3)
    assert asked == []
    with pytest.raises(CacheFull):
        pool.allocate(2)
    pool.release([0])
    with pytest.raises(CacheFull):
        pool.allocate(3)
    assert asked == [2, 2]


@BOTH
def test_the_pool_takes_back_what_it_needs(index_class):
    pool, index = build(index_class, blocks=5)
    _, (a, b, c) = serve(index, A + B + C)
    assert pool.num_free == 2
    assert pool.allocate(2).tolist() == [3, 4]
    assert index.num_blocks == 3  # enough were free
    assert pool.allocate(1).tolist() == [c]
    assert (index.num_blocks, pool.num_free) == (2, 0)
    assert index.match([*A, *B, *C, 1]) == [a, b]
    assert sorted(pool.allocate(2).tolist()) == sorted([a, b])
    assert index.num_blocks == index.evictable == 0


@BOTH
def test_a_full_pool_loses_nothing(index_class):
    """Two free, three evictable, one protected: five can be had, six cannot, and then the three stay."""
    pool, index = build(index_class, blocks=6)
    _, (a, *_) = serve(index, A + B + C + D)
    pool.share([a])
    before = state(index)
    with pytest.raises(CacheFull, match="needs 6 more blocks, and 2 of 6 are free") as info:
        pool.allocate(6)
    assert (info.value.needed, info.value.free) == (6, 2)
    assert state(index) == before
    assert len(index.match([*A, *B, *C, *D, 1])) == 4
    assert len(pool.allocate(5)) == 5
    assert index.num_blocks == index.protected == 1


@BOTH
def test_a_reused_block_has_lost_its_key(index_class):
    pool, index = build(index_class, blocks=2)
    _, (a, b) = serve(index, A + B)
    assert sorted(pool.allocate(2).tolist()) == sorted([a, b])
    assert index.num_blocks == 0
    assert index.match([*A, *B, 1]) == []
    pool.release([a, b])
    _, again = serve(index, C + D)
    assert sorted(again) == sorted([a, b])
    assert index.match([*A, *B, 1]) == []
    assert index.match([*C, *D, 1]) == again


# -- what each has of its own ------------------------------------------------------------------------------------------


def test_a_radix_tree_splits_where_prompts_part_and_joins_again():
    _, index = build(RadixTree, size=1)
    serve(index, [1, 2, 3, 4])
    (first, *rest), *tail = [("", (1,)), (2,), (3,)], (4,)
    assert index.runs() == [([first, *rest, *tail], [])]
    serve(index, [1, 2, 5])
    assert index.runs() == [([first, (2,)], [([(3,), (4,)], []), ([(5,)], [])])]
    assert index.num_blocks == 5
    index.evict(2)  # 4 and 3
    assert index.runs() == [([first, (2,), (5,)], [])]
    index.evict(2)
    serve(index, [1, 6])
    assert index.runs() == [([first, (6,)], [])]
    serve(index, [7])
    assert index.runs() == [([first, (6,)], []), ([("", (7,))], [])]


def test_keys_of_a_hash_chain_name_whole_prefixes():
    """With numbers that name a block's own content, a hit could stand behind the wrong prefix: say so instead."""
    pool, index = build(HashChain)
    ids = pool.allocate(4).tolist()
    index.insert_keys([1, 2], ids[:2], 8)
    before = state(index)
    for keys in ([3, 2], [2, 1], [2], [1, 2, 1], [5, 5]):
        with pytest.raises(ValueError, match="behind two different prefixes"):
            index.insert_keys(keys, ids[2:] + ids[:1], 4 * len(keys))
        with pytest.raises(ValueError, match="behind two different prefixes"):
            index.match_keys(keys, 4 * len(keys) + 1)
        assert state(index) == before
    assert index.match_keys([1, 2], 9) == ids[:2]


def test_keys_of_a_radix_tree_may_repeat():
    pool, index = build(RadixTree)
    ids = pool.allocate(5).tolist()
    index.insert_keys([1, 2], ids[:2], 8)
    index.insert_keys([2, 2, 1], ids[2:], 12)
    assert index.match_keys([2, 2], 9) == ids[2:4]
    assert index.match_keys([1, 2, 1, 2], 17) == ids[:2]


@BOTH
@pytest.mark.parametrize("count, length", [(1, 8), (3, 8), (1, 9), (4, 9), (2, 3), (0, 4)])
def test_keys_must_fit_the_length(index_class, count, length):
    _, index = build(index_class)
    with pytest.raises(ValueError, match=f"{length} tokens have {length // 4} complete blocks of 4, got {count} keys"):
        index.match_keys(list(range(count)), length)


@BOTH
def test_keys_may_name_the_partial_block_or_not(index_class):
    pool, index = build(index_class)
    ids = pool.allocate(2).tolist()
    index.insert_keys([7, 8], ids, 8)
    for length, keys, hit in [(8, [7, 8], 1), (9, [7, 8], 2), (9, [7, 8, 9], 2), (11, [7, 8, 9], 2), (3, [7], 0)]:
        assert index.match_keys(keys, length) == ids[:hit]
