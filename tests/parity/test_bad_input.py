"""What the model refuses: a clear error, and the cache bit for bit as before."""

import numpy as np
import pytest

import kvlib


@pytest.fixture(params=["numpy", "torch"])
def model(request, llama_path):
    return kvlib.Transformer.from_pretrained(llama_path, request.param)


@pytest.fixture(params=[None, 8], ids=["contiguous", "paged"])
def cache(request, model):
    """Two sequences of 5 and 9 tokens."""
    cache = kvlib.KVCache(
        model.spec, batch=2, max_tokens=24, block_size=request.param, backend=model.backend.name
    )
    model([[1, 2, 3, 4, 5]], cache, seqs=[0])
    model([[9, 8, 7, 6, 5, 4, 3, 2, 1]], cache, seqs=[1])
    return cache


def contents(cache):
    read = [cache.read(seq, layer) for seq in cache.lengths for layer in range(cache.spec.num_layers)]
    return cache.lengths, cache.num_free_blocks, [np.asarray(x).tobytes() for parts in read for x in parts]


def refuses(model, cache, error, message, *args, **options):
    before = contents(cache)
    with pytest.raises(error, match=message):
        model(*args, **options)
    assert contents(cache) == before
    assert model([[1], [2]], cache).shape == (2, 1, 128)  # and it goes on working


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([1, 2], ValueError, r"tokens must be \(B, T\) with at least one token, got shape \(2,\)"),
        ([[[1], [2]]], ValueError, r"tokens must be \(B, T\).*got shape \(1, 2, 1\)"),
        (np.zeros((2, 0), int), ValueError, r"at least one token, got shape \(2, 0\)"),
        ([[1], [2, 3]], ValueError, "same number of new tokens"),
        ([[1.0], [2.0]], TypeError, "tokens must be integers, got float64"),
        ([[True], [False]], TypeError, "tokens must be integers, got bool"),
        ([["a"], ["b"]], TypeError, "tokens must be integers, got <U1"),
        ([[1], [128]], ValueError, "token 128 is outside the vocabulary: ids run from 0 to 127"),
        ([[1], [-1]], ValueError, "token -1 is outside the vocabulary"),
        ([[1]], ValueError, r"tokens has 1 rows for 2 sequences of the cache \(\[0, 1\]\)"),
        ([[1], [2], [3]], ValueError, "tokens has 3 rows for 2 sequences"),
        ([[1] * 16, [2] * 16], ValueError, "sequence 1 holds 9 tokens: 16 more would exceed max_tokens=24"),
    ],
)
def test_tokens(model, cache, tokens, error, message):
    refuses(model, cache, error, message, tokens, cache)


@pytest.mark.parametrize(
    ("seqs", "error", "message"),
    [
        ([0, 2], KeyError, r"sequences \[2\] are not open; open sequences: \[0, 1\]"),
        ([0, 0], ValueError, "none twice"),
        ([0], ValueError, "2 rows for 1 sequences"),
        ([0, 1.5], TypeError, "float"),
    ],
)
def test_sequences(model, cache, seqs, error, message):
    refuses(model, cache, error, message, [[1], [2]], cache, seqs=seqs)


def test_torch_tokens(model, cache, torch):
    refuses(model, cache, TypeError, "tokens must be integers, got float32", torch.zeros(2, 1), cache)
    tokens = torch.tensor([[3, 4], [5, 6]])
    np.testing.assert_allclose(
        *(np.asarray(model(t)) for t in (tokens, tokens.numpy().astype(np.uint8))), rtol=0, atol=0
    )


def test_sequences_without_a_cache(model):
    with pytest.raises(ValueError, match=r"seqs=.* names sequences of a cache, and there is none"):
        model([[1]], seqs=[0])


def test_something_that_is_no_cache(model):
    with pytest.raises(TypeError, match="cache must be a KVCache; a dict has no append, attend, lengths"):
        model([[1]], {})


@pytest.mark.parametrize(
    "change", [dict(num_layers=2), dict(num_layers=4), dict(num_kv_heads=4), dict(head_dim=8)]
)
def test_cache_of_another_model(model, change):
    """One layer too few would otherwise be noticed only when the others have stored their tokens."""
    import dataclasses

    other = kvlib.KVCache(
        dataclasses.replace(model.spec, **change), max_tokens=24, backend=model.backend.name
    )
    before = contents(other)
    with pytest.raises(ValueError, match="the cache was built for another model"):
        model([[1]], other)
    assert contents(other) == before


def test_cache_on_another_backend(model, torch):
    other = kvlib.KVCache(model.spec, backend="torch" if model.backend.name == "numpy" else "numpy")
    with pytest.raises(TypeError, match="k must be a"):
        model([[1]], other)
    assert other.lengths == {0: 0}


def test_full_pool(model):
    cache = kvlib.KVCache(
        model.spec, batch=2, max_tokens=32, block_size=8, num_blocks=4, backend=model.backend.name
    )
    model([[1] * 12, [2] * 12], cache)
    before = contents(cache)
    with pytest.raises(kvlib.CacheFull, match="needs 2 more blocks, and 0 of 4 are free"):
        model([[3] * 5, [4] * 5], cache)
    assert contents(cache) == before
    cache.close(1)
    assert model([[3] * 5], cache).shape == (1, 5, 128)
