"""Triton's kernels, in its interpreter, against plain references: kvlib's own in torch, and float64 attention.

On a machine with CUDA the same tests run on the GPU.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib import kernels

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kvlib.kernels import calls, paged, quantize  # noqa: E402

DEVICE = "cpu" if kernels.interpreted() else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="neither CUDA nor interpreter"
)

CODECS = {
    "plain": "plain",
    "float32": "float32",
    "int8": "int8",
    "int4": "int4",
    "int4 symmetric": kvlib.Int(4, symmetric=True),
    "int2": kvlib.Int(2, group_size=32),
    "kivi-4": kvlib.KIVI(4, group=16, residual=16),
    "kivi-2": kvlib.KIVI(2, group=16, residual=0),
    "int8 K, plain V": kvlib.Split(kvlib.Int(8), kvlib.codecs.Plain("float16")),
}


def normal(rng: np.random.Generator, *shape: int):
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(DEVICE)


def filled(codec, lengths, heads=2, width=64, block_size=16, dtype="float16", seed=0) -> kvlib.KVCache:
    """A cache whose blocks lie in random order, with two layers and sequences of ``lengths``."""
    spec = kvlib.CacheSpec(heads, width, num_layers=2, dtype=dtype)
    cache = kvlib.KVCache(spec, len(lengths), 512, block_size, codec=codec, backend="torch", device=DEVICE)
    rng = np.random.default_rng(seed)
    cache._tables.pool._free[:] = rng.permutation(cache._tables.pool._free)
    for seq, length in enumerate(lengths):
        for layer in range(2):
            k, v = normal(rng, 2, 1, heads, length, width)
            cache.append(k, v, layer, [seq])
    return cache


def arguments(cache: kvlib.KVCache, layer: int):
    tables = list(cache._tables.open_tables.values())
    ids = torch.from_numpy(np.maximum(np.stack([t.ids for t in tables]), 0)).to(DEVICE)
    stored, seen = ([int(getattr(t, name)[layer]) for t in tables] for name in ("stored", "seen"))
    counts = torch.tensor([stored, seen], dtype=torch.int32, device=DEVICE)
    return ids, counts[0], counts[1], max(stored)


def assert_partials_agree(found, expected, tolerance: float) -> None:
    """The same output, and the same sum and maximum, so that it merges as it should."""
    torch.testing.assert_close(found.normalise(), expected.normalise(), atol=tolerance, rtol=0)
    nothing = torch.isneginf(expected.m)
    assert torch.equal(torch.isneginf(found.m), nothing)
    torch.testing.assert_close(
        found.m.masked_fill(nothing, 0), expected.m.masked_fill(nothing, 0), atol=tolerance, rtol=0
    )
    torch.testing.assert_close(found.l, expected.l, atol=0, rtol=4 * tolerance)


# Products of float16 operands: relative errors of 2^-11 in queries, keys, weights and values of size one
HALF, SINGLE = 6e-3, 3e-5


@settings(max_examples=25)
@given(
    codec=st.sampled_from(sorted(CODECS)),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    group=st.sampled_from([1, 4, 8]),
    width=st.sampled_from([64, 96, 128]),
    block_size=st.sampled_from([16, 32, 64, 128]),
    tokens=st.sampled_from([1, 1, 2, 7]),
    splits=st.sampled_from([None, 1, 2, 5]),
)
def test_paged_attention_is_its_reference(codec, lengths, group, width, block_size, tokens, splits):
    cache = filled(CODECS[codec], lengths, width=width, block_size=block_size)
    tokens = min(tokens, *lengths)
    q = normal(np.random.default_rng(1), len(lengths), 2, group * tokens, width) / width**0.5
    ids, stored, seen, longest = arguments(cache, layer=1)
    schedule = splits and paged.Schedule(rows=16, tile=32, splits=splits)
    found = paged.attend_blocks(q, cache._storage, 1, ids, stored, seen, tokens, longest, schedule)
    expected = paged.reference(q, cache._storage, 1, ids, stored, seen, tokens)
    assert_partials_agree(found, expected, SINGLE if codec == "float32" else HALF)


@pytest.mark.parametrize("tokens", [1, 40])
def test_paged_attention_is_float64_attention(tokens):
    """Against nothing of kvlib: NumPy in float64 on the rows that were appended."""
    rng = np.random.default_rng(3)
    k, v = rng.standard_normal((2, 1, 2, 100, 64))
    q = rng.standard_normal((1, 8, tokens, 64))
    cache = kvlib.KVCache(kvlib.CacheSpec(2, 64, dtype="float32"), 1, 128, 16, backend="torch", device=DEVICE)
    cache.append(*(torch.from_numpy(x).to(DEVICE) for x in (k, v)))
    rows = torch.from_numpy(q / 8).float().reshape(1, 2, 4 * tokens, 64).to(DEVICE)
    found = paged.attend_blocks(rows, cache._storage, 0, *arguments(cache, 0)[:3], tokens, 100).normalise()

    scores = np.einsum("hgtd,hsd->hgts", q.reshape(2, 4, tokens, 64), k[0]) / 8
    scores[..., np.arange(100) > np.arange(100 - tokens, 100)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("hgts,hsd->hgtd", weights / weights.sum(-1, keepdims=True), v[0])
    np.testing.assert_allclose(found.cpu().numpy().reshape(expected.shape), expected, atol=SINGLE)


@settings(max_examples=25)
@given(
    bits=st.sampled_from([8, 4, 2]),
    group=st.sampled_from([None, 16, 32]),
    symmetric=st.booleans(),
    width=st.sampled_from([64, 96, 128]),
    block_size=st.sampled_from([1, 16, 64]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    size=st.sampled_from([0.0, 1e-6, 1.0, 900.0]),
    seed=st.integers(0, 99),
)
def test_appending_is_encoding_and_writing_to_the_bit(bits, group, symmetric, width, block_size, shape, size, seed):
    batch, heads, tokens = shape
    codec = kvlib.Int(bits, group_size=group, symmetric=symmetric)
    spec = kvlib.CacheSpec(heads, width, num_layers=2)
    found, expected = (
        kvlib.KVCache(spec, 1, 64, block_size, codec=codec, backend="torch", device=DEVICE)._storage.k for _ in "12"
    )
    rng = np.random.default_rng(seed)
    x = size * normal(rng, batch, heads, tokens, width)
    slots = torch.from_numpy(rng.permutation(64)[: batch * tokens].reshape(batch, tokens)).to(DEVICE)
    quantize.append_tokens(x, codec, found, 1, slots)
    quantize.reference(x, codec, expected, 1, slots)
    for name, plane in expected.items():
        assert torch.equal(found[name], plane), name


def test_channels_are_not_appended_token_by_token():
    with pytest.raises(ValueError, match="encodes tokens one by one, and int2 per channel/32 needs 32 at once"):
        quantize.append_tokens(torch.zeros(1, 1, 32, 8), kvlib.Int(2, "channel", 32), {}, 0, torch.zeros(1, 32))


# -- the cache uses them ----------------------------------------------------------------------------------------------


@pytest.fixture
def at_work(monkeypatch):
    """Kernels serve every torch cache, as they do on CUDA; a list of the calls."""
    used = []

    def noted(kernel):
        def call(*arguments):
            used.append(kernel.__name__)
            return kernel(*arguments)

        monkeypatch.setattr(calls, kernel.__name__, call)

    monkeypatch.setattr(kernels, "runs_on", lambda backend: backend.name == "torch")
    noted(paged.attend_blocks)
    noted(quantize.append_tokens)
    return used


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_cache_answers_the_same_with_and_without_kernels(name, tokens, at_work, monkeypatch):
    cache = filled(CODECS[name], [40, 17, 1 if tokens == 1 else 12])
    q = normal(np.random.default_rng(2), 3, 8, tokens, 64).half()
    at_work.clear()
    fused = cache.attend(q, layer=1)
    used = bool(at_work)
    monkeypatch.setattr(kernels, "runs_on", lambda backend: False)
    torch.testing.assert_close(fused.float(), cache.attend(q, layer=1).float(), atol=HALF, rtol=0)
    assert used or (tokens > 1 and cache.codec.tail)  # several queries behind closed groups see exact rows


@pytest.mark.parametrize("name", ["int8", "int4", "int4 symmetric", "int2"])
def test_the_cache_writes_the_same_bits_with_and_without_kernels(name, at_work, monkeypatch):
    with_kernels = filled(CODECS[name], [20, 3])
    assert at_work.count("append_tokens") == 2 * 2 * 2  # sequences, layers, K and V
    monkeypatch.setattr(kernels, "runs_on", lambda backend: False)
    without = filled(CODECS[name], [20, 3])
    for mine, its in zip(with_kernels._storage.arrays(), without._storage.arrays(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_numbers_that_cannot_be_stored_leave_the_cache_as_it_was(bad, at_work):
    cache = filled("int8", [5])
    before = [array.clone() for array in cache._storage.arrays()]
    k = torch.zeros(1, 2, 1, 64, device=DEVICE)
    k[0, 1, 0, 3] = bad
    with pytest.raises(ValueError, match="k must be finite"):
        cache.append(k, torch.zeros_like(k), 0, [0])
    assert all(torch.equal(a, b) for a, b in zip(before, cache._storage.arrays(), strict=True))
    assert cache.lengths == {0: 5}


def test_the_cache_says_which_way_it_goes(at_work, monkeypatch):
    cache = filled("int8", [30])
    q = torch.zeros(1, 2, 1, 64, device=DEVICE)
    assert cache.attend_path(q.half()) == "kernel"
    assert cache.attend_path(q).startswith("fold: queries of float32 are answered in that precision")
    spec = kvlib.CacheSpec(2, 64)
    others = {
        "a policy or a window hides": kvlib.KVCache(
            spec, 1, 64, 16, eviction=kvlib.SlidingWindow(8), backend="torch", device=DEVICE
        ),
        "no kernel reads mxfp4": kvlib.KVCache(spec, 1, 64, 16, codec="mxfp4", backend="torch", device=DEVICE),
        "V is a view of K": kvlib.KVCache(kvlib.CacheSpec(1, 64, latent=32), 1, 64, 16, backend="torch", device=DEVICE),
    }
    for reason, other in others.items():
        assert other.attend_path(q.half()).startswith(f"fold: {reason}")
    monkeypatch.setattr(kernels, "runs_on", lambda backend: False)
    assert cache.attend_path(q.half()) == "fold: kernels run on CUDA, with Triton"


def test_a_table_that_changed_is_sent_again(at_work):
    cache = filled("plain", [16, 16], block_size=16)
    q = normal(np.random.default_rng(5), 2, 2, 1, 64).half()
    first = cache.attend(q)
    cache._tables[0].ids[0], cache._tables[1].ids[0] = cache._tables[1].ids[0], cache._tables[0].ids[0]
    torch.testing.assert_close(cache.attend(q[[1, 0]]), first[[1, 0]], atol=HALF, rtol=0)


# -- what it asks memory for ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not kernels.interpreted(), reason="loads are counted in the interpreter")
@pytest.mark.parametrize("codec", ["plain", "int8", "int4", "int2", "kivi-2"])
@pytest.mark.parametrize("splits", [1, 3])
def test_each_stored_byte_is_asked_for_and_none_that_nobody_holds(codec, splits):
    """Of the blocks of the sequences all that is in use, of all others nothing, whatever the splits."""
    from kvlib.kernels.traffic import counted

    lengths = [64, 48]
    cache = filled(CODECS[codec], lengths, block_size=16)
    q = normal(np.random.default_rng(1), 2, 2, 4, 64)
    ids, stored, seen, longest = arguments(cache, layer=1)
    with counted() as traffic:
        paged.attend_blocks(q, cache._storage, 1, ids, stored, seen, 1, longest, paged.Schedule(16, 32, splits))
    share = int(stored.sum()) / (cache.num_blocks * 16)
    for plane in cache._storage.arrays():
        assert traffic.distinct(plane[0]) == 0
        assert traffic.distinct(plane[1]) == share * plane[1].nbytes


@pytest.mark.skipif(not kernels.interpreted(), reason="loads are counted in the interpreter")
def test_query_heads_that_share_a_key_ask_for_it_once():
    from kvlib.kernels.traffic import counted

    cache, asked = filled("plain", [64]), []
    for group in (1, 8):
        q = normal(np.random.default_rng(1), 1, 2, group, 64)
        with counted() as traffic:
            paged.attend_blocks(q, cache._storage, 0, *arguments(cache, 0)[:3], 1, 64, paged.Schedule(16, 32, 1))
        asked.append(traffic.lanes - q.nbytes)
    assert asked[0] == asked[1]


def test_every_kernel_compiles_for_cuda(root):
    """The interpreter runs what the compiler would refuse; the compiler needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "tests/unit/compile_kernels.py"],
        env=environment | {"PYTHONPATH": str(root)}, cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == 5 and all("cubin" in line for line in lines), done.stdout
