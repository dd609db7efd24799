"""Bad input: the right exception, a message that says what was expected and what came, and a cache
exactly as it was.
"""

import contextlib
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import kvlib
from kvlib.codecs import Int
from kvlib.eviction import HeavyHitter, SlidingWindow
from tests.conformance.conftest import Setup
from tests.conformance.graph import changed, snapshot


# Every check comes before anything that a codec or a policy does: one entry of each kind is enough.
@pytest.fixture(params=["contiguous", "paged", "paged-token", "outside-codec", "token-groups", "h2o", "snapkv"])
def entry(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cache(setup32: Setup, rng: np.random.Generator) -> kvlib.KVCache:
    """Two sequences of 7 and 12 tokens, a fork of the second, and layer 1 three tokens behind in the
    first.
    """
    cache = setup32.cache(setup32.spec(num_layers=2), batch=2, max_tokens=20, num_blocks=60)
    for seq, layer, tokens in ((0, 0, 7), (0, 1, 4), (1, 0, 12), (1, 1, 12)):
        _, k = setup32.draw(rng, 1, 2, tokens, 32)
        cache.append(k, k + 1, layer=layer, seqs=[seq])
    cache.fork(1)
    return cache


@contextlib.contextmanager
def refuses(cache: kvlib.KVCache, error: type[Exception], *says: str) -> Iterator[None]:
    """Inside, ``error`` is raised, its message matches every pattern, and the cache stays as it was, bit
    for bit.
    """
    before = snapshot(cache)
    with pytest.raises(error) as info:
        yield
    assert type(info.value) is error
    for pattern in says:
        assert re.search(pattern, str(info.value)), f"{pattern!r} is not in: {info.value}"
    assert changed(before, snapshot(cache)) == []


# -- append ----------------------------------------------------------------------------------------

# name: (shape of k, shape of v, what the message must say)
BAD_SHAPES = {
    "rank 3": ((3, 2, 32), (3, 2, 32), [r"k must have shape", r"\(3, 2, T >= 1, 32\)", r"got \(3, 2, 32\)"]),
    "rank 5": ((1, 3, 2, 1, 32), (1, 3, 2, 1, 32), [r"\(3, 2, T >= 1, 32\)", r"got \(1, 3, 2, 1, 32\)"]),
    "a batch of one for three sequences": (
        (1, 2, 5, 32),
        (1, 2, 5, 32),
        [r"\(3, 2, T >= 1, 32\)", r"got \(1, 2, 5, 32\)"],
    ),
    "heads": ((3, 4, 5, 32), (3, 4, 5, 32), [r"\(3, 2, T >= 1, 32\)", r"got \(3, 4, 5, 32\)"]),
    "no heads": ((3, 0, 5, 32), (3, 0, 5, 32), [r"got \(3, 0, 5, 32\)"]),
    "heads and tokens swapped": ((3, 5, 2, 32), (3, 5, 2, 32), [r"got \(3, 5, 2, 32\)"]),
    "head_dim": ((3, 2, 5, 17), (3, 2, 5, 17), [r"\(3, 2, T >= 1, 32\)", r"got \(3, 2, 5, 17\)"]),
    "no tokens": ((3, 2, 0, 32), (3, 2, 0, 32), [r"T >= 1", r"got \(3, 2, 0, 32\)"]),
    "heads of v": ((3, 2, 5, 32), (3, 1, 5, 32), [r"v must have shape", r"got \(3, 1, 5, 32\)"]),
    "width of v": ((3, 2, 5, 32), (3, 2, 5, 8), [r"v must have shape", r"got \(3, 2, 5, 8\)"]),
    "tokens of k and v": ((3, 2, 5, 32), (3, 2, 1, 32), [r"k is \(3, 2, 5, 32\)", r"v is \(3, 2, 1, 32\)"]),
}


@pytest.mark.parametrize("case", list(BAD_SHAPES))
def test_append_shapes(setup32, cache, case):
    k_shape, v_shape, says = BAD_SHAPES[case]
    k, v = setup32.array(np.ones(k_shape)), setup32.array(np.ones(v_shape))
    with refuses(cache, ValueError, *says):
        cache.append(k, v)


@pytest.mark.parametrize("dtype", ["int64", "int8", "bool", "complex64"])
@pytest.mark.parametrize("which", ["k", "v"])
def test_append_wants_floats(setup32, cache, dtype, which):
    good = setup32.array(np.ones((3, 2, 1, 32)))
    bad = good.astype(dtype) if setup32.backend == "numpy" else good.to(getattr(torch, dtype))
    with refuses(cache, TypeError, rf"{which} must have a dtype of", "float16, bfloat16", f"got {dtype}"):
        cache.append(*((bad, good) if which == "k" else (good, bad)))
    with refuses(cache, TypeError, "q must have a dtype of", f"got {dtype}"):
        cache.attend(bad)


def test_append_wants_one_dtype(setup32, cache):
    k = np.ones((3, 2, 1, 32))
    with refuses(cache, ValueError, "dtype", r"k is .*float32", r"v is .*float16"):
        cache.append(setup32.array(k), setup32.array(k, "float16"))


def test_arrays_of_the_other_backend(setup32, cache):
    x = np.ones((3, 2, 1, 32), np.float32)
    other, came = (
        (torch.tensor(x), "torch Tensor on cpu") if setup32.backend == "numpy" else (x, "numpy ndarray")
    )
    mine = setup32.array(x)
    for call in (
        lambda: cache.append(other, other),
        lambda: cache.append(mine, other),
        lambda: cache.attend(other),
    ):
        with refuses(
            cache, TypeError, rf"[kvq] must be a {setup32.backend} array", f"got a {came}", "convert"
        ):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here")
@pytest.mark.parametrize("home, away", [("cpu", "cuda"), ("cuda", "cpu")])
def test_tensors_on_the_other_device(home, away):
    cache = kvlib.KVCache(kvlib.CacheSpec(2, 32, dtype="float32"), max_tokens=8, backend="torch", device=home)
    x = torch.ones(1, 2, 1, 32, device=away)
    with refuses(cache, TypeError, f"k must be a torch array on {home}", f"got a torch Tensor on {away}"):
        cache.append(x, x)


@pytest.mark.parametrize(
    "bad", [[[[[1.0] * 32]] * 2] * 3, None, 1.0, "k"], ids=["list", "None", "float", "str"]
)
def test_not_an_array(setup32, cache, bad):
    good, came = setup32.array(np.ones((3, 2, 1, 32))), type(bad).__name__
    for call in (lambda: cache.append(bad, good), lambda: cache.append(good, bad), lambda: cache.attend(bad)):
        with refuses(cache, TypeError, rf"[kvq] must be a {setup32.backend} array", f"got a .*{came}"):
            call()


def test_latent_takes_no_v(setup32):
    cache = setup32.cache(setup32.spec(num_kv_heads=1, latent=12), max_tokens=20)
    k = setup32.array(np.ones((1, 1, 3, 32)))
    cache.append(k)
    with refuses(cache, ValueError, "latent", "first 12 columns of K", "leave v out"):
        cache.append(k, k)


# -- attend ----------------------------------------------------------------------------------------

BAD_QUERIES = {
    "rank 3": (
        (3, 4, 32),
        [r"q must have shape", r"\(3, a multiple of 2, T >= 1, 32\)", r"got \(3, 4, 32\)"],
    ),
    "batch": ((2, 4, 1, 32), [r"\(3, a multiple of 2, T >= 1, 32\)", r"got \(2, 4, 1, 32\)"]),
    "heads no multiple": ((3, 5, 1, 32), [r"a multiple of 2", r"got \(3, 5, 1, 32\)"]),
    "fewer heads than K/V": ((3, 1, 1, 32), [r"a multiple of 2", r"got \(3, 1, 1, 32\)"]),
    "no heads": ((3, 0, 1, 32), [r"a multiple of 2", r"got \(3, 0, 1, 32\)"]),
    "no tokens": ((3, 4, 0, 32), [r"T >= 1", r"got \(3, 4, 0, 32\)"]),
    "width": ((3, 4, 1, 8), [r"32\)", r"got \(3, 4, 1, 8\)"]),
    "more positions than tokens": (
        (3, 4, 8, 32),
        [r"the last 8 positions", r"sequence 0 holds 7 tokens", r"append"],
    ),
}


@pytest.mark.parametrize("case", list(BAD_QUERIES))
def test_attend_shapes(setup32, cache, case):
    shape, says = BAD_QUERIES[case]
    with refuses(cache, ValueError, *says):
        cache.attend(setup32.array(np.ones(shape)))


def test_attend_counts_the_tokens_of_its_own_layer(setup32, cache):
    q = setup32.array(np.ones((1, 2, 5, 32)))
    cache.attend(q, layer=0, seqs=[0])
    with refuses(cache, ValueError, "the last 5 positions", "layer 1 of sequence 0 holds 4 tokens"):
        cache.attend(q, layer=1, seqs=[0])


# -- sequences and layers --------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [2, -1, True, False, 0.0, 1.5, None, "0"], ids=repr)
def test_layer(setup32, cache, layer):
    k = setup32.array(np.ones((3, 2, 1, 32)))
    for call in (
        lambda: cache.append(k, k, layer),
        lambda: cache.attend(k, layer),
        lambda: cache.read(0, layer),
    ):
        with refuses(cache, IndexError, "layer must be", "from 0 to 1", f"got {re.escape(repr(layer))}"):
            call()


@pytest.mark.parametrize("layer", [np.int64(1), np.int32(0)], ids=repr)
def test_numpy_integers_are_integers(setup32, cache, layer):
    k = setup32.array(np.ones((3, 2, 1, 32)))
    cache.append(k, k, layer=layer)
    cache.read(np.int64(0), layer)
    cache.truncate(np.int64(1), np.int64(3))


@pytest.mark.parametrize("seq", [3, -1, None, "0", [0], 0.5], ids=repr)
def test_unknown_sequence(setup32, cache, seq):
    k = setup32.array(np.ones((2, 2, 1, 32)))
    calls = {
        "append": lambda: cache.append(k, k, seqs=[0, seq]),
        "attend": lambda: cache.attend(k, seqs=[0, seq]),
        "read": lambda: cache.read(seq),
        "fork": lambda: cache.fork(seq),
        "truncate": lambda: cache.truncate(seq, 0),
        "close": lambda: cache.close(seq),
        "block_table": lambda: cache.block_table(seq),
    }
    for call in calls.values():
        with refuses(
            cache, KeyError, f"sequence {re.escape(repr(seq))} is not open", r"open sequences: \[0, 1, 2\]"
        ):
            call()


def test_closed_sequence(setup32, cache):
    cache.close(1)
    for call in (
        lambda: cache.read(1),
        lambda: cache.close(1),
        lambda: cache.fork(1),
        lambda: cache.truncate(1, 0),
    ):
        with refuses(cache, KeyError, "sequence 1 is not open", r"open sequences: \[0, 2\]"):
            call()


@pytest.mark.parametrize("seqs", [[0, 0], [0, 1, 0], []], ids=repr)
def test_seqs_named_twice_or_not_at_all(setup32, cache, seqs):
    k = setup32.array(np.ones((max(len(seqs), 1), 2, 1, 32)))
    for call in (lambda: cache.append(k, k, seqs=seqs), lambda: cache.attend(k, seqs=seqs)):
        with refuses(cache, ValueError, "at least one", "none twice", re.escape(str(seqs))):
            call()


def test_seqs_is_a_list(setup32, cache):
    k = setup32.array(np.ones((1, 2, 1, 32)))
    for call in (lambda: cache.append(k, k, seqs=0), lambda: cache.attend(k, seqs=0)):
        with refuses(cache, TypeError, "seqs must be a list", "got 0"):
            call()


def test_no_open_sequence(setup32):
    cache = setup32.cache(batch=0, num_blocks=4)
    k = setup32.array(np.ones((1, 2, 1, 32)))
    for call in (lambda: cache.append(k, k), lambda: cache.attend(k)):
        with refuses(cache, ValueError, "at least one"):
            call()


@pytest.mark.parametrize("n", [-1, 8, 2.0, 2.5, "2", None, True], ids=repr)
def test_truncate(cache, n):
    """Sequence 0 holds 7 tokens in layer 0."""
    with refuses(cache, ValueError, "sequence 0 holds 7 tokens", f"truncate it to {re.escape(repr(n))}"):
        cache.truncate(0, n)


# -- no room ---------------------------------------------------------------------------------------

# Blocks of four tokens; what a codec with token groups needs is counted by the state machine.
TOKEN_BY_TOKEN = pytest.mark.parametrize(
    "entry", ["contiguous", "paged", "paged-token", "outside-codec", "h2o", "snapkv"]
)


def test_too_many_tokens(setup32, cache):
    """Sequence 0 could take 13 more, the other two only 8: nothing is written to any of them."""
    k = setup32.array(np.ones((3, 2, 9, 32)))
    with refuses(cache, ValueError, "sequence 1 holds 12 tokens", "9 more would exceed max_tokens=20"):
        cache.append(k, k)
    cache.append(k[:, :, :8], k[:, :, :8])
    assert cache.lengths == {0: 15, 1: 20, 2: 20}


def full(setup: Setup, batch: int, blocks: int, tokens: int, **settings) -> kvlib.KVCache:
    """``batch`` sequences of ``tokens`` tokens in a pool of ``blocks`` blocks."""
    cache = setup.cache(batch=batch, num_blocks=blocks, **settings)
    k = setup.array(np.random.default_rng(1).standard_normal((batch, 2, tokens, 32)))
    cache.append(k, -k)
    return cache


def test_pool_exhausted_while_growing(setup32):
    """Of three sequences that each need another block, two could have it: none gets it."""
    size = setup32.cache().block_size
    cache = full(setup32, 3, blocks=5, tokens=size, max_tokens=2 * size, block_size=size)
    k = setup32.array(np.ones((3, 2, 1, 32)))
    with refuses(
        cache, kvlib.CacheFull, "needs 3 more blocks", "2 of 5 are free", "close|truncate", "num_blocks"
    ):
        cache.append(k, k)
    cache.append(k[:2], k[:2], seqs=[2, 0])
    assert cache.num_free_blocks == 0


@TOKEN_BY_TOKEN
def test_pool_exhausted_in_copy_on_write(setup32):
    """The last block is half full and shared: writing into it takes a block, and there is none."""
    size = 4
    cache = full(setup32, 1, blocks=2, tokens=6, max_tokens=8, block_size=size)
    twin = cache.fork(0)
    k = setup32.array(np.ones((1, 2, 1, 32)))
    for seq in (0, twin):
        with refuses(cache, kvlib.CacheFull, "needs 1 more blocks", "0 of 2 are free"):
            cache.append(k, k, seqs=[seq])
    cache.close(twin)
    cache.append(k, k)  # the only holder writes in place


@TOKEN_BY_TOKEN
def test_pool_exhausted_by_copies_and_growth_together(setup32):
    """Three holders of one half-full block each write two tokens past it: two copies, then three new
    blocks.
    """
    cache = full(setup32, 1, blocks=5, tokens=3, max_tokens=8, block_size=4)
    seqs = [0, cache.fork(0), cache.fork(0)]
    k = setup32.array(np.ones((3, 2, 2, 32)))
    with refuses(cache, kvlib.CacheFull, "needs 5 more blocks", "4 of 5 are free"):
        cache.append(k, k, seqs=seqs)
    cache.append(k[:, :, :1], k[:, :, :1], seqs=seqs)  # two copies fit
    assert cache.num_free_blocks == 2


@TOKEN_BY_TOKEN
def test_cache_full_is_a_memory_error_that_carries_its_numbers(setup32):
    cache = full(setup32, 2, blocks=3, tokens=4, max_tokens=8, block_size=4)
    k = setup32.array(np.ones((2, 2, 1, 32)))
    with pytest.raises(MemoryError) as info:
        cache.append(k, k)
    assert isinstance(info.value, kvlib.CacheFull)
    assert (info.value.needed, info.value.free) == (2, 1)


# -- construction ----------------------------------------------------------------------------------

SIZES = {"batch": -1, "max_tokens": 0, "block_size": 0, "num_blocks": 0}


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("value", ["too small", True, False, 2.0, "4", -3, float("nan"), [4]], ids=repr)
def test_sizes(setup32, name, value):
    value = SIZES[name] if value == "too small" else value
    least = SIZES[name] + 1
    with pytest.raises(
        ValueError, match=f"{name} must be an integer of at least {least}, got {re.escape(repr(value))}"
    ):
        setup32.cache(**{name: value})


def test_spec_is_a_spec(setup32):
    for spec in ({"num_kv_heads": 2}, "llama", None):
        with pytest.raises(TypeError, match=rf"CacheSpec, got {type(spec).__name__}"):
            kvlib.KVCache(spec, backend=setup32.backend)


@pytest.mark.parametrize(
    "settings, error, says",
    [
        ({"backend": "jax"}, ValueError, "backend must be 'numpy' or 'torch', got 'jax'"),
        (
            {"backend": "numpy", "device": "cuda"},
            ValueError,
            "backend='numpy' lives on the CPU, got device='cuda'",
        ),
        ({"backend": "torch", "device": "gpu"}, ValueError, "device .*got 'gpu'"),
        ({"codec": "zip"}, ValueError, "codec must be .*one of plain, .*int8, .*kivi-2bit; got 'zip'"),
        ({"codec": Int}, TypeError, r"must be an object, got the class Int: write Int\(...\)"),
        ({"eviction": "h2o"}, TypeError, "None or a kvlib.eviction.Policy.*got 'h2o'"),
        ({"eviction": SlidingWindow}, TypeError, "None or a kvlib.eviction.Policy"),
        (
            {"codec": "kivi-2bit", "block_size": 16},
            ValueError,
            "block_size must be a multiple of the 32 tokens that the codec kivi-2bit.* encodes together, got 16",
        ),
        (
            {"codec": "kivi-2bit", "eviction": HeavyHitter(159)},
            ValueError,
            "keeps up to 159 tokens in its tail.*must have a budget above 159",
        ),
        ({"codec": 8}, TypeError, "a codec needs planes, encode, decode, scores, mix, and 8 .*derive it"),
    ],
    ids=lambda x: repr(x)[:40] if isinstance(x, dict) else "",
)
def test_names(settings, error, says):
    with pytest.raises(error, match=says):
        kvlib.KVCache(kvlib.CacheSpec(2, 32), max_tokens=8, **settings)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has the CUDA device that the error is about"
)
def test_no_cuda_device():
    with pytest.raises(
        ValueError, match="device='cuda' was asked for, but torch sees no CUDA device; use device='cpu'"
    ):
        kvlib.KVCache(kvlib.CacheSpec(2, 32), max_tokens=8, backend="torch", device="cuda")
