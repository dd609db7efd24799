"""What a cache costs: bytes held, bytes in use, bytes written by an append, bytes read by attention."""

import inspect
import tracemalloc

import numpy as np
import pytest
import torch

import kvlib
from kvlib.eviction import HeavyHitter, SnapKV
from kvlib.spec import FLOAT_BYTES
from tests.conformance import bounds
from tests.conformance.conftest import ENTRIES, Setup
from tests.conformance.graph import buffer_bytes, changed, leaves, snapshot


def grown(setup: Setup, tokens: int, spec: kvlib.CacheSpec | None = None, **settings) -> kvlib.KVCache:
    """A cache with ``tokens`` tokens of noise in every layer of every sequence."""
    spec = spec or setup.spec()
    cache = setup.cache(spec, **settings)
    rng = np.random.default_rng(3)
    for layer in range(spec.num_layers):
        k, v = (
            setup.array(rng.standard_normal((cache.batch, spec.num_kv_heads, tokens, w)))
            for w in (spec.head_dim, spec.value_dim)
        )
        cache.append(k, None if spec.latent else v, layer=layer)
    return cache


# -- promise 6: nbytes is the truth ----------------------------------------------------------------

SPECS = {
    "one layer": {},
    "three layers": {"num_layers": 3},
    "narrow v": {"v_head_dim": 5},  # or the next that the codec can store
    "latent": {"num_kv_heads": 1, "latent": 12},
}


def lingering(cache: kvlib.KVCache) -> int:
    """Bytes that a step leaves behind for the next: rows that were exact a moment ago, and queries to look back with.

    None of it without a codec that groups tokens, or a policy that observes the last queries.
    """
    tables = cache._tables.open_tables.values()
    rows = [x for table in tables if table.tail for run in table.tail.runs if run for x in (run.k, run.v)]
    queries = [recent.q for table in tables if table.slots for recent in table.slots.recent if recent]
    assert not rows or cache.codec.group > 1
    assert not queries or isinstance(cache.eviction, SnapKV)
    return sum({id(x): x.nbytes for x in (*rows, *queries) if x is not None}.values())


@pytest.mark.parametrize("shape", list(SPECS))
def test_nbytes_is_what_the_arrays_take(setup, shape):
    """Counted again by walking the object graph: the memory behind every array, shared memory once."""
    spec = setup.spec(**{name: setup.width(x) if name == "v_head_dim" else x for name, x in SPECS[shape].items()})
    cache = setup.cache(spec, batch=2, num_blocks=40)
    assert cache.nbytes == buffer_bytes(cache)
    new = cache.nbytes
    k = setup.array(np.ones((2, spec.num_kv_heads, 19, 32)))
    v = None if spec.latent else setup.array(np.ones((2, spec.num_kv_heads, 19, spec.value_dim)))
    for layer in range(spec.num_layers):
        cache.append(k, v, layer=layer)
    cache.attend(k, seqs=[0, 1])
    cache.read(1)
    assert cache.nbytes == buffer_bytes(cache) == new + lingering(cache)  # all else is taken at construction
    twin = cache.fork(1)
    assert cache.nbytes == buffer_bytes(cache) > new + lingering(cache)  # the block table of one more sequence
    cache.append(k[:1, :, :1], None if v is None else v[:1, :, :1], seqs=[twin])
    cache.truncate(0, 3)
    assert cache.nbytes == buffer_bytes(cache)
    cache.close(twin)
    assert cache.nbytes == buffer_bytes(cache) == new + lingering(cache)
    cache.reset()
    assert cache.nbytes == buffer_bytes(cache) == new


@pytest.mark.parametrize("entry", ["contiguous", "paged", "paged-token", "outside-codec"])
def test_nbytes_of_plain_storage_by_hand(entry, place, dtype):
    """Blocks of K and V as the spec prices them, plus what the tables say they are: no hidden second copy."""
    setup = Setup(entry, place, dtype)
    spec = setup.spec(num_layers=3, head_dim=64, num_kv_heads=4)
    cache = setup.cache(spec, batch=2, max_tokens=64)
    if not bounds.lossless(cache.codec):
        per_token = 2 * 3 * 4 * (64 + 4)  # K and V, layers, heads, a byte an element and a float32 scale
    else:
        per_token = 2 * 3 * 4 * 64 * FLOAT_BYTES[dtype]
        assert per_token == spec.bytes_per_token
    slots = cache.num_blocks * cache.block_size
    # the pool; two tables, and in each what its three layers have seen, stored and kept waiting
    bookkeeping = 8 * cache.num_blocks + 2 * (4 * cache.num_blocks // 2 + 3 * 8 * 3)
    assert cache.nbytes == slots * per_token + bookkeeping


def test_the_walk_sees_everything_that_changes(setup32):
    """The snapshots of the error tests are worth something only if they notice every kind of change."""
    cache = grown(setup32, 20, num_blocks=200)
    k = setup32.array(np.ones((1, 2, 1, 32)))
    twin = cache.fork(0)
    for change in (
        lambda: cache.append(k, k, seqs=[0]),
        lambda: cache.append(k, k, seqs=[twin]),
        lambda: cache.truncate(0, 3),
        lambda: cache.open(),
        lambda: cache.fork(0),
        lambda: cache.close(twin),
        lambda: cache.reset(),
    ):
        before = snapshot(cache)
        change()
        assert changed(before, snapshot(cache))
    for _, array in leaves(cache):
        if isinstance(array, np.ndarray | torch.Tensor) and array.dtype in (np.float32, torch.float32) and array.nbytes:
            before = snapshot(cache)
            array.reshape(-1)[-1] += 1
            assert len(changed(before, snapshot(cache))) == 1


def test_nbytes_used_counts_shared_blocks_once(setup):
    cache = setup.cache(setup.spec(num_layers=2), batch=1, num_blocks=100)
    planes = sum(a.nbytes for a in cache._storage.arrays())
    per_block = planes // cache.num_blocks
    assert per_block * cache.num_blocks == planes
    size = cache.block_size
    tokens = min(20, cache.max_tokens // 2)

    def used() -> int:
        tables = {block for seq in cache.lengths for block in cache.block_table(seq)}
        tails = [x.tail for x in cache._tables.open_tables.values() if x.tail]
        assert cache.nbytes_used == per_block * len(tables) + sum(a.nbytes for tail in tails for a in tail.arrays())
        return len(tables)

    assert used() == 0
    k = setup.array(np.ones((1, 2, tokens, 32)))
    for layer in (0, 1):
        cache.append(k, k, layer=layer)
    blocks = -(-tokens // size)
    assert used() == blocks
    twin = cache.fork(0)
    assert used() == blocks  # shared
    cache.append(k[:, :, :1], k[:, :, :1], seqs=[twin])
    assert used() == blocks + 1  # a copy of the last block, or a new one
    cache.close(0)
    assert used() == -(-(tokens + 1) // size)
    cache.truncate(twin, 0)
    assert used() == 0


# What a number may cost at 32K tokens and head_dim 128: bits, and how far off they may be.
BITS = {
    "float16": (16, 0.1),
    "int8": (8.25, 0.05),
    "int4": (5.0, 0.1),
    "int2": (3.0, 0.1),
    "fp8": (8.125, 0.175),
    "mxfp4": (4.25, 0.005),
    "nvfp4": (4.5, 0.005),
    "kivi-2bit": (3.05, 0.05),
    "kivi-4bit": (5.05, 0.05),
}


@pytest.mark.parametrize("codec", list(BITS))
def test_bits_per_element(codec, place):
    """Counted from the arrays of a full cache: payload, scales, offsets and the exact tail."""
    setup = Setup("contiguous", place, "float16")
    tokens, spec = 32768, setup.spec(head_dim=128, num_kv_heads=1)
    cache = setup.cache(spec, codec=codec, max_tokens=tokens, block_size=32)
    rng = np.random.default_rng(1)
    x = setup.array(rng.standard_normal((1, 1, 8192, 128)))
    for start, stop in ((0, 8192),) * 3 + ((0, 8191), (8191, 8192)):  # the last step as a decode step
        cache.append(x[:, :, start:stop], x[:, :, start:stop])
    assert cache.num_free_blocks == 0
    table = cache._tables[0]
    arrays = [*cache._storage.arrays(), *(table.tail.arrays() if table.tail else ())]
    stored = table.stored[0] + table.waiting[0]
    assert stored == tokens
    bits = 8 * sum(array.nbytes for array in arrays) / (tokens * spec.elements_per_token)
    expected, off = BITS[codec]
    assert abs(bits - expected) <= off
    assert cache.nbytes <= sum(array.nbytes for array in arrays) + 16 * cache.num_blocks + 100  # the pool and the table


# -- promise 7: append is O(1), attend reads each cached byte once ---------------------------------


def slots_changed(before: dict, after: dict, cache: kvlib.KVCache) -> int:
    """How many (layer, block, slot) of the storage differ between two lists of its planes."""
    differs = np.zeros((cache.spec.num_layers, cache.num_blocks, cache.block_size), bool)
    for old, new in zip(before, after, strict=True):
        rows = (old != new).any(axis=(2, 4))  # one for each token, or for each group of them
        differs |= np.repeat(rows, cache.block_size // rows.shape[2], axis=2)
    return int(differs.sum())


@pytest.mark.parametrize("tokens", [1, 3])
def test_append_writes_only_its_own_slots(setup32, tokens):
    """However much is cached, appending T tokens changes T slots of the storage, or those of the groups they close."""
    for cached in (10, 800):
        cache = grown(setup32, cached, setup32.spec(num_layers=2), max_tokens=810)
        k = setup32.array(np.full((1, 2, tokens, 32), 9.0))
        closing = bounds.closed_tokens(cache.codec, cached + tokens) - bounds.closed_tokens(cache.codec, cached)
        before = [setup32.host(a).copy() for a in cache._storage.arrays()]
        cache.append(k, k, layer=1)
        assert slots_changed(before, [setup32.host(a) for a in cache._storage.arrays()], cache) == closing


@pytest.mark.parametrize("block_size", [None, 16])
def test_append_allocates_the_same_at_any_length(block_size):
    """Python and NumPy memory asked for while one token is appended: at 32K cached tokens what it is at
    1K.
    """
    spec = kvlib.CacheSpec(num_kv_heads=2, head_dim=64, dtype="float32")
    peaks = []
    for cached in (1024, 32 * 1024 - 8):
        cache = grown(
            Setup("contiguous", "numpy", "float32"), cached, spec, max_tokens=32 * 1024, block_size=block_size
        )
        k = np.ones((1, 2, 1, 64), np.float32)
        cache.append(k, k)  # what is imported or cached on first use
        tracemalloc.start()
        cache.append(k, k)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The interpreter's own objects differ by some hundred bytes. One byte for each cached token would be
    # 31 KiB.
    assert abs(peaks[1] - peaks[0]) <= 2048
    assert peaks[1] < 1024 * spec.bytes_per_token / 20  # far from a copy of even the shorter cache


@pytest.mark.parametrize("entry_name", list(ENTRIES))
def test_append_allocates_the_same_at_any_capacity(entry_name):
    """A cache that could grow to a million tokens asks for no more than one that could grow to a thousand."""
    setup, peaks = Setup(entry_name, "numpy", "float32"), []
    for max_tokens in (1000, 1_000_000):
        cache = setup.cache(setup.spec(num_kv_heads=1, head_dim=setup.width(1)), max_tokens=max_tokens)
        k = np.ones((1, 1, 1, cache.spec.head_dim), np.float32)
        for _ in range(20):
            cache.append(k, k)
        tracemalloc.start()
        cache.append(k, k)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert abs(peaks[1] - peaks[0]) <= 2048


def reads(cache: kvlib.KVCache, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, tuple, int, int]]:
    """A list that fills with the (side, layer, block table, start, stop) of every read of the storage."""
    seen, gather = [], cache._storage.gather
    signature = inspect.signature(gather)

    def recording(*args, **kwargs):
        bound = signature.bind(*args, **kwargs).arguments
        table = tuple(bound["table"].tolist())
        seen.append((bound["side"], bound["layer"], table, bound["start"], bound["stop"]))
        return gather(*args, **kwargs)

    monkeypatch.setattr(cache._storage, "gather", recording)
    return seen


@pytest.mark.parametrize("tokens", [1, 4, 700])
def test_attend_reads_every_token_once(setup32, tokens, monkeypatch):
    cache = grown(setup32, 700, setup32.spec(num_layers=2), batch=2, max_tokens=700)
    seen = reads(cache, monkeypatch)
    cache.attend(setup32.array(np.ones((2, 8, tokens, 32))), layer=1)
    for seq in (0, 1):
        blocks = cache.block_table(seq)
        times = {side: np.zeros(bounds.closed_tokens(cache.codec, 700), int) for side in "kv"}
        for side, layer, table, start, stop in seen:
            assert layer == 1
            if list(table[: len(blocks)]) == blocks:
                times[side][start:stop] += 1
        observed = isinstance(cache.eviction, HeavyHitter)  # needs the scores again, once their sum is known
        assert np.all(times["k"] == 1 + observed)
        assert np.all(times["v"] == 1)


def test_a_long_prefill_never_builds_the_whole_score_matrix(entry):
    """2,048 positions of 8 heads: all scores at once would take 134 MB in float32."""
    setup = Setup(entry, "numpy", "float32")
    cache = grown(setup, 2048, max_tokens=2048)
    q = setup.array(np.ones((1, 8, 2048, 32)))
    tracemalloc.start()
    cache.attend(q)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2048 * 2048 * 4 / 3


@pytest.mark.parametrize("entry", ["contiguous", "paged", "outside-codec", "token-groups", "quarot", "h2o"])
@pytest.mark.parametrize("act", ["attend", "read"])
def test_what_is_gathered_is_not_kept(entry, act):
    """After the cache is gone, its memory is: what a thread keeps to gather into is a few tiles, not a
    sequence.
    """
    setup = Setup(entry, "numpy", "float32")
    tracemalloc.start()
    try:
        cache = grown(setup, 65536, setup.spec(head_dim=128), max_tokens=65536)
        held = 65536 * cache.spec.bytes_per_token
        if act == "attend":
            cache.attend(setup.array(np.ones((1, 8, 2, 128))))
        else:
            cache.read(0)
        del cache
        assert tracemalloc.get_traced_memory()[0] < held / 3  # 8 MiB at most for each plane
    finally:
        tracemalloc.stop()
