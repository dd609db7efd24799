"""What a query sees, against the rules spelt out; and attention over tiles so small that all kinds of them come up."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib import tiling
from kvlib.eviction import SlidingWindow
from kvlib.tiling import Sight
from tests.conformance import reference


def sees(query: int, key: int, rules: tuple[tuple[int, int], ...]) -> bool:
    return 0 <= key <= query and all(query - key < window or key < sinks for window, sinks in rules)


@st.composite
def sights(draw, max_sinks: int = 4, max_rules: int = 2) -> Sight:
    length = draw(st.integers(1, 14))
    rules = draw(st.lists(st.tuples(st.integers(1, 16), st.integers(0, max_sinks)), max_size=max_rules))
    return Sight(length, draw(st.integers(1, length)), tuple(rules))


def table(sight: Sight, positions: list[int]) -> list[list[bool]]:
    queries = range(sight.length - sight.tokens, sight.length)
    return [[sees(query, key, sight.rules) for key in positions] for query in queries]


@given(sights(), st.permutations(range(-1, 16)))
def test_visible_is_what_the_rules_say(sight, positions):
    assert sight.visible(np.array(positions)).tolist() == table(sight, positions)
    twice = np.array([positions, positions[::-1]])
    assert sight.visible(twice).tolist() == [table(sight, row) for row in twice.tolist()]


@given(sights(), st.integers(0, 13), st.integers(1, 14))
def test_a_tile_that_all_see_hides_nothing(sight, lo, size):
    if sight.all_of(lo, lo + size):
        assert np.all(table(sight, range(lo, lo + size)))


@given(sights(max_sinks=0), st.integers(0, 13), st.integers(1, 14))
def test_without_sinks_a_tile_that_hides_nothing_is_one_that_all_see(sight, lo, size):
    assert sight.all_of(lo, lo + size) == np.all(table(sight, range(lo, lo + size)))


@given(sights())
def test_nothing_is_seen_before_the_start(sight):
    assert not np.any(table(sight, range(sight.start())))


@given(sights(max_rules=1))
def test_the_start_is_seen(sight):
    assert np.any(table(sight, [sight.start()]))


# -- attention -------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 7, 16])
def tile(request, monkeypatch) -> int:
    """Tiles of about as many tokens, where the blocks allow it."""
    monkeypatch.setattr(tiling, "TILE_SCORES", 1)
    monkeypatch.setattr(tiling, "TILE_BYTES", request.param * 4 * 2 * 8)
    return request.param


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("settings", [{"block_size": 4}, {"block_size": 24}, {}], ids=str)
@pytest.mark.parametrize("window, sinks", [(None, 0), (1, 0), (20, 0), (33, 3)])
def test_small_tiles(tile, backend, settings, window, sinks):
    """80 tokens, asked for their last 1, 3 and 40; the window is asked for, or is the policy's if it has sinks."""
    rng = np.random.default_rng(tile)
    k, v, q = (reference.rounded(rng.standard_normal((h, 80, 8)), "float16") for h in (2, 2, 4))
    array = torch.from_numpy if backend == "torch" else np.asarray
    cache = kvlib.KVCache(
        kvlib.CacheSpec(2, 8, dtype="float16"),
        max_tokens=80,
        backend=backend,
        eviction=SlidingWindow(window, sinks) if sinks else None,
        **settings,
    )
    cache.append(array(k[None]), array(v[None]))
    for tokens in (1, 3, 40):
        out = np.asarray(cache.attend(array(q[None, :, -tokens:]), window=None if sinks else window))
        rules = () if window is None else ((window, sinks),)
        visible = np.array(table(Sight(80, tokens, rules), range(80)))
        expected = reference.attention(q[:, -tokens:], k, v, visible=visible)
        np.testing.assert_allclose(out[0], expected, rtol=0, atol=1e-12)
