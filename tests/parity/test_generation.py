"""kvlib.generate: streaming, stopping, sampling, continuing a cache, and what it refuses."""

import numpy as np
import pytest

import kvlib
from kvlib.generation import sample


@pytest.fixture(scope="module")
def model(llama_path):
    return kvlib.Transformer.from_pretrained(llama_path)


@pytest.fixture(scope="module")
def byte_model(torch, transformers, tmp_path_factory):
    """A byte-level model with random weights: a hot temperature makes it speak every byte."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("bytes")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return kvlib.Transformer.from_pretrained(path)


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Counting:
    """The model, and how many tokens each call was given."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, tokens, *args, **options):
        self.calls.append(np.shape(tokens)[1])
        return self.model(tokens, *args, **options)


def test_it_streams(model):
    counting = Counting(model)
    stream = kvlib.generate(counting, PROMPT, 5)
    assert counting.calls == []
    next(stream)
    assert counting.calls == [8]
    assert len(list(stream)) == 4
    assert counting.calls == [8, 1, 1, 1, 1]


def test_without_a_cache_everything_is_computed_again(model):
    counting = Counting(model)
    assert list(kvlib.generate(counting, PROMPT, 5, cache=False)) == list(kvlib.generate(model, PROMPT, 5))
    assert counting.calls == [8, 9, 10, 11, 12]


def test_what_you_give_is_what_you_get(byte_model):
    ids = list(kvlib.generate(byte_model, list(b"ab"), 12))
    assert all(type(i) is int for i in ids)
    assert list(kvlib.generate(byte_model, np.array([97, 98]), 12)) == ids
    assert list(kvlib.generate(byte_model, b"ab", 12)) == [bytes([i]) for i in ids]
    assert "".join(kvlib.generate(byte_model, "ab", 12)) == bytes(ids).decode(errors="replace")


def test_text_comes_in_whole_characters(byte_model, monkeypatch):
    """The bytes of a character arrive one by one; it is handed on when it is complete."""
    script = iter("aé€😀b".encode() + "é".encode()[:1])
    monkeypatch.setattr("kvlib.generation.sample", lambda *_: next(script))
    assert list(kvlib.generate(byte_model, "x", 12)) == ["a", "é", "€", "😀", "b", "\ufffd"]


def test_stop(model, byte_model):
    ids = list(kvlib.generate(model, PROMPT, 20))
    third, first_time = ids[2], ids.index(ids[2])
    assert list(kvlib.generate(model, PROMPT, 20, stop=third)) == ids[: first_time + 1]
    assert list(kvlib.generate(model, PROMPT, 20, stop=ids[4:7])) == ids[:7]
    assert list(kvlib.generate(model, PROMPT, 20, stop=[*ids[4:6], (ids[6] + 1) % 128])) == ids
    text = list(kvlib.generate(byte_model, b"ab", 20))
    ending = b"".join(text[3:5])
    until = b"".join(kvlib.generate(byte_model, b"ab", 20, stop=ending))
    assert until.endswith(ending) and b"".join(text).startswith(until) and len(until) <= 5


def test_a_cache_is_continued(model):
    """Two halves of a prompt through one cache give what the whole prompt gives."""
    whole = list(kvlib.generate(model, PROMPT, 10))
    cache = kvlib.KVCache(model.spec, max_tokens=64, block_size=4)
    model([PROMPT[:5]], cache)
    assert list(kvlib.generate(model, PROMPT[5:], 4, cache=cache)) == whole[:4]
    assert cache.lengths == {0: len(PROMPT) + 3}  # the last token is not in it yet
    assert list(kvlib.generate(model, [whole[3]], 6, cache=cache)) == whole[4:]


def test_the_one_open_sequence_may_have_any_id(model):
    cache = kvlib.KVCache(model.spec, batch=2, max_tokens=64)
    cache.close(0)
    assert list(kvlib.generate(model, PROMPT, 4, cache=cache)) == list(kvlib.generate(model, PROMPT, 4))
    assert cache.lengths == {1: len(PROMPT) + 3}


def test_sampling_is_repeatable(model):
    def draw(**options):
        return list(kvlib.generate(model, PROMPT, 12, **options))

    assert draw(temperature=1.5, seed=1) == draw(temperature=1.5, seed=1)
    assert draw(temperature=1.5, seed=1) != draw(temperature=1.5, seed=2)
    assert draw(temperature=1.5, top_k=1) == draw(temperature=1e-6) == draw()


def test_sampling_follows_the_softmax():
    logits, rng = np.array([1.0, 3.0, 2.0, -50.0], np.float32), np.random.default_rng(0)
    draws = np.array([sample(logits, 2.0, None, rng) for _ in range(20_000)])
    expected = np.exp(logits / 2) / np.exp(logits / 2).sum()
    np.testing.assert_allclose(np.bincount(draws, minlength=4) / len(draws), expected, atol=0.02)
    top = np.array([sample(logits, 2.0, 2, rng) for _ in range(20_000)])
    expected = np.exp(logits[1:3] / 2) / np.exp(logits[1:3] / 2).sum()
    np.testing.assert_allclose(np.bincount(top, minlength=4)[1:3] / len(top), expected, atol=0.02)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(prompt=[]), ValueError, "prompt must be text or a flat sequence.*at least one token"),
        (dict(prompt=[[1, 2]]), ValueError, "prompt must be text or a flat sequence"),
        (dict(prompt=[[1], [2, 3]]), ValueError, "prompt must be text or a flat sequence"),
        (dict(prompt=[1.5]), TypeError, "prompt must hold integer token ids, got float64"),
        (
            dict(prompt=[128]),
            ValueError,
            "prompt holds ids from 128 to 128; the vocabulary runs from 0 to 127",
        ),
        (dict(prompt="text"), TypeError, r"tokens are bytes \(vocab_size 256\); this one has 128 tokens"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be an integer of at least 1, got 0"),
        (dict(max_new_tokens=2.5), ValueError, "max_new_tokens must be an integer"),
        (dict(temperature=-1), ValueError, "temperature must be a finite number of at least 0, got -1"),
        (dict(temperature=float("nan")), ValueError, "temperature must be a finite number"),
        (dict(top_k=0), ValueError, "top_k must be an integer of at least 1, got 0"),
        (dict(seed=-1), ValueError, "seed must be an integer of at least 0, got -1"),
        (dict(stop=500), ValueError, "stop holds ids from 500 to 500"),
        (dict(stop="\n"), TypeError, "stop may be text only"),
        (
            dict(cache=True),
            TypeError,
            "cache must be a KVCache, None for a new one or False for none, got bool",
        ),
    ],
)
def test_arguments_are_refused_at_once(model, options, error, message):
    with pytest.raises(error, match=message):
        kvlib.generate(model, **{"prompt": PROMPT, "max_new_tokens": 4, **options})  # no next()


def test_caches_are_refused_at_once(model):
    with pytest.raises(ValueError, match="exactly one open sequence to continue, and has 2"):
        kvlib.generate(model, PROMPT, 4, cache=kvlib.KVCache(model.spec, batch=2, max_tokens=64))
    small = kvlib.KVCache(model.spec, max_tokens=10)
    with pytest.raises(
        ValueError, match=r"holds 0 of at most 10 tokens.*prompt of 8 with 4 new.*max_tokens=12"
    ):
        kvlib.generate(model, PROMPT, 4, cache=small)
    assert len(list(kvlib.generate(model, PROMPT, 3, cache=small))) == 3  # the last one need not be stored
    with pytest.raises(ValueError, match=r"holds 10 of at most 10 tokens.*max_tokens=13"):
        kvlib.generate(model, [1], 2, cache=small)
