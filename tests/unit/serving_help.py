"""A tiny model, what it says to one request alone, and what must hold at every step of an engine."""

import functools
from typing import Any, NamedTuple

import numpy as np

import kvlib
from kvlib.config import ModelConfig
from kvlib.engine import Engine
from kvlib.model import Transformer
from kvlib.serving import Step

VOCAB, LONGEST = 13, 32


@functools.cache
def tiny(backend: str = "numpy") -> Transformer:
    """Random, and in float64: rounding, which depends on what runs together, is far below any gap between logits."""
    config = ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
    )
    rng = np.random.default_rng(5)
    weights = {name: 0.6 * rng.standard_normal(shape) for name, shape in config.tensor_shapes().items()}
    where = kvlib.arrays.get_backend(backend)
    return Transformer(config, {name: where.asarray(w) for name, w in weights.items()}, where, "float64")


class Wish(NamedTuple):
    prompt: tuple[int, ...]
    new: int
    stop: tuple[int, ...] = ()
    arrival: float = 0.0

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.new - 1


@functools.cache
def alone(wish: Wish, **how: Any) -> list[int]:
    """What one request gets when nothing runs beside it: its prompt in one piece, and no engine."""
    cache = kvlib.KVCache(tiny().spec, 1, LONGEST, **how)
    tokens = []
    for token in kvlib.generate(tiny(), wish.prompt, wish.new, cache):
        tokens.append(token)
        if token in wish.stop:
            break
    return tokens


def cache_of(num_blocks: int, block_size: int | None = 4, **how: Any) -> kvlib.KVCache:
    return kvlib.KVCache(tiny().spec, 0, LONGEST, block_size, num_blocks, **how)


def served(engine: Engine, wishes: list[Wish]) -> list[list[int]]:
    """The outputs; with everything that must hold at every step looked at there."""
    for wish in wishes:
        engine.add(wish.prompt, wish.new, wish.stop, wish.arrival)
    while (step := engine.step()) is not None:
        check_step(engine, step)
    assert [one.id for one in sorted(engine.finished)] == list(range(len(wishes)))
    return [list(one.tokens) for one in sorted(engine.finished)]


def check_step(engine: Engine, step: Step) -> None:
    scheduler, cache = engine.scheduler, engine.cache
    pool, index = cache.pool, scheduler.index
    holders = np.zeros(len(pool), int)
    for table in cache._tables.open_tables.values():
        holders[table.blocks] += 1
    assert len(cache.lengths) == len(scheduler.running)
    if index is not None:
        holders += index._published
    assert pool.refs.tolist() == holders.tolist()
    assert pool.num_free == np.count_nonzero(holders == 0)
    assert 0 <= step.free_blocks <= pool.num_free <= len(pool)
    assert step.work.prefill + step.work.decode == sum(n for _, n in step.prefill) + len(step.decode) > 0
    assert step.work.prefill + step.work.decode <= scheduler.rules.token_budget
    assert len(scheduler.running) <= scheduler.rules.max_running
    queue = [(request.arrival, request.id) for request in (*scheduler.running, *scheduler.waiting)]
    assert queue == sorted(queue)  # who came first is served first
    for request in scheduler.running:
        assert request.computed == cache.lengths[request.seq] < len(request.tokens)
    assert not set(step.finished) & {*step.running, *step.waiting}
