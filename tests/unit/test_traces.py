"""Replaying recorded traffic: hit rates worked out by hand, and against a model of LRU that shares no code."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.prefix import HashChain, RadixTree
from kvlib.traces import HitStatistics, Prompt, read_mooncake, replay

BOTH = pytest.mark.parametrize("index_class", [HashChain, RadixTree])

# Blocks of 4 tokens, prompts of 9: two complete blocks and one token, whose hash (100 and up) is not reused.
TRACE = [
    Prompt([1, 2, 100], 9),
    Prompt([1, 3, 101], 9),
    Prompt([4, 5, 102], 9),
    Prompt([1, 2, 103], 9),
    Prompt([1, 3, 104], 9),
]


@BOTH
@pytest.mark.parametrize("capacity, hits, evicted", [(5, 5, 0), (4, 3, 3), (3, 3, 4), (2, 2, 6), (1, 2, 2)])
def test_by_hand(index_class, capacity, hits, evicted):
    """The blocks that lie there after each prompt, oldest tail first, with hits in brackets.

    | prompt | 5 blocks     | 4 blocks            | 3 blocks              | 2 blocks            | 1 block        |
    |--------|--------------|---------------------|-----------------------|---------------------|----------------|
    | 1 2    | 2 1          | 2 1                 | 2 1                   | 2 1                 | 1              |
    | 1 3    | 2 3 [1]      | 2 3 [1]             | 2 3 [1]               | 3 [1], 2 gone       | [1]            |
    | 4 5    | 2 3 1 5 4    | 3 1 5 4, 2 gone     | 1 5 4, 2 3 gone       | 5 4, 3 1 gone       | 4, 1 gone      |
    | 1 2    | 3 5 4 [2 1]  | 5 4 2 [1], 3 gone   | 4 2 [1], 5 gone       | 2 1, 5 4 gone       | 1, 4 gone      |
    | 1 3    | 5 4 2 [3 1]  | 4 2 3 [1], 5 gone   | 2 3 [1], 4 gone       | 3 [1], 2 gone       | [1]            |

    Hits 1+2+2, 1+1+1, 1+1+1, 1+1 and 1+1; gone 0, 3, 4, 6 and 2.
    """
    result = replay(TRACE, capacity, 4, index_class)
    assert result == HitStatistics(5, 45, 4 * hits, 10, hits, evicted)
    assert result.token_hit_rate == 4 * hits / 45
    assert result.block_hit_rate == hits / 10


@BOTH
def test_the_last_token_is_computed_here_too(index_class):
    """Eight tokens are two blocks, of which one can be found; the other is computed again, and published once."""
    result = replay([Prompt([1, 2], 8)] * 3, 3, 4, index_class)
    assert result == HitStatistics(3, 24, 8, 6, 2, 0)
    assert replay([Prompt([1, 2], 8)] * 3, 2, 4, index_class).evicted_blocks == 2  # for its copy 2 has to go each time


@BOTH
def test_a_trace_without_prompts(index_class):
    result = replay([], 3, 4, index_class)
    assert (result.token_hit_rate, result.block_hit_rate) == (0, 0)


@BOTH
def test_prompts_shorter_than_a_block(index_class):
    assert replay([Prompt([1], 3), Prompt([1], 3), Prompt([], 0)], 3, 4, index_class) == HitStatistics(3, 6, 0, 0, 0, 0)


@BOTH
def test_blocks_of_another_size(index_class):
    with pytest.raises(ValueError, match="9 tokens have 4 complete blocks of 2, got 3 keys"):
        replay(TRACE, 4, 2, index_class)


def naive(trace, capacity, size):
    """Hits and evictions with one list of hashes, the oldest first, a prompt's tail before its beginning."""
    order, hits, evicted = [], 0, 0
    for hashes, length in trace:
        wanted = list(hashes[: length // size])
        found = []
        for key in wanted[: (length - 1) // size]:
            if key not in order:
                break
            found.append(key)
        others = [key for key in order if key not in found]
        room = min(len(wanted), capacity) - len(found)
        while capacity - len(others) - len(found) < room:
            others.pop(0)
            evicted += 1
        kept = wanted[: len(found) + room]
        order = [key for key in others if key not in kept] + kept[::-1]
        hits += len(found)
    return hits, evicted


@BOTH
@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=5), st.integers(0, 3)), max_size=25), st.integers(1, 12))
def test_against_one_list(index_class, prompts, capacity):
    """Hashes are the paths themselves, so that they name whole prefixes, as recorded ones do."""
    trace = [
        Prompt([tuple(path[: end + 1]) for end in range(len(path))], max(0, 4 * len(path) - partial))
        for path, partial in prompts
    ]
    result = replay(trace, capacity, 4, index_class)
    assert (result.hit_blocks, result.evicted_blocks) == naive(trace, capacity, 4)
    assert result.hit_tokens == 4 * result.hit_blocks
    assert result.blocks == sum(length // 4 for _, length in trace)


def test_both_agree_on_a_longer_trace():
    """Conversations that come back with more, over a common beginning."""
    turns = [5, 2, 0, 3, 5, 1, 4, 2, 0, 1, 3, 4, 5, 5, 2]
    trace = []
    for turn in range(60):
        who, rounds = turns[turn % 15] + 6 * (turn // 30), 1 + turn // 15
        trace.append(
            Prompt([0, 1, *(1000 * (who + 1) + block for block in range(2 * rounds))], 4 * (2 + 2 * rounds) - 1)
        )
    rates = []
    for capacity in (4, 8, 16, 32, 64, 128):
        one, other = replay(trace, capacity, 4, HashChain), replay(trace, capacity, 4, RadixTree)
        assert one == other
        rates.append(one.token_hit_rate)
    assert rates == sorted(rates)
    assert rates[-1] > rates[0] > 0


def test_the_format_of_mooncake():
    lines = [
        json.dumps({"timestamp": 0, "input_length": 1030, "output_length": 7, "hash_ids": [5, 6, 7]}),
        "",
        json.dumps({"timestamp": 9, "input_length": 1100, "output_length": 1, "hash_ids": [5, 6, 8]}),
    ]
    trace = read_mooncake(lines)
    assert trace == [Prompt([5, 6, 7], 1030), Prompt([5, 6, 8], 1100)]
    assert replay(trace, 4, 512) == HitStatistics(2, 2130, 1024, 4, 2, 0)
