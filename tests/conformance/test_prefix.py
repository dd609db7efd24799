"""A second request that opens upon the blocks of the first computes less and answers the same."""

import numpy as np
import pytest

import kvlib
from kvlib.codecs import KIVI
from kvlib.integers import Int
from kvlib.prefix import HashChain, RadixTree
from tests.conformance import bounds, reference
from tests.conformance.conftest import Setup
from tests.conformance.test_sequences import Text, contents

BOTH = pytest.mark.parametrize("index_class", [HashChain, RadixTree])
CODECS = pytest.mark.parametrize("codec", ["plain", "int8", Int(4, group_size=8), "fp8"], ids=str)
LAYERS = 2
PROMPT = list(range(100, 137))  # token i of a prompt has row i of the text, so equal tokens mean equal rows


def build(index_class, place="numpy", codec="plain", size=5, blocks=24):
    setup = Setup("paged", place, "float32")
    spec = setup.spec(num_layers=LAYERS)
    cache = setup.cache(spec, batch=0, block_size=size, num_blocks=blocks, max_tokens=60, codec=codec)
    return setup, cache, index_class(cache.pool, size)


def publish(cache, index, seq, tokens):
    return index.insert(tokens, cache.block_table(seq), cache.computed(seq))


@CODECS
@BOTH
@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize("shared", [36, 20, 3])
def test_a_second_request_opens_upon_the_blocks_of_the_first(index_class, codec, size, shared, place):
    """The first has 37 tokens; the second has ``shared`` of them, and 8 of its own. Then each goes its own way."""
    if place == "cuda" and codec != "plain":
        pytest.skip("the codecs have their own tests on CUDA")
    setup, cache, index = build(index_class, place, codec, size, blocks=60)
    text, other = Text(setup, LAYERS), Text(setup, LAYERS)
    other.rows[..., shared:, :] = np.random.default_rng(3).standard_normal(other.rows[..., shared:, :].shape)

    first = cache.open()
    text.append(cache, first, 0, 37)
    publish(cache, index, first, PROMPT)
    cache.close(first)
    assert cache.num_free_blocks == 60 - 37 // size

    prompt = [*PROMPT[:shared], *range(8)]
    found = index.match(prompt)
    assert len(found) == shared // size
    second = cache.open(blocks=found)
    assert cache.lengths[second] == len(found) * size
    assert cache.block_table(second) == found
    other.append(cache, second, len(found) * size, len(prompt))

    alone = setup.cache(cache.spec, batch=1, block_size=size, max_tokens=60, codec=codec)
    other.append(alone, 0, 0, len(prompt))
    assert contents(cache, second) == contents(alone, 0)
    q, given = setup.draw(np.random.default_rng(4), LAYERS, 1, 4, 6, cache.spec.head_dim)
    for layer in range(LAYERS):
        out = setup.host(cache.attend(given[layer], layer, seqs=[second]))
        assert np.array_equal(out, setup.host(alone.attend(given[layer], layer)))
        if codec == "plain":
            k, v = (reference.rounded(rows[0, :, : len(prompt)], "float32") for rows in other.rows[layer])
            expected = reference.attention(q[layer, 0], k, v)
            assert np.abs(out[0] - expected).max() <= bounds.ARITHMETIC["float32"] * np.abs(expected).max()

    # the first comes again, whole: its last token is computed, and the second has changed nothing
    found = index.match(PROMPT)
    assert len(found) == 36 // size
    third = cache.open(blocks=found)
    text.append(cache, third, len(found) * size, 37)
    alone.reset()
    text.append(alone, 0, 0, 37)
    assert contents(cache, third) == contents(alone, 0)


@BOTH
@pytest.mark.parametrize("length", [37, 30, 21, 12, 8])
def test_a_codec_that_keeps_the_newest_tokens_exact(index_class, length):
    """Of 37 tokens the last 8 (at least) are not in the blocks yet, so 28 are computed as far as an index is concerned.

    A shorter prompt wants its own last 8 exact: it takes no more of the blocks that match than that allows.
    """
    setup, cache, index = build(index_class, codec=KIVI(4, group=4, residual=8), size=4)
    text = Text(setup, LAYERS)
    first = cache.open()
    text.append(cache, first, 0, 37)
    assert len(publish(cache, index, first, PROMPT).blocks) == 7
    found = index.match(PROMPT[:length])[: (length - 8) // 4]
    second = cache.open(blocks=found)
    text.append(cache, second, 4 * len(found), length)
    alone = setup.cache(cache.spec, batch=1, block_size=4, max_tokens=60, codec=cache.codec)
    text.append(alone, 0, 0, length)
    assert len(found) == min(7, (length - 8) // 4)
    assert contents(cache, second) == contents(alone, 0)


@BOTH
def test_a_layer_that_is_behind_keeps_a_block_unpublished(index_class):
    setup, cache, index = build(index_class)
    text = Text(setup, LAYERS)
    seq = cache.open()
    text.append(cache, seq, 0, 37, layers=[0])
    assert cache.lengths[seq] == 37
    assert publish(cache, index, seq, PROMPT).blocks == []
    text.append(cache, seq, 0, 12, layers=[1])
    assert publish(cache, index, seq, PROMPT).blocks == cache.block_table(seq)[:2]
    assert index.match(PROMPT) == cache.block_table(seq)[:2]


@BOTH
def test_a_published_block_is_not_written_again(index_class):
    """Whoever truncates into it and writes on gets a copy: what was published stays what it was."""
    setup, cache, index = build(index_class)
    text = Text(setup, LAYERS)
    seq = cache.open()
    text.append(cache, seq, 0, 20)
    publish(cache, index, seq, PROMPT[:20])
    blocks = cache.block_table(seq)
    cache.truncate(seq, 12)
    text.append(cache, seq, 12, 20, plus=9.0)
    assert cache.block_table(seq)[:2] == blocks[:2]
    assert not set(cache.block_table(seq)[2:]) & set(blocks)
    again = cache.open(blocks=index.match([*PROMPT[:20], 0]))
    alone = setup.cache(cache.spec, batch=1, block_size=5, max_tokens=60)
    text.append(alone, 0, 0, 20)
    assert cache.block_table(again) == blocks
    assert contents(cache, again) == contents(alone, 0)


@BOTH
def test_a_cache_under_pressure(index_class):
    """Ten blocks for prompts of five: old ones go, answers stay, and a step that cannot be stored changes nothing."""
    setup, cache, index = build(index_class, blocks=10)
    text = Text(setup, LAYERS)
    alone = setup.cache(cache.spec, batch=1, block_size=5, max_tokens=60)
    rng, hits, full = np.random.default_rng(5), 0, 0
    for _ in range(120):
        start, stop = int(rng.choice([0, 0, 25])), int(rng.integers(30, 50))  # two kinds of prompt
        tokens = list(range(start, stop))
        found = index.match(tokens)
        hits += len(found)
        seq = cache.open(blocks=found)
        try:
            text.append(cache, seq, start + 5 * len(found), stop)
        except kvlib.CacheFull:
            full += 1
            assert cache.block_table(seq) == found
            assert index.match(tokens) == found
        else:
            publish(cache, index, seq, tokens)
            alone.reset()
            text.append(alone, 0, start, stop)
            assert contents(cache, seq) == contents(alone, 0)
        if len(cache.lengths) > 1:
            cache.close(min(cache.lengths))
        held = set().union(*(cache.block_table(seq) for seq in cache.lengths))
        published = set(np.flatnonzero(index._published).tolist())
        assert cache.num_free_blocks == 10 - len(held | published)
        assert index.num_blocks == len(published) == index.evictable + len(published & held)
    assert hits > 100
    assert full > 10
    cache.close(max(cache.lengths))
    kept = index.num_blocks
    assert 0 < kept == 10 - cache.num_free_blocks
    assert (index.evict(10), cache.num_free_blocks) == (kept, 10)


@BOTH
def test_a_real_model_answers_the_same(index_class):
    """tinylm, a question after a common beginning: the logits of what is left to compute, with and without reuse."""
    model = kvlib.tinylm()
    beginning = "def add(first, second):\n    return first + second\n"
    one, two = (list((beginning + end).encode()) for end in ("\nprint(add(1, 2))", "\nassert add(3, 4) == 7"))
    cache = kvlib.KVCache(model.spec, batch=0, max_tokens=96, block_size=16, num_blocks=12)
    index = index_class(cache.pool, 16)
    seq = cache.open()
    model(np.array([one]), cache)
    publish(cache, index, seq, one)
    cache.close(seq)

    found = index.match(two)
    assert len(found) == len(beginning) // 16 >= 3
    cache.open(blocks=found)
    logits = model(np.array([two[16 * len(found) :]]), cache)
    expected = model(np.array([two]), None)[:, 16 * len(found) :]
    scale = np.abs(expected).max()
    assert np.abs(np.asarray(logits, np.float64) - expected).max() <= 1e-5 * scale


@BOTH
def test_what_was_computed_twice_is_kept_once(index_class):
    """Two requests with the same tokens run side by side; the second adopts the blocks that the first published."""
    setup, cache, index = build(index_class)
    text = Text(setup, LAYERS)
    seqs = [cache.open(), cache.open()]
    for seq in seqs:
        text.append(cache, seq, 0, 37)
    publish(cache, index, seqs[0], PROMPT)
    free = cache.num_free_blocks
    before = contents(cache, seqs[1])
    published = publish(cache, index, seqs[1], PROMPT)
    cache.adopt(seqs[1], published.blocks)
    assert cache.block_table(seqs[1])[:7] == cache.block_table(seqs[0])[:7]
    assert cache.num_free_blocks == free + 7
    assert contents(cache, seqs[1]) == before
    for seq in seqs:
        cache.close(seq)
    assert cache.num_free_blocks == cache.num_blocks - 7
    assert index.evictable == 7


@BOTH
def test_adopting_more_than_was_computed(index_class):
    setup, cache, _ = build(index_class)
    text = Text(setup, LAYERS)
    first, second = cache.open(), cache.open()
    text.append(cache, first, 0, 20)
    text.append(cache, second, 0, 14)
    before = cache.block_table(second)
    with pytest.raises(ValueError, match="14 computed tokens, too few to adopt 3 blocks of 5"):
        cache.adopt(second, cache.block_table(first)[:3])
    with pytest.raises(ValueError, match="they are free"):
        cache.adopt(second, [23])
    assert cache.block_table(second) == before


@BOTH
def test_reset_empties_the_index_too(index_class):
    setup, cache, index = build(index_class)
    seq = cache.open()
    Text(setup, LAYERS).append(cache, seq, 0, 37)
    publish(cache, index, seq, PROMPT)
    cache.reset()
    assert cache.num_free_blocks == cache.num_blocks
    assert index.num_blocks == 0
    assert index.match(PROMPT) == []
    seq = cache.open()
    Text(setup, LAYERS).append(cache, seq, 0, 7)
    assert cache.block_table(seq) == [0, 1]  # in the order of ids, as at first


@BOTH
def test_blocks_that_somebody_holds_outlive_a_reset(index_class):
    setup, cache, index = build(index_class)
    seq = cache.open()
    Text(setup, LAYERS).append(cache, seq, 0, 37)
    held = publish(cache, index, seq, PROMPT).blocks[:2]
    cache.pool.share(held)
    cache.reset()
    assert index.match(PROMPT)[:2] == held
    cache.pool.release(held)
    cache.reset()
    assert cache.num_free_blocks == cache.num_blocks
