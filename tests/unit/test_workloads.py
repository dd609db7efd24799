"""Workloads have the distribution that they state, and are the same everywhere."""

import math

import numpy as np
import pytest

from kvlib.workloads import ALPACA, SHAREGPT, Lengths, Traffic, conversations, requests

FIRST = [(120, 130), (6, 502), (109, 391), (483, 507), (283, 43)]


def test_the_first_requests_are_these():
    """Recorded: a change here moves the figures of every chapter that serves this traffic."""
    assert [(r.prompt, r.output) for r in requests(SHAREGPT, 5, seed=0)] == FIRST


def test_the_first_requests_do_not_depend_on_how_many_follow():
    assert requests(ALPACA, 50, seed=3)[:20] == requests(ALPACA, 20, seed=3)
    assert requests(ALPACA, 20, seed=3) != requests(ALPACA, 20, seed=4)


@pytest.mark.parametrize("side", ["prompt", "output"])
def test_lengths_are_log_normal_with_the_stated_mean_and_sigma(side):
    traffic = Traffic(Lengths(161.31, 1.2), Lengths(337.99, 0.9), limit=10**9)
    drawn = np.array([getattr(r, side) for r in requests(traffic, 40_000)], float)
    mean, sigma = getattr(traffic, side)
    error = sigma_of_mean(mean, sigma, len(drawn))
    assert abs(drawn.mean() - mean) < 4 * error
    assert abs(np.log(drawn).std() - sigma) < 0.02


def sigma_of_mean(mean: float, sigma: float, count: int) -> float:
    return mean * math.sqrt((math.exp(sigma**2) - 1) / count)


def test_arrivals_are_a_poisson_process():
    gaps = np.diff([r.arrival for r in requests(Traffic(Lengths(9, 1), Lengths(9, 1), rate=5.0), 20_000)])
    assert (gaps >= 0).all()
    assert abs(gaps.mean() - 0.2) < 4 * 0.2 / math.sqrt(len(gaps))
    assert abs(gaps.std() / gaps.mean() - 1) < 0.05  # exponential: as wide as its mean


def test_no_request_exceeds_the_limit_or_is_empty():
    traffic = Traffic(Lengths(100, 2), Lengths(100, 2), limit=64)
    drawn = requests(traffic, 2_000)
    assert max(r.total for r in drawn) == 64
    assert min(min(r.prompt, r.output) for r in drawn) == 1


def test_equal_lengths_are_possible():
    assert {(r.prompt, r.output) for r in requests(Traffic(Lengths(32, 0), Lengths(8, 0)), 10)} == {(32, 8)}


def test_each_turn_sends_the_whole_conversation_again():
    turns = conversations(4, 3, system=10, seed=1)
    assert [t.conversation for t in turns] != sorted(t.conversation for t in turns)  # they interleave
    history = {}
    for chat, prompt, answer in turns:
        before = history.get(chat, turns[0].prompt[:10])
        assert prompt[: len(before)] == before and len(prompt) > len(before) and answer
        history[chat] = prompt + answer
    assert sorted(history) == [0, 1, 2, 3] and len(turns) == 12


def test_conversations_share_the_system_prompt_and_nothing_else():
    first = {}
    for chat, prompt, _ in conversations(6, 1, system=20, vocab=10**6):
        first[chat] = prompt
    assert len({tuple(p[:20]) for p in first.values()}) == 1
    assert len({p[20] for p in first.values()}) == 6
