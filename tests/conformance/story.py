"""A cache and the shadows of its sequences, to which the same things happen."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import kvlib
from tests.conformance import reference
from tests.conformance.compositions import Composition
from tests.conformance.graph import changed, snapshot
from tests.conformance.shadow import Shadow
from tests.conformance.test_sequences import conserved, poison

GROUP = 2  # query heads to a KV head


class Story:
    """One cache of a composition, and everything that was done to it: `acts`, so that it can be told again."""

    def __init__(self, composition: Composition, spec: kvlib.CacheSpec, max_tokens: int = 64, **settings: Any) -> None:
        self.composition, self.spec = composition, spec
        self.cache = composition.cache(spec, max_tokens, **settings)
        self.rng = np.random.default_rng(11)
        self.restart()

    def restart(self) -> None:
        self.shadows = {seq: Shadow(self.cache, seq) for seq in self.cache.lengths}
        self.acts: list = []

    def array(self, x: np.ndarray) -> Any:
        x = x.astype(np.float32)
        return torch.from_numpy(x) if self.composition.backend == "torch" else x

    def draw(self, *shape: int) -> np.ndarray:
        """Normal numbers as float32 has them; some tokens stand out, as they do in a model."""
        x = self.rng.standard_normal(shape)
        return reference.rounded(x * (1 + 2 * (self.rng.random((*shape[:-1], 1)) < 0.2)), "float32")

    def tokens(self, count: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """K and V to append to ``count`` sequences."""
        k = self.draw(count, self.spec.num_kv_heads, tokens, self.spec.head_dim)
        if self.spec.latent:
            return k, k[..., : self.spec.latent]
        return k, self.draw(count, self.spec.num_kv_heads, tokens, self.spec.value_dim)

    def tell(self, cache: kvlib.KVCache, k: np.ndarray, v: np.ndarray, layer: int, seqs: Sequence[int]) -> None:
        cache.append(self.array(k), None if self.spec.latent else self.array(v), layer, list(seqs))

    def append(
        self,
        tokens: int,
        seqs: Iterable[int] | None = None,
        layers: Iterable[int] | None = None,
        attend: bool = True,
        **settings: Any,
    ) -> None:
        """Tokens to each layer in turn, which then attends with all of them; ``settings`` of `attend`."""
        seqs = list(self.shadows if seqs is None else seqs)
        for layer in range(self.spec.num_layers) if layers is None else layers:
            self.append_to(layer, seqs, *self.tokens(len(seqs), tokens))
            if attend:
                self.attend(tokens, seqs, layer, **settings)

    def append_to(self, layer: int, seqs: Sequence[int], k: np.ndarray, v: np.ndarray) -> None:
        shadows, tokens = [self.shadows[seq] for seq in seqs], k.shape[2]
        chosen = [shadow.before_append(layer, tokens) for shadow in shadows]
        before = [[len(held) for held in shadow.stored(layer)] for shadow in shadows]
        self.tell(self.cache, k, v, layer, seqs)
        self.acts.append(lambda cache: self.tell(cache, k, v, layer, seqs))
        for row, shadow in enumerate(shadows):
            shadow.append(layer, k[row], v[row], chosen[row])
            shadow.check_budget(layer, tokens, before[row])

    def attend(self, tokens: int, seqs: Sequence[int], layer: int, **settings: Any) -> None:
        q = self.draw(len(seqs), GROUP * self.spec.num_kv_heads, tokens, self.spec.head_dim)
        given = {name: self.array(x) if name == "sinks" else x for name, x in settings.items()}
        out = self.cache.attend(self.array(q), layer, seqs, **given)
        self.acts.append(lambda cache: cache.attend(self.array(q), layer, seqs, **given))
        for row, seq in enumerate(seqs):
            self.shadows[seq].check_attend(layer, q[row], out[row], **settings)

    def open(self) -> int:
        seq = self.cache.open()
        self.acts.append(lambda cache: cache.open())
        self.shadows[seq] = Shadow(self.cache, seq)
        return seq

    def fork(self, seq: int) -> int:
        twin = self.cache.fork(seq)
        self.acts.append(lambda cache: cache.fork(seq))
        self.shadows[twin] = self.shadows[seq].fork(twin)
        return twin

    def truncate(self, seq: int, n: int) -> None:
        """To n tokens; or, where a policy has dropped a part of the group that n cuts, to the start of that group."""
        shadow = self.shadows[seq]
        if not shadow.can_truncate(n):
            before = snapshot(self.cache)
            with pytest.raises(ValueError, match="has evicted the group of tokens"):
                self.cache.truncate(seq, n)
            assert changed(before, snapshot(self.cache)) == []
            n = n // shadow.unit * shadow.unit
        shadow.truncate(n)
        self.acts.append(lambda cache: cache.truncate(seq, n))

    def close(self, seq: int) -> None:
        self.cache.close(seq)
        self.acts.append(lambda cache: cache.close(seq))
        del self.shadows[seq]

    def check(self) -> None:
        poison(self.cache)
        conserved(self.cache)
        assert self.cache.lengths == {seq: shadow.length for seq, shadow in self.shadows.items()}
        for shadow in self.shadows.values():
            shadow.check()
