"""What a sequence ought to hold, kept beside the cache in float64 NumPy that shares no code with kvlib's attention,
eviction or tail.

A `Shadow` is told what the cache is told. It knows every row that was appended, which of them are encoded and which
wait in the tail, and which each policy should keep; it checks what `read` and `attend` give back, and which blocks are
in use. Where two scores are as close as rounding, it follows the cache's choice.
"""

import copy
import math
from typing import Any

import numpy as np

import kvlib
from kvlib.codecs import Split
from kvlib.eviction import HeavyHitter, SlidingWindow, SnapKV
from kvlib.tail import DRAFT
from tests.conformance import bounds, reference

CLOSE = 1e-3  # masses that differ by less, relative to the larger, may be told apart wrongly in float32


def host(x: Any) -> np.ndarray:
    """An array of either backend as float64 NumPy, without asking kvlib."""
    return np.asarray(x.detach().double().cpu().numpy() if hasattr(x, "detach") else x, np.float64)


class Layer:
    """One layer of one sequence: rows k (Hkv, n, D), v (Hkv, n, Dv) as they came; ``closed`` of them are encoded.

    ``kept``: for each head the units (first positions of groups) that are still there. ``mass`` (Hkv, n): attention.
    ``queries``: (q (Hq, T, D), settings, length) of the calls of `attend` that followed upon each other.
    """

    def __init__(self, spec: kvlib.CacheSpec) -> None:
        heads = spec.num_kv_heads
        self.k, self.v = np.zeros((heads, 0, spec.head_dim)), np.zeros((heads, 0, spec.value_dim))
        self.mass = np.zeros((heads, 0))
        self.closed, self.decided = 0, False
        self.kept: list[list[int]] = [[] for _ in range(heads)]
        self.queries: list[tuple] = []
        self.errors: tuple | None = None  # see `Shadow.errors`
        self.run: int | None = None  # see `Shadow._view`: the first position that the last append has encoded

    @property
    def seen(self) -> int:
        return self.k.shape[1]

    @property
    def waiting(self) -> int:
        return self.seen - self.closed

    def exact_from(self, queries: np.ndarray, codec: Split) -> np.ndarray:
        """The first position that each query sees exact, (T,)."""
        if self.run is None:
            return np.full(len(queries), self.closed)
        return np.clip((queries + 1 - codec.residual) // codec.group * codec.group, self.run, self.closed)


class Shadow:
    def __init__(self, cache: kvlib.KVCache, seq: int) -> None:
        self.cache, self.seq = cache, seq
        self.spec, self.policy, self.codec = cache.spec, cache.eviction, cache.codec
        self.unit = self.codec.group
        self.layers = [Layer(self.spec) for _ in range(self.spec.num_layers)]
        self.holes = False  # after a truncation a policy's heads may keep different numbers of tokens

    def fork(self, seq: int) -> "Shadow":
        twin = copy.copy(self)
        twin.seq, twin.layers = seq, copy.deepcopy(self.layers)
        return twin

    @property
    def length(self) -> int:
        return max(layer.seen for layer in self.layers)

    # -- what it is told ---------------------------------------------------------------------------

    def before_append(self, index: int, tokens: int) -> tuple | None:
        """What the policy will go by: (scores (Hkv, n) by unit, how many units stay), or None if all do."""
        layer, policy = self.layers[index], self.policy
        if policy is None or (isinstance(policy, SnapKV) and (tokens > 1 or layer.decided)):
            return None
        stay = max(0, (policy.budget - 1 - layer.waiting) // self.unit)
        starts = np.arange(0, layer.closed, self.unit)
        if isinstance(policy, SlidingWindow):
            behind = math.ceil(max(0, policy.window - 1 - layer.waiting) / self.unit)
            stay = math.ceil(policy.sinks / self.unit) + behind
            scores = np.broadcast_to(np.where(starts < policy.sinks, np.inf, starts), (len(layer.kept), len(starts)))
        elif isinstance(policy, HeavyHitter):
            recent = policy.budget // 2 if policy.recent is None else policy.recent
            mass = self._by_unit(layer.mass[:, : layer.closed])
            scores = np.where(starts >= layer.seen - recent, np.inf, mass)
        elif isinstance(policy, SnapKV):
            stay = max(0, (policy.budget - layer.waiting) // self.unit)
            mass = self._by_unit(self._observed(index, policy.window)[:, : layer.closed])
            reach = policy.kernel // 2
            pooled = [mass[:, max(0, i - reach) : i + reach + 1].max(axis=1) for i in range(mass.shape[1])]
            pooled = np.stack(pooled, axis=1) if pooled else mass
            scores = np.where(starts >= layer.seen - policy.window, np.inf, pooled)
        else:  # written by a reader, in the tests: its one method is not kvlib's
            mass = np.zeros((len(layer.kept), len(starts)))
            if policy.observe:
                mass = self._by_unit(self._observed(index, policy.observe)[:, : layer.closed])
            scores = policy.score(np.broadcast_to(starts, mass.shape), mass, layer.seen)
        return scores, stay

    def slots_after(self, index: int, tokens: int) -> int:
        """How many slots a layer would take up with ``tokens`` more, the tail's included."""
        layer, chosen = self.layers[index], self.before_append(index, tokens)
        units = self.cache._tables[self.seq].stored[index] // self.unit if self.holes else max(map(len, layer.kept))
        return int(min(units, chosen[1] if chosen else units)) * self.unit + layer.waiting + tokens

    def append(self, index: int, k: np.ndarray, v: np.ndarray, chosen: tuple | None) -> None:
        """Rows k (Hkv, T, D) and v that the cache now has; ``chosen`` as `before_append` gave it."""
        layer, tokens = self.layers[index], k.shape[1]
        if isinstance(self.policy, SnapKV) and tokens == 1 and layer.seen:
            layer.decided, layer.queries = True, []
        if chosen is not None:
            self._evict(index, *chosen)
        layer.k, layer.v = (np.concatenate(pair, axis=1) for pair in ((layer.k, k), (layer.v, v)))
        layer.mass = np.pad(layer.mass, ((0, 0), (0, tokens)))
        closed = layer.seen - self.codec.residual
        closed = max(layer.closed, closed - (closed - layer.closed) % self.unit) if self.codec.tail else layer.seen
        for units in layer.kept:
            units += range(layer.closed, closed, self.unit)
        for other in self.layers:  # a long run is given up when another layer is written to
            if other.run is not None and other.seen - other.run > self.codec.tail + DRAFT:
                other.run = None
        layer.run = layer.closed if self.codec.tail and tokens > 1 and closed > layer.closed else None
        layer.closed = closed

    def _evict(self, index: int, scores: np.ndarray, stay: int) -> None:
        """Take over what the cache has kept, after making sure that it is the best ``stay`` units of every head."""
        layer, starts = self.layers[index], np.arange(0, self.layers[index].closed, self.unit)
        held = None if isinstance(self.policy, SlidingWindow) else self._positions(index)
        for head, units in enumerate(layer.kept):
            order = sorted(units, key=lambda u: (scores[head, u // self.unit], u), reverse=True)
            best = sorted(order[:stay])
            if held is not None:
                cached = [int(u) for u in starts if u in held[head]]
                assert len(cached) == len(best), (index, head, cached, best)
                if cached != best:
                    worst = min(scores[head, u // self.unit] for u in cached)
                    left = max(scores[head, u // self.unit] for u in units if u not in cached)
                    assert np.isfinite(left), f"what must stay has left: {cached}, {best}"
                    assert left - worst <= CLOSE * abs(left), (index, head, cached, best, left, worst)
                    assert left != worst, f"a tie goes to the newest: {cached}, {best}"
                best = cached
            layer.kept[head] = best

    def can_truncate(self, n: int) -> bool:
        whole = n // self.unit * self.unit
        return all(
            n >= layer.closed or n == whole or all(whole in units for units in layer.kept) for layer in self.layers
        )  # what the last append has brought, nothing has evicted yet

    def truncate(self, n: int) -> None:
        """Let the cache truncate the sequence. Of a group that is cut, what was encoded stays as it was read, with the
        error that it has (or exact, if the last append brought it): from here it is what the sequence ought to hold.
        """
        before = [self.rows(index) for index in range(len(self.layers))]
        errors = [self.errors(index) for index in range(len(self.layers))]
        self.cache.truncate(self.seq, n)
        for index, layer in enumerate(self.layers):
            if n >= layer.seen:
                continue
            closed = self._closed_after(layer, n)
            if closed < layer.closed:
                self._reopen(index, closed, n, before[index], errors[index])
                layer.closed = closed
                layer.kept = [[u for u in units if u < closed] for units in layer.kept]
                layer.mass[:, closed:] = 0  # of groups, and not known for each of their tokens
                self.holes |= self.policy is not None
            layer.k, layer.v, layer.mass = (x[:, :n] for x in (layer.k, layer.v, layer.mass))
            layer.queries, layer.errors = [], None
            layer.run = layer.run if layer.run is not None and layer.run < n else None
            layer.decided &= n > 0

    def _closed_after(self, layer: Layer, n: int) -> int:
        """How many tokens are still encoded: as if the last append had brought no more, or else whole groups."""
        if layer.run is not None and layer.run < n:
            return min(layer.closed, max(layer.run, (n - self.codec.residual) // self.unit * self.unit))
        return min(layer.closed, n // self.unit * self.unit)

    def _reopen(self, index: int, start: int, stop: int, before: tuple, errors: tuple) -> None:
        layer, after = self.layers[index], self.rows(index)
        for head in range(len(layer.kept)):
            now = after[2][head] >= start
            assert now.sum() == stop - start
            then = (before[2][head] >= start) & (before[2][head] < stop)  # a window may have hidden some or all
            for old, new, rows, error in zip(before[:2], after[:2], (layer.k, layer.v), errors, strict=True):
                if layer.run is not None and layer.run <= start:  # still there as it came
                    assert np.array_equal(new[head, now], rows[head, start:stop])
                else:
                    assert np.array_equal(old[head, then], new[head, now][stop - start - then.sum() :])
                assert np.all(np.abs(new[head, now] - rows[head, start:stop]) <= error[head, start:stop])
                rows[head, start:stop] = new[head, now]

    # -- what it checks ----------------------------------------------------------------------------

    def rows(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`read`, in float64, with positions for every head."""
        k, v, positions = self.cache.read(self.seq, index)
        k, v = host(k), host(v)
        return k, v, np.broadcast_to(positions, k.shape[:2])

    def _positions(self, index: int) -> list[set[int]]:
        return [set(row.tolist()) for row in self.rows(index)[2]]

    def stored(self, index: int) -> list[np.ndarray]:
        """For every head the positions that the cache ought to hold, seen or not."""
        layer = self.layers[index]
        tail = np.arange(layer.closed, layer.seen)
        within = np.arange(self.unit)
        return [np.concatenate([(np.array(u, int)[:, None] + within).reshape(-1), tail]) for u in layer.kept]

    def errors(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """How far each number may be off: computed anew where rows have come, gone, or been encoded."""
        layer = self.layers[index]
        if layer.errors is None or layer.errors[0] != (layer.seen, layer.closed):
            both = bounds.stored_errors(self.cache, layer.k, layer.v, "float32", layer.closed)
            layer.errors = (layer.seen, layer.closed), both
        return layer.errors[1]

    def check_read(self, index: int) -> None:
        """Exactly the tokens that ought to be there, in order, each as it came but for the codec's error."""
        layer = self.layers[index]
        k, v, positions = self.rows(index)
        errors = self.errors(index)
        for head, stored in enumerate(self.stored(index)):
            visible = stored[self._sees(np.array([layer.seen - 1]), stored)[0]]
            assert positions[head].tolist() == visible.tolist() + [-1] * (k.shape[1] - len(visible))
            for out, rows, error in zip((k, v), (layer.k, layer.v), errors, strict=True):
                assert np.all(np.abs(out[head, : len(visible)] - rows[head, visible]) <= error[head, visible])
                assert not out[head, len(visible) :].any()

    def check_budget(self, index: int, tokens: int, before: list[int]) -> None:
        """After ``tokens`` were appended to ``before`` in each head: as many stay as the budget says, or as whole
        groups of them fit into it.
        """
        layer, policy = self.layers[index], self.policy
        for held, positions in zip(before, self.stored(index), strict=True):
            if policy is None or (isinstance(policy, SnapKV) and not (tokens == 1 and len(positions) <= held)):
                assert len(positions) == held + tokens
            elif isinstance(policy, SlidingWindow):  # groups that hold a sink or a part of the window, and the tail
                most = policy.budget - 1 + 2 * (self.unit - 1) + self.codec.tail
                assert min(held, policy.budget - 1) <= len(positions) - tokens <= most
            else:
                most = min(held, policy.budget - (not isinstance(policy, SnapKV)))
                assert most - self.unit < len(positions) - tokens <= most
                assert layer.seen > policy.budget or len(positions) == held + tokens

    def check_blocks(self) -> None:
        """Blocks for the slots that are taken, and for the tail once it closes; no more."""
        slots = [max(map(len, layer.kept)) * self.unit + layer.waiting for layer in self.layers]
        needed = math.ceil(max(slots) / self.cache.block_size)
        if self.holes:  # a hole is filled when the next token is evicted
            assert needed <= len(self.cache.block_table(self.seq)) <= math.ceil(self.length / self.cache.block_size)
        else:
            assert len(self.cache.block_table(self.seq)) == needed

    def check(self) -> None:
        for index in range(len(self.layers)):
            self.check_read(index)
        self.check_blocks()
        assert self.cache.lengths[self.seq] == self.length

    def check_attend(self, index: int, q: np.ndarray, out: Any, **settings: Any) -> None:
        """``out`` (Hq, T, Dv) against float64 attention over the rows as they came, and over the rows as they are read;
        then let the policy have observed q (Hq, T, D). ``settings``: window, sinks, scale.
        """
        layer, out = self.layers[index], host(out)
        group, scale = q.shape[0] // self.spec.num_kv_heads, settings.get("scale")
        queries = np.arange(layer.seen - q.shape[1], layer.seen)
        # rows as they are read are worth a check of their own where they are not as they came, and all are read
        twice = not bounds.lossless(self.codec) and (q.shape[1] == 1 or not isinstance(self.policy, SlidingWindow))
        read = self.rows(index) if twice else None
        k_error, v_error = self.errors(index)
        for head, keys in enumerate(self.stored(index)):
            mine = slice(head * group, (head + 1) * group)
            args = q[mine], layer.k[head, None][:, keys], layer.v[head, None][:, keys]
            weights = self._weights(*args[:2], queries, keys, mine, settings)
            expected = weights @ args[2][0]
            error = k_error[head, None][:, keys], v_error[head, None][:, keys]
            bound = bounds.output_error(*args, *error, expected, "float32", scale)
            if bounds.lossless(self.codec):  # of the largest value: a sum of a few may cancel to almost nothing
                bound = bound + bounds.ARITHMETIC["float32"] * np.abs(args[2]).max(initial=0)
            assert np.all(np.abs(out[mine] - expected) <= bound), np.max(np.abs(out[mine] - expected) / bound)
            if twice:
                k, v, keys, exact = self._view(index, head, read)
                args = q[mine], k[None], v[None]
                weights = self._weights(*args[:2], queries, keys, mine, settings, exact, layer)
                expected = weights @ v
                bound = bounds.ARITHMETIC["float32"] * np.abs(v).max() + bounds.decoded_error(*args, scale)
                assert np.all(np.abs(out[mine] - expected) <= bound), np.max(np.abs(out[mine] - expected) / bound)
            if isinstance(self.policy, HeavyHitter):
                np.add.at(layer.mass[head], keys, weights.sum(axis=(0, 1)))
        if layer.queries and layer.queries[-1][2] != queries[0]:
            layer.queries = []  # these do not follow upon those
        layer.queries.append((q, settings, layer.seen))

    def _view(self, index: int, head: int, read: tuple) -> tuple[np.ndarray, ...]:
        """Rows k (S, D) and v as they are read, their positions, and whether (S,) they are exact.

        What the last append has encoded is there twice. A query among the new ones sees it as it would have if the
        later ones had not come yet: groups that were still open then are exact.
        """
        layer, there = self.layers[index], read[2][head] >= 0
        k, v, keys = read[0][head, there], read[1][head, there], read[2][head, there]
        exact = keys >= layer.closed
        if layer.run is not None:
            again = np.arange(layer.run, layer.closed)
            k, v = np.concatenate([k, layer.k[head, again]]), np.concatenate([v, layer.v[head, again]])
            keys, exact = np.concatenate([keys, again]), np.concatenate([exact, again >= 0])
        return k, v, keys, exact

    def _weights(
        self,
        q: np.ndarray,
        k: np.ndarray,
        queries: np.ndarray,
        keys: np.ndarray,
        heads: slice,
        settings: dict,
        exact: np.ndarray | None = None,
        layer: Layer | None = None,
    ) -> np.ndarray:
        visible = self._sees(queries, keys, settings.get("window"))
        if exact is not None and layer is not None:
            visible &= exact == (keys >= layer.exact_from(queries, self.codec)[:, None])
        sinks = settings.get("sinks")
        return reference.weights(q, k, settings.get("scale"), visible, None if sinks is None else sinks[heads])

    def _sees(self, queries: np.ndarray, keys: np.ndarray, window: int | None = None) -> np.ndarray:
        """(T, S): which positions the queries at these positions see."""
        age = queries[:, None] - keys[None, :]
        visible = age >= 0
        if window is not None:
            visible &= age < window
        if isinstance(self.policy, SlidingWindow):
            visible &= (age < self.policy.window) | (keys[None, :] < self.policy.sinks)
        return visible

    def _observed(self, index: int, count: int) -> np.ndarray:
        """(Hkv, n): what each position gets of the attention of the last ``count`` queries, over what is held now."""
        layer, mass = self.layers[index], np.zeros_like(self.layers[index].mass)
        if not layer.queries or not layer.closed:
            return mass
        read = self.rows(index)
        _, settings, stop = layer.queries[-1]
        q = np.concatenate([q for q, _, _ in layer.queries], axis=1)[:, -count:]
        queries, group = np.arange(stop - q.shape[1], stop), q.shape[0] // self.spec.num_kv_heads
        for head in range(len(mass)):
            mine = slice(head * group, (head + 1) * group)
            k, _, keys, exact = self._view(index, head, read)
            weights = self._weights(q[mine], k[None], queries, keys, mine, settings, exact, layer)
            np.add.at(mass[head], keys, weights.sum(axis=(0, 1)))
        return mass

    def _by_unit(self, mass: np.ndarray) -> np.ndarray:
        return mass.reshape(len(mass), -1, self.unit).sum(axis=-1)

