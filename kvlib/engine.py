"""Engine: continuous batching. Requests come and go while one cache serves them all, step by step.

>>> import kvlib
>>> from kvlib.engine import Engine
>>> model = kvlib.tinylm()
>>> cache = kvlib.KVCache(model.spec, batch=0, max_tokens=256, block_size=16, num_blocks=32)
>>> engine = Engine(model, cache)
>>> ids = [engine.add(text, max_new_tokens=8) for text in ("def main(", "import ", "class ")]
>>> [len(one.tokens) for one in engine.run()]
[8, 8, 8]

Every request gets the tokens that it would get alone, whatever else runs beside it, in whatever chunks its prompt goes
in, preempted or not: up to rounding, which may turn a choice between two tokens that are equally likely. Only where
prefixes are reused in a cache that keeps more than one newest token exact (KIVI), a prompt sees as encoded what it
would have seen exact alone.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvlib.blocks import CacheFull
from kvlib.cache import KVCache
from kvlib.index import PrefixIndex
from kvlib.metrics import Finished, Summary, summarise
from kvlib.model import Transformer
from kvlib.scheduler import Batching, Scheduler, Turn
from kvlib.serving import Cost, Request, Step, Work, token_ids
from kvlib.spec import CacheSpec, is_whole


def greedy(logits: np.ndarray, request: Request) -> int:
    """The most likely token."""
    return int(logits.argmax())


class Engine:
    """Serves requests with one model and one cache.

    Args:
        model: a `Transformer`, or anything that is called like one.
        cache: a `KVCache` for ``model.spec``, of any codec and backend, whose blocks nobody else holds; it keeps all
            tokens (no eviction). Contiguous, a block is a whole sequence.
        rules: `Batching`; None are its defaults.
        index: a `HashChain` or a `RadixTree` on ``cache.pool``, through which requests share prefixes; None: no reuse.
        sample: (logits (vocab,), request) -> the next token. What it draws should depend on these alone, for instance
            from a generator seeded with ``(request.id, len(request.output))``: then the schedule changes nothing.
        cost: `Work` -> seconds that the clock moves on in a step. None: 1, so that the clock counts steps.
        keep_tables: let every `Step` hold the block tables too.

    Attributes: ``clock`` (seconds), ``steps``, ``finished``: what has happened so far. ``scheduler``: who waits, who
    runs.

    Raises ValueError, TypeError: the cache does not fit.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        rules: Batching | None = None,
        index: PrefixIndex | None = None,
        sample: Callable[[np.ndarray, Request], int] = greedy,
        cost: Callable[[Work], float] | None = None,
        keep_tables: bool = False,
    ) -> None:
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
        if cache.eviction:
            raise ValueError(f"what {cache.eviction} evicts depends on the schedule; build the cache without eviction")
        spec = getattr(model, "spec", cache.spec)
        if _shape(spec) != _shape(cache.spec) or model.backend.name != cache.backend.name:
            raise ValueError(
                f"the cache was built for another model: it has {cache.spec} on {cache.backend.name}, this model needs "
                f"{spec} on {model.backend.name}"
            )
        if index is not None and index.pool is not cache.pool:
            raise ValueError("the index is of another pool: build it on cache.pool")
        if any(cache.lengths.values()):
            raise ValueError("the cache holds tokens of other sequences; close them, or build it with batch=0")
        self.model, self.cache, self.sample = model, cache, sample
        self.cost = Cost() if cost is None else cost
        self.scheduler = Scheduler(cache, rules or Batching(), index)
        self.keep_tables = keep_tables
        self.clock = 0.0
        self.steps: list[Step] = []
        self.finished: list[Finished] = []
        self._coming: list[tuple[float, int, Request]] = []  # a heap of those that have not arrived
        self._ids = itertools.count()

    def add(
        self,
        prompt: str | bytes | Sequence[int],
        max_new_tokens: int,
        stop: int | Sequence[int] = (),
        arrival: float | None = None,
    ) -> int:
        """Hand in a request, and return its id.

        Args:
            prompt: token ids; text or bytes for a model whose tokens are bytes.
            max_new_tokens: the most tokens to generate.
            stop: token ids that end it; the one that came is the last of the output.
            arrival: when it comes, in seconds of the clock; None is now.

        Raises:
            ValueError, TypeError: it is empty, or no list of tokens of the vocabulary; it comes before now; it is
                longer than the cache could ever hold. Nothing has changed then.
        """
        tokens, stop = token_ids("prompt", prompt, self._vocab), token_ids("stop", stop, self._vocab)
        if not tokens:
            raise ValueError("prompt must hold at least one token, and is empty")
        if not is_whole(max_new_tokens) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be an integer of at least 1, got {max_new_tokens!r}")
        arrival = self.clock if arrival is None else float(arrival)
        if not self.clock <= arrival < float("inf"):
            raise ValueError(f"arrival must be a time from now on, and the clock says {self.clock:g}; got {arrival}")
        self.scheduler.check(len(tokens) + int(max_new_tokens) - 1)
        request = Request(next(self._ids), arrival, tokens, int(max_new_tokens), frozenset(stop))
        heapq.heappush(self._coming, (arrival, request.id, request))
        return request.id

    def cancel(self, id: int) -> None:
        """Take back a request that has not finished; its blocks are free at once. Raises KeyError if there is none."""
        for entry in self._coming:
            if entry[1] == id:
                self._coming.remove(entry)
                heapq.heapify(self._coming)
                return
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            if request.id == id:
                self.scheduler.leave(request)
                return
        raise KeyError(f"request {id} is unknown, or has finished")

    @property
    def unfinished(self) -> int:
        """Requests that have been added and have not got their whole output."""
        return len(self._coming) + len(self.scheduler.waiting) + len(self.scheduler.running)

    def step(self) -> Step | None:
        """One step of the model for everybody whose turn it is; None if there is nothing left to do.

        Where nobody has arrived, the clock moves on to the next arrival first. If the model or ``sample`` raises, those
        that were computed before have their tokens, the others are as they were, and the next step tries again.

        Raises CacheFull: somebody else holds so many blocks that nobody can run.
        """
        if not self.unfinished:
            return None
        scheduler = self.scheduler
        if not scheduler.running and not scheduler.waiting:
            self.clock = max(self.clock, self._coming[0][0])
        while self._coming and self._coming[0][0] <= self.clock:
            scheduler.waiting.append(heapq.heappop(self._coming)[2])
        turn = scheduler.schedule()
        if not turn.work:
            needed = -(-len(scheduler.waiting[0].tokens) // self.cache.block_size)
            raise CacheFull(needed, self.cache.num_free_blocks, self.cache.num_blocks)
        done: list[Request] = []
        decoding = {request for request in turn.work if request.decoding}
        context = sum(request.computed + count for request, count in turn.work.items())
        seconds = float(self.cost(Work.of(turn.work, decoding, context, turn.moved)))
        try:
            for group in _equal_counts(turn.work):
                self._forward(group, turn.work[group[0]])
                done += group
        finally:  # whatever happened: who has got a token has got it now
            self._record(turn, done, decoding, seconds)
        return self.steps[-1]

    def run(self, progress: bool = False) -> list[Finished]:
        """Step until all requests have finished, and return them in the order of their ids.

        ``progress``: show a bar, one tick to a request; needs tqdm.
        """
        if progress:
            from tqdm.auto import tqdm

            bar = tqdm(total=self.unfinished, unit="request")
        while (step := self.step()) is not None:
            if progress:
                bar.update(len(step.finished))
        if progress:
            bar.close()
        return sorted(self.finished)

    def summary(self) -> Summary:
        """The figures of the run so far. Raises ValueError if nothing has finished."""
        return summarise(self.finished, self.steps)

    # -- one step ----------------------------------------------------------------------------------------------------

    @property
    def _vocab(self) -> int | None:
        return getattr(getattr(self.model, "config", None), "vocab_size", None)

    def _forward(self, group: list[Request], count: int) -> None:
        """The next ``count`` tokens of each request go through the model together: all of it, or nothing."""
        rows = [request.tokens[request.computed : request.computed + count] for request in group]
        seqs = [request.seq for request in group]
        try:
            logits = self.model(rows, self.cache, seqs=seqs, last_only=True)
            logits = self.model.backend.to_numpy(logits)
            chosen = [
                self._chosen(row[-1], request) if request.left == count else None
                for row, request in zip(logits, group, strict=True)
            ]
        except BaseException:
            for request in group:
                self.cache.truncate(request.seq, request.computed)
            raise
        for request, token in zip(group, chosen, strict=True):
            request.advance(count)
            if token is not None:
                request.tokens.append(token)

    def _chosen(self, logits: np.ndarray, request: Request) -> int:
        token = self.sample(logits, request)
        if not is_whole(token) or token < 0 or (self._vocab is not None and token >= self._vocab):
            raise ValueError(f"sample must return a token id below {self._vocab}, and returned {token!r}")
        return int(token)

    def _record(self, turn: Turn, done: list[Request], decoding: set[Request], seconds: float) -> None:
        """Write the step down, and let those leave who have all they asked for."""
        scheduler, cache = self.scheduler, self.cache
        for request in done:
            scheduler.publish(request)
        chunks = tuple((request.id, turn.work[request]) for request in done if request not in decoding)
        decodes = _ids([request for request in done if request in decoding])
        counts = {request: turn.work[request] for request in done}
        work = Work.of(counts, decoding, sum(request.computed for request in done), turn.moved)
        tables = [(r.id, tuple(cache.block_table(r.seq))) for r in scheduler.running] if self.keep_tables else ()
        free, kept = cache.num_free_blocks, scheduler.index.evictable if scheduler.index else 0
        began, self.clock = self.clock, self.clock + seconds
        given = [request for request in done if len(request.times) < len(request.tokens) - request.prompt]
        for request in given:
            request.times.append(self.clock)
        ended = [request for request in given if request.done]
        for request in ended:
            scheduler.leave(request)
            self.finished.append(Finished.of(request))
        self.steps.append(
            Step(
                clock=began,
                seconds=seconds,
                prefill=chunks,
                decode=decodes,
                running=_ids(scheduler.running),
                waiting=_ids(scheduler.waiting),
                admitted=_ids(turn.admitted),
                reused=tuple((request.id, request.found) for request in turn.admitted if request.found),
                preempted=_ids(turn.preempted),
                swapped_out=_ids(turn.swapped_out),
                swapped_in=_ids(turn.swapped_in),
                finished=_ids(ended),
                free_blocks=free,
                kept_blocks=kept,
                work=work,
                tables=tuple(tables),
            )
        )


def _shape(spec: CacheSpec) -> tuple:
    return spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.value_dim, spec.latent


def _ids(requests: Sequence[Request]) -> tuple[int, ...]:
    return tuple(request.id for request in requests)


def _equal_counts(work: dict[Request, int]) -> Iterator[list[Request]]:
    """Those that compute equally many tokens, together: the model takes rectangles. The shortest first."""
    ordered = sorted(work, key=work.__getitem__)
    return (list(group) for _, group in itertools.groupby(ordered, key=work.__getitem__))
