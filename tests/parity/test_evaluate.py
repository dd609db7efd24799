"""What the measuring functions say, against transformers' losses, `kvlib.generate` and attention in float64."""

import dataclasses

import numpy as np
import pytest

import kvlib
from kvlib import evaluate
from kvlib.codecs import KIVI, Int, Plain
from kvlib.eviction import HeavyHitter, SlidingWindow, SnapKV
from kvlib.generation import TINYLM

IDS = evaluate.windows(evaluate.heldout_text(), 160)[[3, 50, 120]]


@pytest.fixture(scope="module")
def model():
    return kvlib.tinylm()


@pytest.fixture(scope="module")
def questions():
    return [q for q in evaluate.recall_questions() if q.distance <= 256][::13]


@pytest.fixture(scope="module")
def theirs(torch, transformers):
    """transformers' bits for each token, and its attention weights, layer by layer (B, Hq, T, T)."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        TINYLM, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        out = reference(ids, output_attentions=True)
    logits = out.logits[:, :-1].double().swapaxes(1, 2)
    bits = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none") / np.log(2)
    return bits.numpy(), [weights.double().numpy() for weights in out.attentions]


@pytest.mark.parametrize("settings", [{}, {"chunk": 1}, {"chunk": 7, "batch": 2}, {"chunk": 500, "codec": "float32"}])
def test_bits_are_those_of_transformers(model, theirs, settings):
    bits = evaluate.text_bits(model, IDS, **settings)
    np.testing.assert_allclose(bits, theirs[0], atol=0.05)  # a cache in float16 moves single tokens by that
    assert bits.mean() == pytest.approx(theirs[0].mean(), abs=1e-3)


def test_a_prompt_is_read_and_not_counted(model):
    whole = evaluate.text_bits(model, IDS, codec="float32")
    np.testing.assert_allclose(evaluate.text_bits(model, IDS, 9, prompt=100, codec="float32"), whole[:, 99:], atol=1e-3)


def test_settings_reach_the_cache(model):
    whole = evaluate.text_bits(model, IDS)
    assert evaluate.text_bits(model, IDS, codec="int2").mean() > whole.mean() + 0.05
    short = evaluate.text_bits(model, IDS, eviction=SlidingWindow(10))
    np.testing.assert_allclose(short[:, :10], whole[:, :10], atol=1e-9)
    assert short.mean() > whole.mean() + 0.05


def test_the_choice_after_a_prompt_falls_at_its_end(model):
    """SnapKV keeps 40 tokens of a prompt of 120; the first bits after it are as if nothing were gone."""
    whole, chosen = (
        evaluate.text_bits(model, IDS, prompt=120, eviction=policy) for policy in (None, SnapKV(40, window=16))
    )
    np.testing.assert_allclose(chosen[:, 0], whole[:, 0], atol=1e-9)
    assert abs(chosen[:, 1:] - whole[:, 1:]).max() > 0.01


@pytest.mark.parametrize("case", [{"chunk": 0}, {"prompt": 159}, {"prompt": -1}])
def test_nothing_left_to_read(model, case):
    with pytest.raises(ValueError, match="two tokens must come after the prompt"):
        evaluate.text_bits(model, IDS, **case)


def test_windows():
    assert evaluate.windows(b"abcdefgh", 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    assert evaluate.windows(b"abcdefgh", 3, stride=5).tolist() == [[97, 98, 99], [102, 103, 104]]
    with pytest.raises(ValueError, match="8 bytes, and one window takes 9"):
        evaluate.windows(b"abcdefgh", 9)


@pytest.mark.parametrize("settings", [{}, {"codec": "int2"}, {"codec": KIVI(2)}, {"eviction": SnapKV(20, window=10)}])
def test_recall_is_what_generate_says(model, questions, settings):
    spec = dataclasses.replace(model.spec, dtype="float16")
    said = []
    for question in questions:
        cache = kvlib.KVCache(spec, max_tokens=512, **settings)
        said.append("".join(kvlib.generate(model, question.prompt, len(question.answer), cache=cache)))
    expected = [text == question.answer for text, question in zip(said, questions, strict=True)]
    assert evaluate.recall(model, questions, batch=3, **settings).tolist() == expected
    assert any(expected)
    assert settings.get("codec") != "int2" or not all(expected)  # so the comparison is of hits and misses


def test_recall_in_chunks_and_apart(model, questions):
    hits = evaluate.recall(model, questions)
    assert hits.mean() > 0.6
    for how in ({"chunk": 16}, {"apart": True}, {"chunk": 5, "apart": True, "batch": 4}):
        assert evaluate.recall(model, questions, **how).tolist() == hits.tolist()


def test_a_question_that_comes_apart_is_not_in_the_choice(model, questions):
    """The prompt is cut before its last line; the choice falls when the first byte of that line is appended."""
    policy, found = SnapKV(60, window=20), []
    for question in questions[:4]:
        context, asked = (question.prompt[:-7], question.prompt[-7:])
        assert context.endswith("\n") and asked.startswith("key_")
        cache = kvlib.KVCache(dataclasses.replace(model.spec, dtype="float16"), max_tokens=512, eviction=policy)
        model([list(context.encode())], cache)
        for byte in asked[:-1].encode():
            model([[byte]], cache)
        found.append("".join(kvlib.generate(model, asked[-1], 4, cache=cache)) == question.answer)
    assert evaluate.recall(model, questions[:4], apart=True, eviction=policy).tolist() == found


def test_recorded_heads_give_the_weights_of_transformers(model, theirs):
    for heads, weights in zip(evaluate.record(model, IDS), theirs[1], strict=True):
        assert heads.q.shape == (3, 8, 160, 32) and heads.k.shape == heads.v.shape == (3, 2, 160, 32)
        np.testing.assert_allclose(dense_weights(heads), weights, atol=2e-3)


def dense_weights(heads, window=10**6):
    q, k = heads.q.astype(np.float64), np.repeat(heads.k.astype(np.float64), 4, axis=1)
    ages = np.arange(q.shape[2])[:, None] - np.arange(q.shape[2])
    scores = np.where((ages >= 0) & (ages < window), q @ k.swapaxes(-1, -2) / np.sqrt(32), -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("prompt", [0, 64])
def test_output_error_of_a_window(model, prompt):
    """A window hides old tokens and rounds nothing: so attention in float64 gives the same error."""
    heads = evaluate.record(model, IDS)[1]
    v = np.repeat(heads.v.astype(np.float64), 4, axis=1)
    outputs = [(dense_weights(heads, window) @ v)[:, :, prompt:] for window in (30, 10**6)]
    expected = np.sqrt(((outputs[0] - outputs[1]) ** 2).sum((0, 2, 3)) / (outputs[1] ** 2).sum((0, 2, 3)))
    window = SlidingWindow(30)
    found = evaluate.output_error(heads, prompt=prompt, codec="float32", eviction=window)
    assert found.shape == (8,)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert evaluate.output_error(heads, prompt=prompt, codec="float32").max() < 1e-6


def test_an_exact_tail_and_a_budget_that_hold_everything_cost_nothing(model):
    heads = evaluate.record(model, IDS)[0]
    assert evaluate.output_error(heads, codec=KIVI(2, residual=160)).max() < 1e-3  # the tail is in float16
    assert evaluate.output_error(heads, codec=KIVI(2, residual=32)).min() > 0.01
    assert evaluate.output_error(heads, eviction=HeavyHitter(160)).max() < 1e-3


def test_rounding_error():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((3, 2, 70, 32)).astype(np.float32) * np.array([[[1]], [[5]]], np.float32)
    assert evaluate.rounding_error(Plain("float32"), rows).tolist() == [0, 0]
    # rounding to steps of a Gaussian row's range: step / sqrt(12) of a standard deviation of 1, whatever the scale
    steps = np.ptp(rows / np.array([[[1]], [[5]]]), axis=-1).mean() / 255
    np.testing.assert_allclose(evaluate.rounding_error(Int(8), rows), steps / np.sqrt(12), rtol=0.1)
    channel = Int(8, "channel", 32)
    expected = evaluate.rounding_error(channel, rows[:, :, :64])
    np.testing.assert_array_equal(evaluate.rounding_error(channel, rows), expected)  # 70 tokens are two groups
