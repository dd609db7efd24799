"""GroupedCache: one cache for a model whose layers do not all remember alike.

Layers come in groups, and each group is one `KVCache`: layers with a sliding window keep what the window can see, the
others keep everything, and a layer that shares another's keys and values has none of its own. Gemma 3
(arXiv:2503.19786) and gpt-oss mix windows and full layers; YOCO (Sun et al. 2024, arXiv:2405.05254) and Gemma 3n share.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvlib.arrays import Array
from kvlib.cache import KVCache
from kvlib.codecs import get_codec
from kvlib.eviction import SlidingWindow
from kvlib.spec import CacheSpec, is_whole
from kvlib.steps import evicted, plan


class GroupedCache:
    """A `KVCache` to each group of layers, behind the front door of one.

    Args:
        caches: one to each group, all with the same open sequences. Specs, codecs, block sizes may differ.
        places: for every layer of the model the group that it belongs to, and its layer inside that cache. Layers in
            the same place share it: the first of them appends, all of them attend.

    Raises:
        ValueError, TypeError: the caches differ in their sequences or backends, or a place is missing or not there.
    """

    def __init__(self, caches: Sequence[KVCache], places: Sequence[tuple[int, int]]) -> None:
        self.caches, self.places = tuple(caches), tuple((int(group), int(local)) for group, local in places)
        for cache in self.caches:
            if not isinstance(cache, KVCache):
                raise TypeError(f"caches must be kvlib.KVCache objects, got a {type(cache).__name__}")
        there = {(g, local) for g, cache in enumerate(self.caches) for local in range(cache.spec.num_layers)}
        if not there or there != set(self.places):
            odd = sorted(there ^ set(self.places))
            raise ValueError(f"places must name every layer of every cache and no other; {odd} is in one but not both")
        alike = {(c.batch, tuple(c.lengths.items()), c.backend.name, str(c.backend.device)) for c in self.caches}
        if len(alike) > 1:
            raise ValueError("the caches must have the same batch, open sequences of the same lengths, and one backend")
        self.batch, self.backend = self.caches[0].batch, self.caches[0].backend

    @classmethod
    def for_windows(
        cls,
        spec: CacheSpec,
        windows: Sequence[int | None],
        batch: int = 1,
        max_tokens: int = 4096,
        chunk: int = 512,
        shared: Mapping[int, int] | None = None,
        num_blocks: int | None = None,
        **settings: Any,
    ) -> "GroupedCache":
        """The cache of a model whose layer i sees ``windows[i]`` positions, or all of them (None).

        Args:
            max_tokens: the longest a sequence may become, where a layer sees everything; else there is no limit.
            chunk: the most tokens of one step. Layers with a window have room for the window and one such step.
            shared: layer -> the layer whose keys and values it attends; both have the same window.
            num_blocks: blocks of the layers that see everything; those with a window get what ``batch`` sequences need.
            settings: ``block_size``, ``codec``, ``backend``, ``device`` of `KVCache`.

        Raises ValueError: not one window to each layer of the spec, or ``shared`` pairs layers that cannot share.
        """
        shared = dict(shared or {})
        if len(windows) != spec.num_layers:
            raise ValueError(f"windows must have one entry for each of {spec.num_layers} layers, got {len(windows)}")
        if not is_whole(chunk) or chunk < 1:
            raise ValueError(f"chunk must be an integer of at least 1, got {chunk!r}")
        for layer, owner in shared.items():
            fits = 0 <= owner < layer < len(windows) and owner not in shared and windows[owner] == windows[layer]
            if not fits:
                raise ValueError(
                    f"layer {layer} cannot share the cache of layer {owner}: that must be an earlier layer with a "
                    f"cache of its own and the same window"
                )
        owners = [layer for layer in range(len(windows)) if layer not in shared]
        members = {window: [layer for layer in owners if windows[layer] == window] for window in windows}
        codec = get_codec(settings.get("codec", "plain"), spec.dtype)
        caches, places = [], {}
        for window, layers in members.items():
            places |= {layer: (len(caches), local) for local, layer in enumerate(layers)}
            own = {"max_tokens": max_tokens, "num_blocks": num_blocks}
            if window is not None:
                kept = max(window - 1 + codec.group - 1, codec.tail)  # of the tokens before a step
                own = {"max_tokens": min(max_tokens, kept + chunk), "eviction": SlidingWindow(window)}
            caches.append(KVCache(replace(spec, num_layers=len(layers)), batch, **own, **settings))
        return cls(caches, [places[shared.get(layer, layer)] for layer in range(len(windows))])

    def __repr__(self) -> str:
        groups = (f"layers {self._layers(group)}: {cache}" for group, cache in enumerate(self.caches))
        return f"GroupedCache({'; '.join(groups)})"

    # -- what it holds -----------------------------------------------------------------------------------------------

    @property
    def spec(self) -> CacheSpec:
        """What a `KVCache` for all layers would be given. Raises AttributeError where groups store different shapes."""
        specs = {replace(cache.spec, num_layers=len(self.places)) for cache in self.caches}
        if len(specs) > 1:
            raise AttributeError("the groups of this cache have different specs; see the spec of each of its caches")
        return specs.pop()

    @property
    def max_tokens(self) -> float:
        """The longest a sequence may become: no group that keeps everything can hold more. inf if there is none."""
        return min((cache.max_tokens for cache in self.caches if cache.eviction is None), default=math.inf)

    @property
    def max_step(self) -> float:
        """The most tokens that one step may add, whatever a sequence holds; inf if no group evicts."""

        def most_held(cache: KVCache) -> int:
            unit, policy = cache.codec.group, cache.eviction
            return max(policy.units(waiting, unit) * unit + waiting for waiting in range(cache.codec.tail + 1))

        return min((c.max_tokens - most_held(c) for c in self.caches if c.eviction), default=math.inf)

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens seen by each open sequence, in the group that is furthest."""
        return {seq: max(cache.lengths[seq] for cache in self.caches) for seq in self.caches[0].lengths}

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @property
    def nbytes_used(self) -> int:
        return sum(cache.nbytes_used for cache in self.caches)

    # -- sequences ---------------------------------------------------------------------------------------------------

    def open(self) -> int:
        """Start an empty sequence in every group and return its id."""
        return self._same([cache.open() for cache in self.caches])

    def fork(self, seq: int) -> int:
        """A new sequence with the same tokens, as `KVCache.fork`."""
        return self._same([cache.fork(seq) for cache in self.caches])

    def truncate(self, seq: int, n: int) -> None:
        """Forget all but the first ``n`` tokens, in every layer.

        A layer with a window cannot bring back what it has evicted. It can go back into its last step or to the
        beginning of it, for it keeps what the first query of that step saw: enough to take back a step that failed,
        or drafted tokens that were refused.

        Raises:
            ValueError: more than there are, or a window before position ``n`` is no longer whole. Nothing has changed.
        """
        self.caches[0].block_table(seq)  # raises KeyError unless it is open
        length = self.lengths[seq]
        if not is_whole(n) or not 0 <= n <= length:
            raise ValueError(f"sequence {seq} holds {length} tokens: cannot truncate it to {n!r}")
        for group, cache in enumerate(self.caches):
            if lost := evicted(cache, seq, int(n)):
                raise ValueError(
                    f"cannot truncate sequence {seq} to {n} tokens: layers {self._layers(group)} have evicted {lost} "
                    f"of those that position {n} would see; go back no further than the last step, or to 0"
                )
        for cache in self.caches:
            cache.truncate(seq, min(n, cache.lengths[seq]))

    def close(self, seq: int) -> None:
        """Forget the sequence, in every group."""
        for cache in self.caches:
            cache.close(seq)

    def reset(self) -> None:
        """Back to the state after construction."""
        for cache in self.caches:
            cache.reset()

    # -- tokens ------------------------------------------------------------------------------------------------------

    def append(self, k: Array, v: Array | None = None, layer: int = 0, seqs: Sequence[int] | None = None) -> None:
        """Add T tokens to one layer of each sequence, as `KVCache.append`.

        The first layer to reach a position reserves it in all groups: a step that one of them cannot store raises
        before anything changes, and no later layer of the step runs out of blocks.

        Raises:
            ValueError, TypeError, KeyError, IndexError: as `KVCache.append`; or the layer shares another's cache.
            CacheFull: some group has too few free blocks.
        """
        cache, local = self._place(layer)
        if (owner := self.places.index(self.places[layer])) != layer:
            raise ValueError(f"layer {layer} shares the cache of layer {owner}: that one appends, this one attends")
        tables = cache._resolve(local, seqs)
        tokens = k.shape[2] if getattr(k, "ndim", 0) == 4 else 0  # the cache itself will refuse anything else
        ends = {seq: int(table.seen[local]) + tokens for seq, table in tables.items()}
        plans = [(each, plan(each, ends)) for each in self.caches]
        cache.append(k, v, layer=local, seqs=seqs)  # takes its own blocks
        for each, needed in plans:
            if each is not cache:
                each._tables.take(needed, each._storage.copy)

    def attend(
        self,
        q: Array,
        layer: int = 0,
        seqs: Sequence[int] | None = None,
        scale: float | None = None,
        window: int | None = None,
        sinks: Array | None = None,
    ) -> Array:
        """Causal attention of the last T positions over what the layer's group holds, as `KVCache.attend`."""
        cache, local = self._place(layer)
        return cache.attend(q, layer=local, seqs=seqs, scale=scale, window=window, sinks=sinks)

    def read(self, seq: int, layer: int = 0) -> tuple[Array, Array, np.ndarray]:
        """What the last position of a layer sees: k, v and positions, as `KVCache.read`."""
        cache, local = self._place(layer)
        return cache.read(seq, layer=local)

    def _place(self, layer: int) -> tuple[KVCache, int]:
        layers = len(self.places)
        if not is_whole(layer) or not 0 <= layer < layers:
            raise IndexError(f"layer must be an integer from 0 to {layers - 1}, got {layer!r}")
        group, local = self.places[layer]
        return self.caches[group], local

    def _layers(self, group: int) -> list[int]:
        return [layer for layer, place in enumerate(self.places) if place[0] == group]

    @staticmethod
    def _same(ids: list[int]) -> int:
        if len(set(ids)) > 1:
            raise RuntimeError(f"the groups have drifted apart, their new sequences are {ids}: use no group by itself")
        return ids[0]
