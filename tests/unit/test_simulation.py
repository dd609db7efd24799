"""Simulation: the scheduler decides the same whether there is a model or not, and hundreds of requests take seconds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib.engine import Engine
from kvlib.prefix import HashChain, RadixTree
from kvlib.scheduler import Batching
from kvlib.serving import Cost
from kvlib.simulation import BareCache, simulate
from kvlib.workloads import SHAREGPT, Lengths, Request, Traffic, Turn, conversations, requests
from tests.unit.serving_help import VOCAB, cache_of, check_step, tiny


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 16), st.integers(1, 12)), min_size=1, max_size=6),
    st.sampled_from([1, 3, 4, 8]),
    st.integers(0, 4),
    st.builds(
        Batching,
        st.integers(1, 20),
        st.integers(1, 6),
        st.sampled_from(["recompute", "swap"]),
        st.booleans(),
        st.booleans(),
    ),
)
def test_a_simulated_run_takes_the_steps_of_a_real_one(lengths, block_size, spare, rules):
    wishes = sorted(Request(float(arrival), prompt, output) for arrival, prompt, output in lengths)
    num_blocks = max(-(-(wish.total - 1) // block_size) for wish in wishes) + spare
    bare = simulate(wishes, num_blocks, block_size, rules, keep_tables=True)
    real = Engine(tiny(), cache_of(num_blocks, block_size), rules, keep_tables=True)
    for wish in wishes:
        real.add([1] * wish.prompt, wish.output, arrival=wish.arrival)
    real.run()
    assert bare.steps == real.steps


@pytest.mark.parametrize("index", [HashChain, RadixTree])
def test_shared_prefixes_are_simulated_too(index):
    turns = conversations(3, 2, system=9, message=Lengths(3, 0.5), answer=Lengths(3, 0.5), vocab=VOCAB, seed=4)
    turns = [Turn(chat, prompt, answer) for chat, prompt, answer in turns if len(prompt) + len(answer) < 33]
    bare = simulate(turns, 12, 4, Batching(token_budget=7), index, keep_tables=True)
    cache = cache_of(12, 4)
    real = Engine(tiny(), cache, Batching(token_budget=7), index(cache.pool, 4), bare.sample, keep_tables=True)
    for turn in turns:
        real.add(turn.prompt, len(turn.answer))
    real.run()
    assert bare.steps == real.steps
    assert bare.summary().reused_tokens > 0


@pytest.mark.parametrize("preempt", ["recompute", "swap"])
def test_many_requests(preempt):
    drawn = requests(Traffic(Lengths(60, 0.8), Lengths(40, 0.8), limit=400, rate=0.5), 150, seed=2)
    engine = simulate(drawn, 60, 16, Batching(preempt=preempt), cost=Cost(step=1.0, token=0.01))
    assert [(one.prompt, len(one.tokens)) for one in sorted(engine.finished)] == [(r.prompt, r.output) for r in drawn]
    found = engine.summary()
    assert found.preemptions > 5
    assert (found.recomputed_tokens > 0) == (preempt == "recompute")
    computed = sum(step.work.prefill + step.work.decode for step in engine.steps)
    assert computed == sum(r.total - 1 for r in drawn) + found.recomputed_tokens
    assert engine.cache.num_free_blocks == 60
    by_hand = sum(r.output for r in drawn) / (engine.clock - drawn[0].arrival)
    assert found.throughput == pytest.approx(by_hand)


def test_nobody_waits_for_the_slowest_of_a_batch():
    """Continuous batching serves the traffic of a chat faster than batches that wait (Orca, section 3)."""
    drawn = requests(SHAREGPT, 60)
    throughput = {
        static: simulate(drawn, 2000, 16, Batching(max_running=16, static=static)).summary().throughput
        for static in (False, True)
    }
    assert throughput[False] > 1.5 * throughput[True]


def test_lengths_have_no_prefix_to_share():
    with pytest.raises(ValueError, match="pass turns of `conversations`"):
        simulate([Request(0.0, 4, 4)], 8, 4, index=HashChain)


def test_a_bare_cache_is_a_cache_without_bytes():
    cache = BareCache(5, 4)
    assert cache._storage.k == cache._storage.v == {}
    a, b = cache.open(), cache.open()
    cache.extend([a, b], 6)
    with pytest.raises(kvlib.CacheFull, match="needs 2 more blocks, and 1 of 5"):
        cache.extend([a, b], 4)
    assert cache.lengths == {a: 6, b: 6}
    cache.extend([a, b], 2)
    assert cache.num_free_blocks == 1 and cache.computed(a) == 8
    holders = np.zeros(5, int)
    for seq in (a, b):
        holders[cache.block_table(seq)] += 1
    assert cache.pool.refs.tolist() == holders.tolist()


def test_what_holds_at_every_step_holds_here(monkeypatch):
    original = Engine.step

    def checked(self):
        step = original(self)
        if step is not None:
            check_step(self, step)
        return step

    monkeypatch.setattr(Engine, "step", checked)
    simulate(requests(Traffic(Lengths(20, 1), Lengths(9, 1), limit=60), 40), 12, 8, Batching(token_budget=16))
