"""Continuous batching: the same tokens as alone whatever the schedule, no block lost, nobody forgotten."""

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlib
from kvlib.codecs import Int, Split
from kvlib.engine import Engine, greedy
from kvlib.eviction import SlidingWindow
from kvlib.metrics import summarise
from kvlib.model import Transformer
from kvlib.prefix import HashChain, RadixTree
from kvlib.scheduler import Batching, Scheduler
from kvlib.serving import Cost, Request, Work
from kvlib.simulation import BareCache
from tests.unit.serving_help import LONGEST, VOCAB, Wish, alone, cache_of, served, tiny

GROUPED = Split(Int(8, "channel", 4), Int(8, "token", 4), residual=3)


@st.composite
def situations(draw) -> tuple[list[Wish], dict[str, Any], int, Batching, Any]:
    """Requests with beginnings in common, a cache that holds the longest of them and little more, rules, an index."""
    trunk = draw(st.lists(st.integers(0, VOCAB - 1), min_size=12, max_size=12))
    wishes = []
    for _ in range(draw(st.integers(1, 6))):
        own = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8))
        prompt = tuple(trunk[: draw(st.integers(0, 12))] + own)
        stop = tuple(draw(st.sets(st.integers(0, VOCAB - 1), max_size=1)))
        wishes.append(Wish(prompt, draw(st.integers(1, 12)), stop, float(draw(st.integers(0, 12)))))
    block_size = draw(st.sampled_from([1, 3, 4, 8, None]))
    codec = draw(st.sampled_from(["plain", "int8", *([GROUPED] if block_size in (4, 8, None) else [])]))
    least = max(-(-wish.longest // (block_size or LONGEST)) for wish in wishes)
    rules = Batching(
        token_budget=draw(st.integers(1, 16)),
        max_running=draw(st.integers(1, 6)),
        preempt=draw(st.sampled_from(["recompute", "swap"])),
        reserve=draw(st.booleans()),
        static=draw(st.integers(0, 4)) == 0,
    )
    index = draw(st.sampled_from([None] if codec is GROUPED else [None, HashChain, RadixTree]))
    return wishes, {"block_size": block_size, "codec": codec}, least + draw(st.integers(0, 5)), rules, index


@given(situations())
def test_everybody_gets_the_tokens_that_they_would_get_alone(situation):
    wishes, how, num_blocks, rules, index = situation
    cache = cache_of(num_blocks, **how)
    engine = Engine(tiny(), cache, rules, index and index(cache.pool, cache.block_size))
    assert served(engine, wishes) == [alone(wish, **how) for wish in wishes]
    assert not cache.lengths
    if rules.reserve or rules.static:
        assert not any(step.preempted for step in engine.steps)

    # nobody starves: a step moves the oldest on by a token at least, and nobody takes a place from an older one
    order = sorted(engine.finished, key=lambda one: (one.arrival, one.id))
    latest = 0.0
    for one in order:
        latest = max(latest, np.ceil(one.arrival)) + wishes[one.id].longest
        assert one.times[-1] <= latest


@settings(max_examples=15)
@given(situations())
def test_two_runs_are_the_same(situation):
    wishes, how, num_blocks, rules, index = situation
    runs = []
    for _ in range(2):
        cache = cache_of(num_blocks, **how)
        engine = Engine(tiny(), cache, rules, index and index(cache.pool, cache.block_size), keep_tables=True)
        served(engine, wishes)
        runs.append((engine.steps, engine.finished))
    assert runs[0] == runs[1]


# -- schedules that can be followed by hand ----------------------------------------------------------


def prompts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, VOCAB, n).tolist()) for n in lengths]


def test_decodes_go_first_and_chunks_take_the_rest():
    a, b = prompts(3, 10)
    engine = Engine(tiny(), cache_of(20), Batching(token_budget=5))
    served(engine, [Wish(a, 5), Wish(b, 2)])
    assert [(step.prefill, step.decode) for step in engine.steps] == [
        (((1, 2), (0, 3)), ()),
        (((1, 4),), (0,)),
        (((1, 4),), (0,)),  # … whose last chunk gives b its first token
        ((), (0, 1)),
        ((), (0,)),
    ]
    assert [step.finished for step in engine.steps] == [(), (), (), (1,), (0,)]
    assert [one.times for one in engine.finished] == [(3.0, 4.0), (1.0, 2.0, 3.0, 4.0, 5.0)]


@pytest.mark.parametrize("preempt", ["recompute", "swap"])
def test_the_youngest_leaves_and_comes_back(preempt):
    """Prompts of two blocks and of one: both want another, one is free, and the younger leaves."""
    a, b = prompts(8, 4)
    wishes = [Wish(a, 9), Wish(b, 6)]
    engine = Engine(tiny(), cache_of(4, 4), Batching(preempt=preempt))
    assert served(engine, wishes) == [alone(wish, block_size=4) for wish in wishes]
    (leaving,) = [step for step in engine.steps if step.preempted]
    assert leaving.preempted == leaving.waiting == (1,)
    assert leaving.swapped_out == ((1,) if preempt == "swap" else ())
    (back,) = [step for step in engine.steps[1:] if step.admitted]
    assert back.swapped_in == leaving.swapped_out
    assert [one.recomputed for one in sorted(engine.finished)] == [0, 0 if preempt == "swap" else 4]
    assert leaving.work.swapped == back.work.swapped == (4 if preempt == "swap" else 0)


@pytest.mark.parametrize("preempt", ["recompute", "swap"])
def test_preempted_in_the_middle_of_its_prompt(preempt):
    a, b = prompts(4, 16)
    engine = Engine(tiny(), cache_of(6, 4), Batching(token_budget=2, preempt=preempt))
    halfway = []
    preempt_one = engine.scheduler._preempt

    def seen(request, turn):
        halfway.append((request.id, request.computed))
        preempt_one(request, turn)

    engine.scheduler._preempt = seen
    wishes = [Wish(a, 20), Wish(b, 3)]
    assert served(engine, wishes) == [alone(wish, block_size=4) for wish in wishes]
    assert halfway and all(id == 1 and 0 < computed < 16 for id, computed in halfway)


def test_static_batches_wait_for_their_slowest():
    wishes = [Wish(p, new) for p, new in zip(prompts(4, 4, 4, 4), (12, 2, 12, 2), strict=True)]
    runs = {}
    for static in (False, True):
        engine = Engine(tiny(), cache_of(40), Batching(max_running=2, static=static))
        assert served(engine, wishes) == [alone(wish, block_size=4) for wish in wishes]
        runs[static] = engine
    assert runs[True].summary().seconds == 24
    assert runs[False].summary().seconds == 14  # 2 + 12 beside 12, and the last one beside the third
    admissions = [step.admitted for step in runs[True].steps if step.admitted]
    assert admissions == [(0, 1), (2, 3)]


def test_a_static_batch_is_admitted_whole_though_its_prompts_take_several_steps():
    engine = Engine(tiny(), cache_of(40), Batching(token_budget=4, static=True))
    served(engine, [Wish(p, 2) for p in prompts(6, 6, 6)])
    assert engine.steps[0].admitted == (0, 1, 2) and engine.steps[0].prefill == ((0, 4),)


def test_a_prompt_of_one_token_is_no_decode():
    """It does not jump ahead of an older prompt that is still being read."""
    engine = Engine(tiny(), cache_of(40), Batching(token_budget=1, static=True))
    served(engine, [Wish(p, 1) for p in prompts(3, 1)])
    assert [step.prefill for step in engine.steps] == [((0, 1),), ((0, 1),), ((0, 1),), ((1, 1),)]


def standing(num_blocks: int, *states: tuple[int, int, int], budget: int = 8) -> tuple[Scheduler, list[Request]]:
    """A scheduler over blocks of 4, and who runs: (tokens of the prompt, tokens that are there, tokens computed)."""
    cache = BareCache(num_blocks, 4)
    scheduler = Scheduler(cache, Batching(token_budget=budget))
    for id, (prompt, there, computed) in enumerate(states):
        request = Request(id, 0.0, [1] * prompt, 20, frozenset())
        request.tokens += [1] * (there - prompt)
        request.seq = cache.open()
        cache.extend([request.seq], computed)
        request.advance(computed)
        scheduler.running.append(request)
    return scheduler, scheduler.running[:]


def test_who_leaves_gives_back_the_budget_too():
    """After a step that failed, a prompt may be older than a decode: it takes the block of one that was to run."""
    scheduler, (older, younger) = standing(2, (8, 8, 4), (3, 4, 3))
    turn = scheduler.schedule()
    assert turn.work == {older: 4} and turn.preempted == [younger]
    assert turn.budget == 4 and turn.taken == 1 and list(scheduler.waiting) == [younger]


def test_behind_a_prompt_that_blocks_cut_short_the_younger_wait():
    """The younger one has room in its own block; but it would decode before the older has been read."""
    scheduler, (older, younger) = standing(3, (12, 12, 4), (4, 4, 2), budget=20)
    turn = scheduler.schedule()
    assert turn.work == {older: 4} and scheduler.running == [older, younger]


def test_a_prompt_that_was_served_is_found():
    (prompt,) = prompts(14)
    cache = cache_of(20)
    engine = Engine(tiny(), cache, Batching(), HashChain(cache.pool, 4))
    wishes = [Wish(prompt, 4), Wish(prompt, 4, arrival=9.0), Wish((*prompt[:9], 0, 1), 4, arrival=9.0)]
    assert served(engine, wishes) == [alone(wish, block_size=4) for wish in wishes]
    assert [one.reused for one in sorted(engine.finished)] == [0, 12, 8]
    (second,) = [step for step in engine.steps if step.reused]
    assert second.reused == ((1, 12), (2, 8)) and dict(second.prefill) == {1: 2, 2: 3}
    others = Wish(prompts(5, seed=1)[0], 1, arrival=20.0)
    engine.add(*others)
    assert engine.step().kept_blocks == engine.scheduler.index.num_blocks - 1  # all but the first of the new one


def test_what_two_compute_at_once_is_kept_once():
    (prompt,) = prompts(12)
    cache = cache_of(20)
    engine = Engine(tiny(), cache, Batching(), RadixTree(cache.pool, 4), keep_tables=True)
    served(engine, [Wish(prompt, 3), Wish(prompt, 3)])
    (_, first), (_, second) = engine.steps[1].tables
    assert first[:3] == second[:3] and first[3] != second[3]


def test_an_exact_tail_and_reuse_work_together():
    (prompt,) = prompts(15)
    cache = cache_of(20, codec=GROUPED)
    engine = Engine(tiny(), cache, Batching(), HashChain(cache.pool, 4))
    served(engine, [Wish(prompt, 4), Wish(prompt, 4, arrival=9.0)])
    assert [one.reused for one in sorted(engine.finished)] == [0, 12]  # all but the last three, by whole blocks


def test_the_clock_waits_for_who_comes_late():
    engine = Engine(tiny(), cache_of(20), cost=Cost(step=0.5, token=0.25))
    (prompt,) = prompts(4)
    served(engine, [Wish(prompt, 2, arrival=10.0)])
    assert [(step.clock, step.seconds) for step in engine.steps] == [(10.0, 1.5), (11.5, 0.75)]
    assert engine.finished[0].time_to_first_token == 1.5
    assert engine.finished[0].time_per_output_token == 0.75


def test_the_cost_of_what_moves():
    assert Cost(1.0, 0.1, 0.01, 0.001)(Work(prefill=3, decode=2, context=7, swapped=9)) == pytest.approx(1.579)


def test_figures_of_a_run_by_hand():
    a, b = prompts(3, 3)
    engine = Engine(tiny(), cache_of(20), Batching(max_running=1))
    served(engine, [Wish(a, 3), Wish(b, 1)])
    found = engine.summary()
    assert found == summarise(engine.finished, engine.steps)
    assert found._asdict() == dict(
        requests=2, steps=4, seconds=4.0, prompt_tokens=6, output_tokens=4, throughput=1.0, batch=1.0,
        time_to_first_token=2.5, time_to_first_token_p99=4.0, time_per_output_token=1.0,
        time_per_output_token_p99=1.0, latency=3.5, preemptions=0, reused_tokens=0, recomputed_tokens=0,
    )  # fmt: skip
    assert engine.finished[0].longest_gap == 1.0 and engine.finished[1].longest_gap == 0.0


# -- what must not be lost ---------------------------------------------------------------------------


def state(engine: Engine) -> tuple:
    return engine.unfinished, engine.clock, len(engine.steps), engine.cache.num_free_blocks, engine.cache.lengths


@pytest.mark.parametrize(
    "prompt, new, options, error, message",
    [
        ((), 3, {}, ValueError, "at least one token"),
        ([1] * 30, 4, {}, ValueError, "need 33 tokens.*max_tokens=32"),
        ([1] * 20, 6, {}, ValueError, "need 7 blocks of 4 tokens.*has 6"),
        ([1, VOCAB], 3, {}, ValueError, "vocabulary has 13"),
        ([-1], 3, {}, ValueError, "from -1 to -1"),
        ([0.5], 3, {}, TypeError, "integer token ids, got float64"),
        ([[1, 2]], 3, {}, TypeError, r"shape \(1, 2\)"),
        ("text", 3, {}, TypeError, "bytes"),
        ([1], 0, {}, ValueError, "max_new_tokens must be .* got 0"),
        ([1], 3, {"stop": "x"}, TypeError, "stop may be text only"),
        ([1], 3, {"stop": [99]}, ValueError, "stop holds ids"),
        ([1], 3, {"arrival": 0.5}, ValueError, "clock says 1; got 0.5"),
        ([1], 3, {"arrival": float("nan")}, ValueError, "got nan"),
    ],
)
def test_a_bad_request_changes_nothing(prompt, new, options, error, message):
    engine = Engine(tiny(), cache_of(6))
    (good,) = prompts(4)
    engine.add(good, 3)
    engine.step()
    before = state(engine)
    with pytest.raises(error, match=message):
        engine.add(prompt, new, **options)
    assert state(engine) == before
    assert list(engine.run()[0].tokens) == alone(Wish(good, 3), block_size=4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (lambda c: (tiny(), "cache"), TypeError, "must be a KVCache, got str"),
        (lambda c: (tiny(), cache_of(4, eviction=SlidingWindow(8))), ValueError, "without eviction"),
        (lambda c: (tiny(), c, None, HashChain(cache_of(4).pool, 4)), ValueError, "another pool"),
        (lambda c: (kvlib.tinylm(), c), ValueError, "built for another model.*num_layers=2.*num_layers=4"),
        (lambda c: (tiny(), cache_of(4, backend="torch")), ValueError, "on torch, this model needs .* on numpy"),
    ],
)
def test_a_cache_that_does_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        Engine(*arguments(cache_of(4)))


def test_a_cache_that_holds_something_already():
    cache = cache_of(4)
    tiny()([[1, 2]], cache, [cache.open()])
    with pytest.raises(ValueError, match="tokens of other sequences"):
        Engine(tiny(), cache)


@pytest.mark.parametrize("bad", [{"token_budget": 0}, {"max_running": 1.5}, {"preempt": "kill"}])
def test_rules_that_make_no_sense(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Batching(**bad)


@pytest.mark.parametrize("index", [None, HashChain])
@pytest.mark.parametrize("failing", range(1, 9, 2))
@pytest.mark.parametrize("where", ["model", "sample"])
def test_a_step_that_fails_is_tried_again(where, failing, index):
    calls = []

    def fails(function):
        @functools.wraps(function)
        def called(*args, **options):
            answer = function(*args, **options)
            calls.append(1)
            if len(calls) == failing:
                raise KeyboardInterrupt
            return answer

        return called

    cache = cache_of(9)
    engine = Engine(tiny(), cache, Batching(token_budget=6), index and index(cache.pool, 4))
    if where == "model":
        engine.model = fails(Transformer.__call__).__get__(tiny())
        engine.model = type("Model", (), {"__call__": staticmethod(engine.model), "backend": tiny().backend})()
    else:
        engine.sample = fails(engine.sample)
    wishes = [Wish(p, 6) for p in prompts(3, 9, 5)]
    for wish in wishes:
        engine.add(wish.prompt, wish.new)
    interrupted = 0
    while engine.unfinished:
        try:
            engine.step()
        except KeyboardInterrupt:
            interrupted += 1
        for request in engine.scheduler.running:
            assert request.computed == cache.lengths[request.seq]
            assert len(request.times) == len(request.tokens) - request.prompt
    assert interrupted == 1
    assert [list(one.tokens) for one in sorted(engine.finished)] == [alone(wish, block_size=4) for wish in wishes]
    assert not cache.lengths


def test_a_sampler_or_a_clock_that_makes_no_sense_costs_nothing():
    """The step that met it can be tried again, with a better one."""
    (prompt,) = prompts(5)
    engine = Engine(tiny(), cache_of(9))
    engine.add(prompt, 4)
    for bad in (VOCAB, -1, 0.5, None):
        engine.sample = lambda logits, request, bad=bad: bad
        with pytest.raises(ValueError, match=f"token id below {VOCAB}, and returned {bad}"):
            engine.step()
    engine.sample, engine.cost = greedy, lambda work: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.cost = Cost()
    assert list(engine.run()[0].tokens) == alone(Wish(prompt, 4), block_size=4)
    assert len(engine.finished[0].times) == 4


def test_somebody_else_holds_the_blocks():
    cache = cache_of(4)
    engine = Engine(tiny(), cache)
    (prompt,) = prompts(8)
    engine.add(prompt, 3)
    stranger = cache.open()
    tiny()([[1] * 12], cache, [stranger])
    for _ in range(2):
        with pytest.raises(kvlib.CacheFull, match="1 of 4 are free"):
            engine.step()
    cache.close(stranger)
    assert list(engine.run()[0].tokens) == alone(Wish(prompt, 3), block_size=4)


def test_cancelling_frees_the_blocks_at_once():
    engine = Engine(tiny(), cache_of(4), Batching(max_running=1))
    a, b, c = prompts(8, 8, 8)
    ids = [engine.add(a, 5), engine.add(b, 5), engine.add(c, 5, arrival=50.0)]
    engine.step()
    assert engine.cache.num_free_blocks == 2
    for id in ids:
        engine.cancel(id)
    assert engine.cache.num_free_blocks == 4 and engine.unfinished == 0 and engine.step() is None
    with pytest.raises(KeyError, match="request 0"):
        engine.cancel(0)


def test_nothing_to_do_and_nothing_to_say():
    engine = Engine(tiny(), cache_of(4))
    assert engine.step() is None and engine.run() == []
    with pytest.raises(ValueError, match="nothing to summarise"):
        engine.summary()


# -- samplers, backends, real text -------------------------------------------------------------------


def test_drawing_does_not_depend_on_the_schedule():
    def draw(logits, request):
        rng = np.random.default_rng((request.id, len(request.output)))
        weights = np.exp(logits - logits.max(), dtype=np.float64)
        return rng.choice(len(logits), p=weights / weights.sum())

    wishes = [Wish(p, 8) for p in prompts(5, 9, 3)]
    runs = [
        served(Engine(tiny(), cache_of(blocks), rules, sample=draw), wishes)
        for blocks, rules in ((40, Batching()), (5, Batching(token_budget=3)), (5, Batching(preempt="swap")))
    ]
    assert runs[0] == runs[1] == runs[2] != [alone(wish, block_size=4) for wish in wishes]


@pytest.mark.parametrize("codec", ["plain", GROUPED], ids=["plain", "grouped"])
@pytest.mark.parametrize("preempt", ["recompute", "swap"])
def test_torch_serves_the_same(codec, preempt):
    wishes = [Wish(p, 8) for p in prompts(5, 9, 3)]
    cache = cache_of(5, codec=codec, backend="torch")
    engine = Engine(tiny("torch"), cache, Batching(token_budget=6, preempt=preempt))
    assert served(engine, wishes) == [alone(wish, codec=codec, block_size=4) for wish in wishes]
    assert engine.summary().preemptions


@pytest.mark.parametrize("codec", ["plain", "kivi-4bit"])
def test_text_from_the_bundled_model(codec):
    """Asked for as many tokens as are chosen clearly: in float32, what runs together may move a logit by 1e-4."""
    model = kvlib.tinylm()
    texts = ["def main(", "import numpy as np\nimport o", "class Node:\n    def __init__(self, "]
    expected = [clear_choices(model, text, kvlib.KVCache(model.spec, 1, 256, 32, codec=codec)) for text in texts]
    cache = kvlib.KVCache(model.spec, 0, 256, 32, 4, codec=codec)
    engine = Engine(model, cache, Batching(token_budget=24, preempt="swap"))
    for text, tokens in zip(texts, expected, strict=True):
        engine.add(text, len(tokens))
    assert [list(one.tokens) for one in engine.run()] == expected


def clear_choices(model: Transformer, text: str, cache: kvlib.KVCache, most: int = 6) -> list[int]:
    """What ``model`` says after ``text`` until it hesitates; the first token it does not."""
    tokens, found = list(text.encode()), []
    while len(found) < most:
        logits = model.backend.to_numpy(model([tokens], cache, last_only=True))[0, -1]
        second, first = np.sort(logits)[-2:]
        if first - second < 0.02:
            break
        tokens = [int(logits.argmax())]
        found += tokens
    assert found
    return found


def test_a_bar_that_counts_requests(capsys):
    engine = Engine(tiny(), cache_of(20))
    for prompt in prompts(3, 4):
        engine.add(prompt, 2)
    engine.run(progress=True)
    assert "2/2" in capsys.readouterr().err
