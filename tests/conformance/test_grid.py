"""Every composition of the grid lives through the same story, and a shadow in float64 checks each step of it.

What a composition does must follow from its three settings alone: which tokens are there, how far each number may be
off, what attention over them is, and how many blocks that takes.
"""

import numpy as np
import pytest
import torch

import kvlib
from kvlib.eviction import SlidingWindow
from tests.conformance import compositions, reference
from tests.conformance.compositions import BACKENDS, BLOCKS, CODECS, GRID, POLICIES, Composition
from tests.conformance.shadow import host
from tests.conformance.story import Story
from tests.conformance.test_sequences import conserved

LAYERS = 2
SPEC = kvlib.CacheSpec(2, 32, LAYERS, "float32", v_head_dim=64)


def test_the_grid_is_whole():
    """As large as it says, nothing twice, and no setting of the library left out."""
    assert len(GRID) == len(set(GRID)) == len(BLOCKS) * len(CODECS) * len(POLICIES) * len(BACKENDS)
    assert compositions.size().endswith(f"= {len(GRID)} compositions")
    built = {repr(composition.cache(SPEC, 64).codec) for composition in GRID}
    assert len(built) == len(CODECS)
    for composition in GRID:
        cache = composition.cache(SPEC, 64)
        blocks = {"contiguous": 64, "16": 16, "least": cache.codec.group}
        assert cache.block_size == blocks[composition.block]
        assert cache.eviction == POLICIES[composition.policy]
        assert cache.backend.name == composition.backend


@pytest.mark.parametrize("composition", GRID, ids=str)
def test_every_composition(composition):
    """Prompts of different lengths, decoding in a batch, a fork, chunks, rollback, and the way out."""
    story = Story(composition, SPEC, batch=2, num_blocks=256 if composition.block == "least" else 24)
    story.append(23, seqs=[0])
    story.append(13, seqs=[1])
    story.append(6, seqs=[1])
    story.append(2, seqs=[1], attend=False)  # of these nobody asks anything …
    story.append(1, seqs=[1])
    for layer in range(LAYERS):
        story.attend(2, [1], layer)  # … and of these twice
    for _ in range(4):
        story.append(1)

    twin = story.fork(0)
    story.append(1, seqs=[twin])  # the fork goes first, and both write behind what they share
    story.append(9, seqs=[0, twin])
    for seq in (0, twin):  # a draft of which a part is taken back
        story.truncate(seq, story.shadows[seq].length - 5 - seq)
    story.append(1)
    story.check()

    story.truncate(twin, story.shadows[twin].length - 2)
    story.truncate(0, 21)
    story.check()
    story.append(3, seqs=[0, twin])
    story.append(1)
    story.check()

    blocks = set(story.cache.block_table(1))
    story.close(1)
    shared = set(story.cache.block_table(0)) | set(story.cache.block_table(twin))
    assert not blocks & shared
    for seq in (0, twin):
        story.close(seq)
    assert story.cache.num_free_blocks == story.cache.num_blocks
    conserved(story.cache)


# -- any chunking ----------------------------------------------------------------------------------

# What is stored depends on the tokens alone, unless a policy goes by what was attended, or chooses before each append.
UNCHUNKED = [c for c in GRID if c.policy in ("all", "window", "window, sinks") and c.block == "16"]


@pytest.mark.parametrize("composition", UNCHUNKED, ids=str)
def test_chunks_store_the_same_bits(composition):
    """Prefill encodes what decoding would have: 45 tokens at once, in pieces, and one at a time."""
    rng = np.random.default_rng(3)
    k, v, q = (rng.standard_normal((1, heads, 45, w)).astype(np.float32) for heads, w in ((2, 32), (2, 64), (4, 32)))
    k, v, q = (torch.from_numpy(x) if composition.backend == "torch" else x for x in (k, v, q))
    told = {}
    for sizes in ((45,), (20, 1, 1, 9, 14), (1,) * 45, (7, 31, 7)):
        cache, start = composition.cache(kvlib.CacheSpec(2, 32, 1, "float32", v_head_dim=64), 64), 0
        outs = []
        for size in sizes:
            cache.append(k[:, :, start : start + size], v[:, :, start : start + size])
            outs.append(cache.attend(q[:, :, start : start + size]))
            start += size
        rows, answers = cache.read(0), np.concatenate([host(out) for out in outs], axis=2)
        if not told:
            told = {"rows": [host(x) for x in rows[:2]], "positions": rows[2], "answers": answers}
        assert all(np.array_equal(host(x), y) for x, y in zip(rows, told["rows"], strict=False))
        assert np.array_equal(rows[2], told["positions"])
        assert np.abs(answers - told["answers"]).max() <= 1e-4 * np.abs(host(v)).max()
        last = host(cache.attend(q[:, :, -1:]))
        assert np.abs(last - told.setdefault("last", last)).max() <= 1e-4 * np.abs(host(v)).max()


@pytest.mark.parametrize("codec", list(CODECS))
def test_both_backends_store_the_same_bits(codec):
    rng = np.random.default_rng(4)
    k, v = (rng.standard_normal((1, 2, 45, width)).astype(np.float32) for width in (32, 64))
    stored = []
    for backend in BACKENDS:
        cache = Composition("16", codec, "all", backend).cache(kvlib.CacheSpec(2, 32, 1, "float32", v_head_dim=64), 64)
        cache.append(*((torch.from_numpy(x) for x in (k, v)) if backend == "torch" else (k, v)))
        planes = [cache.backend.to_numpy(x) for x in cache._storage.arrays()]
        stored.append([x.tobytes() for x in planes] + [host(x).tobytes() for x in cache.read(0)[:2]])
    assert stored[0] == stored[1]


# -- what attend can be asked for ------------------------------------------------------------------

# Every codec and every policy, but not each with each: what they have in common is tested above.
ASKED = [c for c in GRID if c.block == "16" and (c.policy in ("all", "h2o") or c.codec in ("float32", "kivi-2bit"))]


@pytest.mark.parametrize("composition", ASKED, ids=str)
@pytest.mark.parametrize("ask", [{"window": 5}, {"scale": 0.3, "sinks": True}], ids=str)
def test_windows_sinks_and_scales(composition, ask):
    story = Story(composition, SPEC, batch=1)
    settings = ask | ({"sinks": np.array([0.5, -3.0, 2.0, 9.0])} if "sinks" in ask else {})
    story.append(21, **settings)
    for _ in range(6):
        story.append(1, **settings)
    story.append(3, **settings)
    story.check()


LATENT = kvlib.CacheSpec(1, 96, LAYERS, "float32", latent=64)


VIEWED = [c for c in GRID if c.block == "16" and c.policy in ("all", "h2o", "window")]


@pytest.mark.parametrize("composition", VIEWED, ids=str)
def test_values_that_are_a_view_of_the_keys(composition):
    """Multi-head latent attention: one head, whose V is the first 64 of the 96 columns of its K."""
    story = Story(composition, LATENT, batch=2, num_blocks=24)
    story.append(22, seqs=[0])
    story.append(9, seqs=[1])
    for _ in range(4):
        story.append(1)
    twin = story.fork(0)
    story.append(3)
    story.truncate(twin, 19)
    story.append(2)
    story.check()


# -- budgets as large as the catalogue's -----------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, settings in kvlib.CATALOGUE.items() if "eviction" in settings])
def test_budgets_of_the_catalogue(name):
    """Small tests never reach them. After 4,500 tokens, steps: the budget to the token, freed blocks free."""
    spec = kvlib.CacheSpec(2, 8, 1, "float32")
    cache = kvlib.KVCache(spec, max_tokens=4600, num_blocks=300, **kvlib.CATALOGUE[name])
    policy = cache.eviction
    rng = np.random.default_rng(8)
    k, v, q = (rng.standard_normal((1, heads, 4505, 8)).astype(np.float32) for heads in (2, 2, 4))
    cache.append(k[:, :, :4500], v[:, :, :4500])
    cache.attend(q[:, :, 4500 - 64 : 4500])
    assert cache.num_free_blocks == 300 - 282  # 4,500 tokens in blocks of 16
    for step in range(4500, 4505):
        cache.append(k[:, :, step : step + 1], v[:, :, step : step + 1])
        out = cache.attend(q[:, :, step : step + 1])
        k_now, v_now, positions = cache.read(0)
        kept = policy.budget + (step - 4500 + 1 if policy.once else 0)
        positions = np.broadcast_to(positions, (2, kept))
        assert np.all(np.diff(positions) > 0)
        assert np.all(positions[:, -1] == step)
        assert len(cache.block_table(0)) == 300 - cache.num_free_blocks == -(-kept // 16)
        for head in (0, 1):
            assert np.array_equal(k_now[head], k[0, head, positions[head]])
            assert np.array_equal(v_now[head], v[0, head, positions[head]])
            if isinstance(policy, SlidingWindow):
                near = np.arange(step - policy.window + 1, step + 1)
                assert positions[head].tolist() == [*range(policy.sinks), *near.tolist()]
        heads = [reference.attention(q[0, 2 * h : 2 * h + 2, step : step + 1], k_now[[h]], v_now[[h]]) for h in (0, 1)]
        expected = np.concatenate(heads)
        assert np.abs(out[0] - expected).max() <= 2e-6 * np.abs(v).max()
