"""Partial attention: tiles merge into the whole, in any order, any grouping, and however they are cut."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.attention import Partial, attend_tile, causal_bias, dense, fold, mass, merge, with_sinks
from tests.conformance import reference
from tests.conformance.bounds import ARITHMETIC

BACKENDS = {"numpy": np.asarray, "torch": torch.tensor}


@pytest.fixture(params=list(BACKENDS))
def array(request):
    """A function from NumPy arrays to arrays of one backend."""
    return BACKENDS[request.param]


def host(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def close(out, expected, slack: float = 0.0) -> None:
    out, expected = host(out), host(expected)
    assert out.shape == expected.shape
    assert np.isfinite(expected).all()
    bound = ARITHMETIC["float64"] * max(1.0, np.abs(expected).max(initial=0)) + slack
    assert np.abs(out - expected).max(initial=0) <= bound


def by_hand(q, k, v, visible) -> Partial:
    """The definition, row by row: q (R, D), k (S, D), v (S, Dv), visible (R, S)."""
    m, l, o = [], [], []  # noqa: E741
    for row, sees in zip(q, visible, strict=True):
        scores = k[sees] @ row
        m.append(scores.max(initial=-math.inf))
        weights = np.exp(scores - m[-1])
        l.append(weights.sum())
        o.append(weights @ v[sees])
    return Partial(np.array(m)[:, None], np.array(l)[:, None], np.array(o))


def rounding(q, k, v) -> float:
    """How far l and o may be apart when the scores q k are added up in another order, for scores may be large.

    A dot product of D numbers is off by at most (D + 2) u sum |q| |k|, twice that for a score less the maximum, and
    each of the weights by a factor of the exponential of it.
    """
    score = (q.shape[-1] + 2) * reference.UNIT_ROUNDOFF["float64"] * (np.abs(q) @ np.abs(k).T).max()
    return float(np.expm1(4 * score) * len(k) * max(1.0, np.abs(v).max()))


def same(a: Partial, b: Partial, slack: float = 0.0) -> None:
    """The same attention so far; m itself must agree too, -inf where nothing was seen."""
    nothing = np.isneginf(host(a.m))
    assert np.array_equal(nothing, np.isneginf(host(b.m)))
    for x, y in zip(a, b, strict=True):
        close(np.where(nothing, 0, host(x)), np.where(nothing, 0, host(y)), slack)
    for part in (a, b):
        assert np.all(host(part.l)[nothing] == 0)
        assert np.all(host(part.o)[nothing[..., 0]] == 0)


@st.composite
def tiles(draw):
    """Rows, and up to five tiles of one to four keys, each with a mask that may hide everything from a
    row.
    """
    rows, rng = draw(st.integers(1, 3)), np.random.default_rng(draw(st.integers(0, 99)))
    q = rng.standard_normal((rows, 4)) * draw(st.sampled_from([1, 30]))  # scores of ±100: some weights vanish
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    k, v = rng.standard_normal((sum(sizes), 4)), rng.standard_normal((sum(sizes), 3))
    visible = np.array(draw(st.lists(st.booleans(), min_size=rows * sum(sizes), max_size=rows * sum(sizes))))
    return q, k, v, visible.reshape(rows, sum(sizes)), np.cumsum([0, *sizes])


def partials(array, q, k, v, visible, edges) -> list[Partial]:
    bias = np.where(visible, 0.0, -math.inf)
    return [
        attend_tile(array(q), array(k[lo:hi]), array(v[lo:hi]), array(bias[:, lo:hi]))
        for lo, hi in itertools.pairwise(edges.tolist())
    ]


@pytest.mark.parametrize("backend", list(BACKENDS))
@given(tiles(), st.randoms(use_true_random=False))
def test_tiles_merge_in_any_order_and_grouping(backend, case, random):
    q, k, v, visible, _ = case
    with np.errstate(all="raise", under="ignore"):  # no NaN on the way either
        parts = partials(BACKENDS[backend], *case)
        random.shuffle(parts)
        while len(parts) > 1:  # merge two of them at random, in either order
            a, b = (parts.pop(random.randrange(len(parts))) for _ in range(2))
            parts.append(merge(a, b))
    same(parts[0], by_hand(q, k, v, visible), rounding(q, k, v))


@pytest.mark.parametrize("backend", list(BACKENDS))
@given(tiles())
def test_merge_is_commutative_associative_and_has_a_neutral_element(backend, case):
    parts = partials(BACKENDS[backend], *case)
    a, b, c = (parts * 3)[:3]
    q, k, v, visible, edges = case
    same(merge(a, b), merge(b, a))
    same(merge(merge(a, b), c), merge(a, merge(b, c)), rounding(q, k, v))
    nothing = partials(BACKENDS[backend], q, k, v, np.zeros_like(visible), edges)[0]
    same(merge(a, nothing), a)
    same(merge(nothing, a), a)
    same(merge(nothing, nothing), nothing)


def test_a_partial_is_what_its_definition_says(array):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((6, 8)), rng.standard_normal((11, 8)), rng.standard_normal((11, 5))
    part = attend_tile(array(q), array(k), array(v))
    expected = by_hand(q, k, v, np.ones((6, 11), bool))
    same(part, expected)
    close(part.normalise(), expected.o / expected.l)


def test_a_row_that_has_seen_nothing_gives_zeros(array):
    q, k, v, bias = np.ones((2, 8)), np.ones((3, 8)), np.ones((3, 5)), np.full((2, 3), -math.inf)
    nothing = attend_tile(array(q), array(k), array(v), array(bias))
    with np.errstate(all="raise"):
        assert host(nothing.normalise()).tolist() == np.zeros((2, 5)).tolist()


def test_a_mask_repeats_over_the_heads_of_a_group(array):
    """R = 3 heads x 2 positions, and a bias for 2 positions."""
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((4, 6, 8)), rng.standard_normal((4, 7, 8)), rng.standard_normal((4, 7, 5))
    visible = np.arange(7)[None, :] <= np.array([4, 5])[:, None]
    part = attend_tile(array(q), array(k), array(v), array(np.where(visible, 0.0, -math.inf)))
    for head in range(4):
        expected = by_hand(q[head], k[head], v[head], np.tile(visible, (3, 1)))
        same(Partial(*(x[head] for x in part)), expected)


def test_inputs_are_left_alone(array):
    rng = np.random.default_rng(2)
    arrays = [array(rng.standard_normal(shape)) for shape in ((2, 4, 8), (2, 9, 8), (2, 9, 8), (4, 9))]
    before = [host(x).copy() for x in arrays]
    attend_tile(*arrays)
    attend_tile(*arrays, strip=4)
    a, b = attend_tile(*arrays[:3]), attend_tile(*arrays)
    parts = [host(x).copy() for x in (*a, *b)]
    merge(a, b).normalise()
    dense(arrays[0][:, :2], arrays[1], arrays[2])
    for x, y in zip([*arrays, *a, *b], before + parts, strict=True):
        assert np.array_equal(host(x), y)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("strip", [1, 2, 64, 256])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_strips_are_a_tile(array, keys, strip, lead):
    rng = np.random.default_rng(keys)
    q, k, v = (array(rng.standard_normal((*lead, n, w))) for n, w in ((6, 8), (keys, 8), (keys, 5)))
    bias = array(np.where(rng.random((2, keys)) < 0.5, 0.0, -math.inf))
    same(attend_tile(q, k, v, strip=strip), attend_tile(q, k, v))
    same(attend_tile(q, k, v, bias, strip), attend_tile(q, k, v, bias))


def test_a_mask_of_each_head(array):
    """bias (heads, T, S): every head hides its own keys from each of two positions."""
    rng = np.random.default_rng(7)
    q, k, v = rng.standard_normal((4, 6, 8)), rng.standard_normal((4, 7, 8)), rng.standard_normal((4, 7, 5))
    visible = rng.random((4, 2, 7)) < 0.6
    part = attend_tile(array(q), array(k), array(v), array(np.where(visible, 0.0, -math.inf)))
    for head in range(4):
        expected = by_hand(q[head], k[head], v[head], np.tile(visible[head], (3, 1)))
        same(Partial(*(x[head] for x in part)), expected)


def test_mass_is_the_weights_added_up_over_rows(array):
    """Of each tile, from its scores and the partial of all; a row that saw nothing adds nothing."""
    rng = np.random.default_rng(8)
    q, k, v = rng.standard_normal((2, 3, 8)) * 3, rng.standard_normal((2, 9, 8)), rng.standard_normal((2, 9, 5))
    scores = torch.tensor(q @ k.swapaxes(-1, -2))
    expected = host(torch.softmax(scores, dim=-1)).sum(axis=1)
    whole = attend_tile(array(q), array(k), array(v))
    for tile in (slice(0, 4), slice(4, 9)):
        close(mass(array(host(scores)[..., tile].copy()), whole), expected[:, tile], slack=1e-14)
    hidden = np.array([0.0, -math.inf, 0.0])[:, None]
    whole = attend_tile(array(q), array(k), array(v), array(hidden + np.zeros((3, 9))))
    whole = Partial(whole.m, whole.l + array(1.0 * np.isinf(hidden)), whole.o)  # as a sink would: no 0 / 0
    rows = host(torch.softmax(scores, dim=-1))[:, [0, 2]].sum(axis=1)
    close(mass(array(host(scores) + hidden), whole), rows, slack=1e-14)


def test_a_sink_is_one_more_key_of_value_zero(array):
    """Rows (kv head, query head of the group x position): each query head has a sink of its own."""
    rng = np.random.default_rng(9)
    q, k, v = rng.standard_normal((2, 6, 8)), rng.standard_normal((2, 9, 8)), rng.standard_normal((2, 9, 5))
    sinks = np.array([[3.0, -40.0, 0.5], [60.0, 1.0, -2.0]])  # above every score, below, and between
    part = with_sinks(attend_tile(array(q), array(k), array(v)), array(sinks))
    scores = np.concatenate([q @ k.swapaxes(-1, -2), np.repeat(sinks, 2, axis=1)[..., None]], axis=-1)
    weights = host(torch.softmax(torch.tensor(scores), dim=-1))
    close(part.normalise(), weights[..., :9] @ v)
    close(part.m, scores.max(axis=-1, keepdims=True))


@pytest.mark.parametrize("cuts", [[], [1], [20], [7, 8], [1, 2, 3, 20], list(range(1, 21))])
@pytest.mark.parametrize("tokens", [1, 5, 21])
def test_fold_is_attention(array, cuts, tokens):
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((2, n, 8)) for n in (tokens, 21, 21))
    positions = array(np.arange(21))
    parts = (
        attend_tile(
            array(q / math.sqrt(8)),
            array(k[:, lo:hi]),
            array(v[:, lo:hi]),
            causal_bias(positions[21 - tokens :], positions[lo:hi], "float64"),
        )
        for lo, hi in itertools.pairwise([0, *cuts, 21])
    )
    close(fold(parts).normalise(), reference.attention(q, k, v))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_causal_bias(array, dtype):
    bias = causal_bias(array(np.array([3, 7, 0])), array(np.array([0, 3, 4, 7, 8])), dtype)
    assert str(bias.dtype).removeprefix("torch.") == dtype
    hidden = -math.inf
    assert bias.tolist() == [[0, 0, hidden, hidden, hidden], [0, 0, 0, 0, hidden], [0] + [hidden] * 4]


# -- the dense reference of the library, against ours and torch's ----------------------------------


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("tokens", [1, 6, 30])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_dense(array, heads, kv_heads, tokens, scale):
    rng = np.random.default_rng(5)
    q, k, v = (
        rng.standard_normal((2, h, n, w))
        for h, n, w in ((heads, tokens, 16), (kv_heads, 30, 16), (kv_heads, 30, 12))
    )
    out = dense(array(q), array(k), array(v), scale)
    unmasked = dense(array(q), array(k), array(v), scale, causal=False)
    for sequence in range(2):
        close(out[sequence], reference.attention(q[sequence], k[sequence], v[sequence], scale))
        everything = np.ones((tokens, 30), bool)
        close(
            unmasked[sequence], reference.attention(q[sequence], k[sequence], v[sequence], scale, everything)
        )


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("tokens", [1, 6, 30])
def test_dense_and_the_reference_agree_with_torch(heads, kv_heads, tokens):
    """torch's scaled_dot_product_attention, in float64; its mask is written out, for is_causal aligns the
    other way.
    """
    rng = np.random.default_rng(6)
    q, k, v = (
        rng.standard_normal((2, h, n, 16)) for h, n in ((heads, tokens), (kv_heads, 30), (kv_heads, 30))
    )
    mask = torch.ones(tokens, 30, dtype=torch.bool).tril(30 - tokens)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.tensor, (q, k, v)), attn_mask=mask, enable_gqa=True
    )
    close(dense(*map(torch.tensor, (q, k, v))), theirs)
    close(dense(q, k, v), theirs)
    for sequence in range(2):
        close(reference.attention(q[sequence], k[sequence], v[sequence]), theirs[sequence])


def test_dense_keeps_the_dtype(array):
    x = array(np.ones((1, 2, 3, 4), np.float32))
    assert dense(x, x, x).dtype == x.dtype


@pytest.mark.parametrize("tokens", [1, 6, 30])
@pytest.mark.parametrize("window", [1, 2, 7, 29, 30, 31])
def test_dense_with_a_window(array, tokens, window):
    """A query sees its own key and the window - 1 before it: a band below the diagonal."""
    rng = np.random.default_rng(10)
    q, k, v = (rng.standard_normal((h, n, 16)) for h, n in ((4, tokens), (2, 30), (2, 30)))
    band = np.tril(np.ones((30, 30), bool)) & ~np.tril(np.ones((30, 30), bool), -window)
    expected = reference.attention(q, k, v, visible=band[30 - tokens :])
    close(dense(array(q), array(k), array(v), window=window), expected)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("window", [None, 3])
def test_dense_with_sinks(array, tokens, window):
    """One more column in the softmax of each query head, which is then dropped, as gpt-oss has it; torch's softmax."""
    rng = np.random.default_rng(11)
    q, k, v = (rng.standard_normal((2, h, n, 16)) for h, n in ((4, tokens), (2, 9), (2, 9)))
    sinks = np.array([0.0, 30.0, -30.0, 1.0])
    band = np.tril(np.ones((9, 9), bool)) & ~np.tril(np.ones((9, 9), bool), -(window or 9))
    scores = np.where(band[9 - tokens :], q @ k.repeat(2, axis=1).swapaxes(-1, -2) / 4, -math.inf)
    column = np.broadcast_to(sinks[None, :, None, None], (2, 4, tokens, 1))
    weights = host(torch.softmax(torch.tensor(np.concatenate([scores, column], axis=-1)), dim=-1))
    out = dense(array(q), array(k), array(v), window=window, sinks=array(sinks))
    close(out, weights[..., :9] @ v.repeat(2, axis=1))
