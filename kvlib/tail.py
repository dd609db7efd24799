"""Tail: the newest tokens of one sequence, exact, until their group is complete and old enough to be encoded."""

from collections.abc import Iterator
from typing import NamedTuple

from kvlib.arrays import Array, Backend, backend_of
from kvlib.codecs import Split
from kvlib.spec import CacheSpec

DRAFT = 32  # tokens: more than anybody drafts at once in speculative decoding


class Run(NamedTuple):
    """Rows k (Hkv, n, D) and v (Hkv, n, Dv or 0) of n consecutive positions from ``first`` on, exact."""

    first: int
    k: Array
    v: Array | None

    def before(self, n: int) -> "Run | None":
        """What is left of it if positions ``n`` and up are forgotten."""
        if n <= self.first:
            return None
        copy = backend_of(self.k).xp.asarray  # a view would hold on to the memory of the rest
        k, v = (x if x is None else copy(x[:, : n - self.first], copy=True) for x in (self.k, self.v))
        return Run(self.first, k, v)


class Tail:
    """Rows of K and V for the tokens that wait in every layer, oldest first, in the spec's dtype.

    When several tokens come at once and groups close, ``runs`` keeps what has just been encoded, exact: the first of
    the new queries see those tokens as if the later ones had not come yet. A long run goes when another layer is
    written to, for its own queries have been answered by then; one of up to `DRAFT` tokens stays until its layer is
    written to again, so that drafts can be taken back exactly.
    """

    __slots__ = ("backend", "k", "runs", "short", "spec", "v")

    def __init__(self, spec: CacheSpec, codec: Split, backend: Backend) -> None:
        self.spec, self.backend = spec, backend
        self.short = codec.tail + DRAFT
        lead = (spec.num_layers, spec.num_kv_heads, codec.tail)
        self.k = backend.zeros((*lead, spec.head_dim), spec.dtype)
        self.v = backend.zeros((*lead, spec.stored_value_dim), spec.dtype)
        self.runs: list[Run | None] = [None] * spec.num_layers

    def arrays(self) -> Iterator[Array]:
        rows = [(self.k, self.v), *((run.k, run.v) for run in self.runs if run)]
        yield from (k for k, _ in rows)
        if self.spec.stored_value_dim:
            yield from (v for _, v in rows)

    def copy(self) -> "Tail":
        twin = object.__new__(Tail)
        twin.spec, twin.backend, twin.short = self.spec, self.backend, self.short
        # not xp.asarray(copy=True): a tensor born in inference mode could not be written outside of it
        twin.k, twin.v = (self.backend.zeros(tuple(x.shape), self.spec.dtype) for x in (self.k, self.v))
        twin.k[...], twin.v[...] = self.k, self.v
        twin.runs = list(self.runs)  # never written into, only replaced
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

    def let_go(self, layer: int) -> None:
        """Give up the run of ``layer``, which is being written to, and long ones of all others."""
        for other, run in enumerate(self.runs):
            if run and (other == layer or run.k.shape[1] > self.short):
                self.runs[other] = None

    def read(self, layer: int, count: int, dtype: str) -> tuple[Array, Array]:
        """The first ``count`` rows: k (Hkv, count, D) and v (Hkv, count, Dv) in ``dtype``."""
        return self._as(dtype, self.k[layer, :, :count], self.v[layer, :, :count])

    def read_run(self, layer: int, start: int, stop: int, dtype: str) -> tuple[Array, Array]:
        """Rows start … stop-1 of the layer's run, as `read`."""
        _, k, v = self.runs[layer]
        return self._as(dtype, k[:, start:stop], v if v is None else v[:, start:stop])

    def _as(self, dtype: str, k: Array, v: Array | None) -> tuple[Array, Array]:
        k = self.backend.astype(k, dtype)
        if self.spec.latent:
            return k, k[..., : self.spec.latent]
        return k, self.backend.astype(v, dtype)
