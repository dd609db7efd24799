"""Every family, backend and cache against transformers: logits, greedy generations, ragged batches."""

import numpy as np
import pytest

import kvlib

from .conftest import PLACES, loaded, logits_of

TOLERANCE = 1e-4  # absolute, on float32 logits of a few units
CACHES = {"contiguous": {}, "paged": {"block_size": 16}}


@pytest.fixture(params=PLACES)
def model(request, reference, torch):
    return loaded(reference, request.param, torch)


def new_cache(model, kind: str, batch: int = 1) -> kvlib.KVCache | None:
    if kind == "none":
        return None
    where = {"backend": model.backend.name, "device": model.backend.device}
    return kvlib.KVCache(model.spec, batch, max_tokens=128, **where, **CACHES[kind])


@pytest.fixture(params=CACHES)
def make_cache(request, model):
    return lambda batch=1: new_cache(model, request.param, batch)


@pytest.fixture(params=["none", *CACHES])
def any_cache(request, model):
    return new_cache(model, request.param)


def test_the_reference_says_something(reference, torch):
    """Generations that repeat one token, or hang on a near tie, would prove nothing."""
    assert len(set(reference.generated)) >= 15
    tokens = torch.tensor([reference.prompt[0].tolist() + reference.generated])
    with torch.no_grad():
        best = reference.model(tokens).logits[0, reference.prompt.shape[1] - 1 : -1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 10 * TOLERANCE


def test_every_parameter_matters(reference, torch):
    """Otherwise a model that drops a bias or a norm would pass."""
    prompt = torch.from_numpy(reference.prompt)
    for name, parameter in reference.model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(torch.ones_like(kept) if "norm" in name else torch.zeros_like(kept))
            changed = reference.model(prompt).logits[0].numpy()
            parameter.copy_(kept)
        change = abs(changed - reference.logits).max()
        # a bias of K shifts every score of a row alike, and softmax forgets it, but for the rotation
        assert change > 10 * TOLERANCE, f"{name} changes the logits by only {change}"


def test_one_pass(model, any_cache, reference, record_property):
    got = logits_of(model, reference.prompt, any_cache)[0]
    record_property("max_difference", float(abs(got - reference.logits).max()))
    np.testing.assert_allclose(got, reference.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunks", [(60,), (23, 1, 30, 1, 1, 4), (1,) * 60], ids=["whole", "mixed", "single"])
def test_chunks(model, make_cache, reference, chunks):
    """Prefill in chunks, then decode, beside transformers' DynamicCache."""
    cache = make_cache()
    pieces = np.split(reference.prompt, np.cumsum(chunks)[:-1], axis=1)
    got = np.concatenate([logits_of(model, piece, cache)[0] for piece in pieces])
    np.testing.assert_allclose(got, reference.cached_logits, rtol=0, atol=TOLERANCE)


def test_greedy_generation(model, any_cache, reference):
    prompt, new = reference.prompt[0].tolist(), len(reference.generated)
    got = kvlib.generate(model, prompt, new, cache=False if any_cache is None else any_cache)
    assert list(got) == reference.generated == reference.recomputed


def test_last_only(model, any_cache, reference):
    got = logits_of(model, reference.prompt, any_cache, last_only=True)
    assert got.shape == (1, 1, reference.logits.shape[-1])
    np.testing.assert_allclose(got[0, 0], reference.logits[-1], rtol=0, atol=TOLERANCE)


def test_ragged_batch(model, make_cache, reference):
    """Two sequences of unequal length decoded in one call, against transformers one at a time."""
    cache = make_cache(batch=2)
    tokens, cuts = reference.prompt[0], (13, 40)
    for seq, cut in enumerate(cuts):
        logits_of(model, tokens[None, :cut], cache, seqs=[seq])
    for step in range(20):
        got = logits_of(model, [[tokens[cut + step]] for cut in cuts], cache)
        for seq, cut in enumerate(cuts):
            np.testing.assert_allclose(got[seq, 0], reference.logits[cut + step], rtol=0, atol=TOLERANCE)
    assert cache.lengths == {0: 33, 1: 60}
    swapped = logits_of(model, [[5], [7]], cache, seqs=[1, 0])  # rows follow seqs, not the order of opening
    fresh = [logits_of(model, [[*tokens[:33], 7]])[0, -1], logits_of(model, [[*tokens, 5]])[0, -1]]
    np.testing.assert_allclose(swapped[:, 0], fresh[::-1], rtol=0, atol=TOLERANCE)


def test_batch_without_cache(model, reference):
    tokens = np.concatenate([reference.prompt, reference.prompt[:, ::-1]])
    got = logits_of(model, tokens)
    np.testing.assert_allclose(got[0], reference.logits, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got[1], logits_of(model, tokens[1:])[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_torch(reference, torch, transformers, dtype):
    """Rounding weights and activations costs kvlib no more than it costs transformers."""
    half = transformers.AutoModelForCausalLM.from_pretrained(reference.path, dtype=getattr(torch, dtype))
    with torch.no_grad():
        theirs = half(torch.from_numpy(reference.prompt)).logits[0].float().numpy()
    model = kvlib.Transformer.from_pretrained(reference.path, "torch", dtype=dtype)
    cache = kvlib.KVCache(model.spec, max_tokens=64, backend="torch")
    ours = logits_of(model, reference.prompt, cache)[0]
    assert model.spec.dtype == dtype

    def error(logits: np.ndarray) -> float:
        return float(np.sqrt(np.mean((logits - reference.logits) ** 2)))

    assert 0 < error(ours) < 1.2 * error(theirs), (error(ours), error(theirs))
