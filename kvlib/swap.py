"""Swap: one sequence leaves the cache for host memory, and comes back as it was, bit for bit.

What moves is what is stored: encoded planes as they are, the exact tail, what eviction knows. So neither way costs
accuracy, whatever the codec, and a 4-bit sequence moves a quarter of the bytes that a 16-bit one does.

Source: swapping as recovery from preemption, Kwon et al. 2023 (arXiv:2309.06180), section 4.5.
"""

from collections.abc import Callable
from typing import NamedTuple

from kvlib.arrays import Array
from kvlib.cache import KVCache
from kvlib.spec import CacheSpec
from kvlib.tables import Table
from kvlib.tail import Run, Tail


class Form(NamedTuple):
    """What two caches must have in common for one to take in a sequence of the other."""

    spec: CacheSpec
    codec: object
    eviction: object
    block_size: int
    max_tokens: int
    backend: str

    @classmethod
    def of(cls, cache: KVCache) -> "Form":
        sizes = cache.block_size, cache.max_tokens
        return cls(cache.spec, cache.codec, cache.eviction, *sizes, cache.backend.name)


class Swapped(NamedTuple):
    """A sequence in host memory.

    ``table`` has its lengths, tail and what eviction knows, with the ids of blocks that are no longer its own;
    ``planes`` are those of the cache's storage, each (num_layers, blocks, Hkv, rows, columns), in its order.
    """

    form: Form
    table: Table
    planes: list[Array]

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.table.length

    @property
    def num_blocks(self) -> int:
        """Blocks that it needs to come back."""
        return self.table.num_blocks

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays: what has crossed the bus, and the table."""
        return sum(x.nbytes for x in (*self.planes, *self.table.arrays()))


def take_out(cache: KVCache, seq: int) -> Swapped:
    """Copy sequence ``seq`` to host memory, and close it; blocks that others share stay with those.

    Raises KeyError: no such sequence. MemoryError: the host has no room. Nothing has changed then.
    """
    table = cache._tables[seq].copy()
    ids = cache.backend.asarray(table.blocks)
    planes = [_to_host(array[:, ids]) for array in cache._storage.arrays()]
    if table.tail:
        _move_tail(table.tail, _to_host)
    cache.close(seq)
    return Swapped(Form.of(cache), table, planes)


def put_back(cache: KVCache, swapped: Swapped) -> int:
    """Open a sequence that is what was taken out, in blocks of its own, and return its id.

    ``swapped`` is only read: what comes back twice is there twice. It may go into another cache of the same form.

    Raises:
        ValueError: the cache has another form: spec, codec, eviction, block size, max_tokens, backend.
        CacheFull: the pool has too few free blocks. Nothing has changed in either case.
    """
    ours = Form.of(cache)
    if ours != swapped.form:
        differ = [
            f"{name} is {mine!r} here and was {its!r}"
            for name, mine, its in zip(Form._fields, ours, swapped.form, strict=True)
            if mine != its
        ]
        raise ValueError(f"the sequence was taken out of a cache of another form: {'; '.join(differ)}")
    table = swapped.table.copy()
    if table.tail:
        table.tail.backend = cache.backend
        _move_tail(table.tail, cache.backend.asarray)
    fresh = cache.pool.allocate(table.num_blocks)
    try:
        ids = cache.backend.asarray(fresh)
        for array, plane in zip(cache._storage.arrays(), swapped.planes, strict=True):
            array[:, ids] = cache.backend.asarray(plane)
    except BaseException:
        cache.pool.release(fresh)
        raise
    table.ids[: table.num_blocks] = fresh
    return cache._tables._add(table)


def _to_host(x: Array) -> Array:
    return x.cpu() if hasattr(x, "cpu") else x


def _move_tail(tail: Tail, to: Callable[[Array], Array]) -> None:
    tail.k, tail.v = to(tail.k), to(tail.v)
    tail.runs = [run and Run(run.first, to(run.k), run.v if run.v is None else to(run.v)) for run in tail.runs]
