"""Attempts to break a cache from outside that succeeded: each test fails on the code as it was before."""

import numpy as np
import pytest
import torch

from kvlib import KIVI, MXFP4, CacheSpec, Float8, HeavyHitter, Int, KVCache, Rotated, SlidingWindow, SnapKV, Split
from kvlib.codecs import Codec, Plane
from kvlib.eviction import Policy
from kvlib.groups import GroupedCache
from kvlib.tail import Tail
from tests.conformance import reference
from tests.conformance.graph import snapshot

SPEC = CacheSpec(2, 16, dtype="float32")


def gaussian(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def filled(tokens: int = 12, spec: CacheSpec = SPEC, **settings) -> KVCache:
    """One sequence whose tokens were appended and attended."""
    cache = KVCache(spec, **({"max_tokens": 64, "block_size": 4} | settings))
    k = gaussian(1, spec.num_kv_heads, tokens, spec.head_dim)
    cache.append(k, k)
    cache.attend(np.concatenate([k, k], axis=1))
    return cache


# -- policies of a reader --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [slice(None), slice(0, None, 2)], ids=["all", "some"])
def test_a_score_of_nan_is_refused(which):
    """NaN sorted behind the holes: live tokens left, more of them than had to, without a word."""

    class Broken(Policy):
        def __init__(self):
            self.budget = 6

        def score(self, positions, mass, length):
            scores = positions.astype(float)
            scores[:, which] = np.nan
            return scores

    cache, step = filled(eviction=Broken()), gaussian(1, 2, 1, 16)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="score returned NaN"):
        cache.append(step, step)
    assert snapshot(cache) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Mine.budget must be an integer of at least 1, got None"),
        ({"budget": 2.5}, "Mine.budget .* got 2.5"),
        ({"budget": "4"}, "Mine.budget .* got '4'"),
        ({"budget": float("inf")}, "Mine.budget .* got inf"),
        ({"budget": 4, "observe": -1}, "Mine.observe must be an integer of at least 0, got -1"),
        ({"budget": 4, "observe": "all"}, "Mine.observe .* got 'all'"),
    ],
)
def test_a_policy_says_how_many_tokens_stay(settings, message):
    """It was accepted, and failed when the first token had to leave; or an AttributeError named no policy."""
    with pytest.raises(ValueError, match=message):
        KVCache(SPEC, eviction=type("Mine", (Policy,), settings)())


def test_a_query_that_sees_nothing_weighs_nothing():
    """0 / 0: it gave every slot a mass of NaN, for ever."""
    cache, step = filled(eviction=HeavyHitter(6, recent=2)), gaussian(1, 2, 1, 16)
    for _ in range(3):
        cache.append(step, step)
    cache.attend(gaussian(1, 2, 6, 16), window=1)  # the keys of the first of these positions have left
    cache.append(step, step)
    assert np.isfinite(cache._tables[0].slots.mass).all()


# -- settings --------------------------------------------------------------------------------------------------------


def test_settings_may_be_numpy_integers():
    """Sizes of a cache could be, settings could not: "must be an integer of at least 1, got np.int64(4)"."""
    four = np.int64(4)
    assert SlidingWindow(four, four) == SlidingWindow(4, 4)
    assert HeavyHitter(four, four) == HeavyHitter(4, 4)
    assert SnapKV(four, four, np.int64(3)) == SnapKV(4, 4, 3)
    assert KIVI(four, four, four) == KIVI(4, 4, 4)
    assert type(CacheSpec(np.int8(100), np.int8(100), np.int8(100)).elements_per_token) is int
    assert CacheSpec(np.int8(100), np.int8(100), np.int8(100)).elements_per_token == 2 * 100**3


def test_bits_may_be_a_small_numpy_integer():
    """2**8 is 0 in int8: all codes were 0. And 8.0 was taken for 8 until the first shift."""
    k = gaussian(1, 2, 12, 16)
    cache = filled(codec=Int(np.int8(8)))
    assert np.all(np.abs(cache.read(0)[0] - k[0]) <= Int(8).max_error(k[0].astype(np.float64)))
    with pytest.raises(ValueError, match=r"Int.bits must be 8, 4 or 2, got 8\.0"):
        Int(8.0)


@pytest.mark.parametrize("codec", [KIVI(4, group=4, residual=6), KIVI(4, group=8, residual=0)], ids=lambda c: c.name)
def test_a_step_of_max_step_tokens_always_fits(codec):
    """What waits in the tail was left out of the account: after some lengths such a step was refused."""
    cache = GroupedCache.for_windows(CacheSpec(2, 16, 2, "float32"), [6, None], 2, 400, chunk=8, codec=codec)
    step = gaussian(1, 2, int(cache.max_step), 16)
    assert step.shape[2] >= 8
    cache.close(1)  # room for a fork
    for length in range(1, 40):
        cache.append(step[:, :, :1], step[:, :, :1], layer=0, seqs=[0])
        cache.append(step[:, :, :1], step[:, :, :1], layer=1, seqs=[0])
        twin = cache.fork(0)
        cache.append(step, step, layer=0, seqs=[twin])
        assert cache.lengths[twin] == length + step.shape[2]
        cache.close(twin)


# -- forks -----------------------------------------------------------------------------------------------------------


def test_a_fork_made_in_inference_mode_can_be_written_outside():
    """Its tail was an inference tensor: "Inplace update to inference tensor outside InferenceMode is not allowed"."""
    cache = KVCache(SPEC, max_tokens=64, block_size=4, codec=KIVI(4, group=4, residual=4), backend="torch")
    k = torch.from_numpy(gaussian(1, 2, 10, 16))
    with torch.inference_mode():
        cache.append(k, k)
        twin = cache.fork(0)
    cache.append(k, k, seqs=[twin])
    assert cache.lengths == {0: 10, twin: 20}
    assert np.array_equal(cache.read(twin)[0][:, 10:].numpy()[:, -4:], k[0, :, -4:].numpy())


def test_a_fork_without_memory_holds_no_blocks(monkeypatch):
    """The blocks were shared first, with a sequence that then never came to be."""
    cache = filled(codec=KIVI(4, group=4, residual=4))
    before = snapshot(cache)

    def full(self):
        raise MemoryError

    monkeypatch.setattr(Tail, "copy", full)
    with pytest.raises(MemoryError):
        cache.fork(0)
    assert snapshot(cache) == before


@pytest.mark.parametrize("policy", [SlidingWindow(64), SlidingWindow(60, sinks=4), HeavyHitter(64)], ids=repr)
def test_a_fork_that_evicts_copies_what_it_writes(policy):
    """Every block behind the first slot that changed was copied: 32 of 32, or CacheFull where two would have done."""
    cache = filled(64, eviction=policy, max_tokens=80, num_blocks=40)
    step = gaussian(1, 2, 1, 16)
    for _ in range(3):
        cache.append(step, step)
        cache.attend(gaussian(1, 4, 1, 16))
    before, seen = cache.read(0), cache.num_free_blocks
    twin = cache.fork(0)
    cache.append(step, step, seqs=[twin])
    assert seen - cache.num_free_blocks <= SPEC.num_kv_heads + 1  # a slot of each head, and where the new token lies
    assert all(np.array_equal(x, y) for x, y in zip(cache.read(0), before, strict=True))
    k, v, positions = cache.read(twin)
    q = gaussian(1, 4, 1, 16)
    visible = [(np.broadcast_to(positions, k.shape[:2])[head] >= 0)[None] for head in (0, 1)]
    expected = [
        reference.attention(q[0, 2 * h : 2 * h + 2], k[h, None], v[h, None], visible=visible[h]) for h in (0, 1)
    ]
    np.testing.assert_allclose(cache.attend(q, seqs=[twin])[0], np.concatenate(expected), atol=1e-5)


# -- numbers that a codec cannot store -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e6])
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_what_cannot_be_encoded_does_not_wait_in_the_tail(bad, side, tokens):
    """It was let in, and when its group closed, every append was refused: the sequence could not grow any more."""
    cache = filled(codec=KIVI(4, group=4, residual=6))
    good = gaussian(1, 2, tokens, 16)
    poor = good.copy()
    poor[0, 1, -1, 3] = bad
    before = snapshot(cache)
    with pytest.raises(ValueError, match=f"{side} must be finite and within reach of the codec int4"):
        cache.append(*((poor, good) if side == "k" else (good, poor)))
    assert snapshot(cache) == before
    for _ in range(4):  # what the codec can take, up to the end of float16, may wait, and leaves the tail
        cache.append(60_000 * np.sign(good), good)


@pytest.mark.parametrize("codec", [Float8(), Float8("e5m2"), MXFP4(), Rotated(Float8()), Rotated(MXFP4())], ids=repr)
@pytest.mark.parametrize("size", [1e39, 3e38])
def test_numbers_beyond_float32_are_refused(codec, size):
    """Finite in float64, they became infinite on the way, or in the sums of the rotation, and NaN was stored."""
    cache = KVCache(CacheSpec(2, 32, dtype="float64"), max_tokens=8, codec=codec)
    k = np.full((1, 2, 3, 32), size)
    with pytest.raises(ValueError, match="k must be finite and within reach of the codec"):
        cache.append(k, k)
    assert cache.lengths == {0: 0} and cache.num_free_blocks == cache.num_blocks


# -- codecs of a reader, and blocks of a caller ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "encode",
    [
        lambda rows: {"payload": rows[..., :-1, :]},
        lambda rows: {"payload": rows[..., :-1]},
        lambda rows: {"payload": rows[..., :1]},
        lambda rows: {},
        lambda rows: {"payload": rows, "scale": rows},
    ],
    ids=["a row less", "a column less", "one column", "no plane", "another plane"],
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_planes_that_are_not_as_the_codec_says(encode, tokens):
    """One column was broadcast, no plane was nothing to write; or it failed when slots had been moved already."""

    class Mine(Codec):
        name, broken = "mine", False

        def planes(self, width):
            return {"payload": Plane(width, "float32")}

        def encode(self, rows):
            return encode(rows) if self.broken else {"payload": rows}

        def decode(self, planes, dtype):
            return planes["payload"].astype(dtype)

    codec = Mine()
    cache, step = filled(codec=codec, eviction=HeavyHitter(6)), gaussian(1, 2, tokens, 16)
    codec.broken = True
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"mine.encode must give planes of shapes \{'payload': "):
        cache.append(step, step)
    assert snapshot(cache) == before


@pytest.mark.parametrize("blocks", [[0.9], [True], [[0]], np.zeros((1, 1), int)], ids=repr)
def test_ids_of_blocks_are_integers(blocks):
    """0.9 and True were blocks 0 and 1; a nested list was refused when its blocks had a holder more already."""
    cache = filled(codec=Split(Int(8), Int(8)))
    before = snapshot(cache)
    for call in (lambda: cache.open(blocks), lambda: cache.adopt(0, blocks)):
        with pytest.raises(ValueError, match="must be a flat list of integers"):
            call()
    assert snapshot(cache) == before


def test_a_policy_sees_copies():
    """A policy that wrote into ``mass`` or ``positions`` wrote into the cache."""

    class Writes(Policy):
        budget, observe = 6, None

        def score(self, positions, mass, length):
            mass[positions >= length - 2] = np.inf
            positions += 1
            return mass

    cache, step = filled(eviction=Writes()), gaussian(1, 2, 1, 16)
    for _ in range(4):
        cache.append(step, step)
    assert np.isfinite(cache._tables[0].slots.mass).all()
    assert cache.read(0)[2].max() == cache.lengths[0] - 1
