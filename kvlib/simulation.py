"""Simulation: the same engine and scheduler over thousands of requests, without a model and without keys and values.

>>> from kvlib.simulation import simulate
>>> from kvlib.workloads import SHAREGPT, requests
>>> engine = simulate(requests(SHAREGPT, 40), num_blocks=400, block_size=16)
>>> engine.summary().requests
40

What takes its turn, what is preempted and which block holds what are decided by the code that serves a real model: only
nothing is computed. A request's output is as long as it was drawn, or what its conversation says.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kvlib.arrays import numpy_backend
from kvlib.cache import KVCache
from kvlib.engine import Engine
from kvlib.index import PrefixIndex
from kvlib.planes import Codec
from kvlib.scheduler import Batching
from kvlib.serving import Request, Work
from kvlib.spec import CacheSpec


class Nothing(Codec):
    """A codec that stores nothing: no plane, no byte."""

    __slots__ = ()
    name = "nothing"

    def planes(self, width: int) -> dict:
        return {}


class BareCache(KVCache):
    """The block tables of a cache, and nothing in the blocks.

    Args: as of `KVCache`; no sequence is open at first.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, max_tokens: int | None = None) -> None:
        max_tokens = num_blocks * block_size if max_tokens is None else max_tokens
        spec = CacheSpec(num_kv_heads=1, head_dim=1, num_layers=1, dtype="float16")
        super().__init__(spec, 0, max_tokens, block_size, num_blocks, codec=Nothing())

    def extend(self, seqs: Sequence[int], count: int) -> None:
        """``count`` more tokens in each of ``seqs``. Raises CacheFull, and changes nothing, if blocks are lacking."""
        tables = [self._tables[seq] for seq in seqs]
        starts = [int(table.stored[0]) for table in tables]
        room = self.block_size - count  # who has it needs no block; the last block of a sequence is never shared
        short = [i for i, start in enumerate(starts) if not 0 < start % self.block_size <= room]
        if short:
            growing = [tables[i] for i in short], [np.zeros(0, np.int64)] * len(short)
            stops = [starts[i] + count for i in short]
            self._tables.take(self._tables.plan(*growing, [starts[i] for i in short], stops), lambda *_: None)
        for table in tables:
            table.stored += count
            table.seen += count


class _NoModel:
    """Called like a `Transformer`: it adds tokens to a `BareCache`, and has no opinion on what comes next."""

    backend = numpy_backend

    def __call__(
        self, tokens: Sequence[Sequence[int]], cache: BareCache, seqs: Sequence[int], last_only: bool
    ) -> np.ndarray:
        cache.extend(seqs, len(tokens[0]))
        return np.zeros((len(tokens), 1, 1), np.float32)


def simulate(
    requests: Sequence,
    num_blocks: int,
    block_size: int = 16,
    rules: Batching | None = None,
    index: Callable[..., PrefixIndex] | None = None,
    cost: Callable[[Work], float] | None = None,
    progress: bool = False,
    keep_tables: bool = False,
) -> Engine:
    """Serve ``requests`` to the end, and return the engine: its ``steps``, ``finished`` and ``summary()``.

    Args:
        requests: `kvlib.workloads.Request`, of which lengths and arrivals are known; or `kvlib.workloads.Turn`, of
            which the tokens are known, all of them there at the beginning.
        num_blocks, block_size: of the pool.
        index: a class, `HashChain` or `RadixTree`, to share prefixes with; it needs turns, for lengths have none.
        rules, cost, progress, keep_tables: as of `Engine`.

    Raises ValueError: a request could never be served, or prefixes are to be shared and tokens are not known.
    """
    cache = BareCache(num_blocks, block_size)
    outputs: list[Sequence[int]] = []
    shared = None if index is None else index(cache.pool, block_size)

    def sample(logits: np.ndarray, request: Request) -> int:
        return outputs[request.id][len(request.tokens) - request.prompt]

    engine = Engine(_NoModel(), cache, rules, shared, sample, cost, keep_tables)
    for request in requests:
        if known := hasattr(request, "answer"):
            prompt, output, arrival = request.prompt, request.answer, None
        else:
            prompt, output, arrival = np.zeros(request.prompt, int), np.zeros(request.output, int), request.arrival
        if shared and not known:
            raise ValueError("prefixes can be shared only where tokens are known: pass turns of `conversations`")
        engine.add(prompt, len(output), arrival=arrival)
        outputs.append(output)
    engine.run(progress)
    return engine
