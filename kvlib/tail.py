"""Tail: the newest tokens of one sequence, exact, until their group is complete and old enough to be encoded."""

from kvlib.arrays import Array, Backend
from kvlib.codecs import Split
from kvlib.spec import CacheSpec


class Tail:
    """Rows of K and V for up to ``capacity`` tokens in every layer, oldest first, in the spec's dtype."""

    __slots__ = ("backend", "k", "spec", "v")

    def __init__(self, spec: CacheSpec, codec: Split, backend: Backend) -> None:
        self.spec, self.backend = spec, backend
        lead = (spec.num_layers, spec.num_kv_heads, codec.tail)
        self.k = backend.zeros((*lead, spec.head_dim), spec.dtype)
        self.v = backend.zeros((*lead, spec.stored_value_dim), spec.dtype)

    def arrays(self) -> tuple[Array, ...]:
        return (self.k, self.v) if self.spec.stored_value_dim else (self.k,)

    def copy(self) -> "Tail":
        twin = object.__new__(Tail)
        twin.spec, twin.backend = self.spec, self.backend
        twin.k, twin.v = (self.backend.xp.asarray(x, copy=True) for x in (self.k, self.v))
        return twin

    def joined(self, layer: int, count: int, k: Array, v: Array | None) -> tuple[Array, Array | None]:
        """The first ``count`` rows of the tail, and k (Hkv, T, D) and v behind them, in the spec's dtype."""

        def join(old: Array, new: Array) -> Array:
            new = self.backend.astype(new, self.spec.dtype)
            return self.backend.xp.concat([old[layer, :, :count], new], axis=1) if count else new

        return join(self.k, k), None if v is None else join(self.v, v)

    def put(self, layer: int, start: int, k: Array, v: Array | None) -> None:
        """Rows k (Hkv, T, D) and v into places ``start`` and up."""
        self.k[layer, :, start : start + k.shape[1]] = k
        if v is not None:
            self.v[layer, :, start : start + k.shape[1]] = v

    def read(self, layer: int, count: int, dtype: str) -> tuple[Array, Array]:
        """The first ``count`` rows: k (Hkv, count, D) and v (Hkv, count, Dv) in ``dtype``."""
        k = self.backend.astype(self.k[layer, :, :count], dtype)
        if self.spec.latent:
            return k, k[..., : self.spec.latent]
        return k, self.backend.astype(self.v[layer, :, :count], dtype)
