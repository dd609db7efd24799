"""BlockStorage: the arrays behind the blocks, written and read through a codec."""

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import numpy as np

from kvlib.arrays import Array, Backend
from kvlib.codecs import Plain, Split
from kvlib.planes import Codec, Plane, Planes
from kvlib.spec import FLOAT_BYTES, CacheSpec

LARGEST = 2.0**100  # magnitudes that lossy codecs are given: the sum of a row is still a float32
SAFE = 2.0**10  # … and that all of them can store: float16, which holds their scales, ends at 2^16


class BlockStorage:
    """K and V of ``num_blocks`` blocks of ``block_size`` tokens, for every layer.

    Each plane of a codec is one array (num_layers, num_blocks, num_kv_heads, block_size, columns): a block of one layer
    is contiguous, and inside it every head's tokens lie side by side, which is what Q K^T walks over. A plane that
    keeps one row for several tokens has as many rows fewer in a block.

    A slot is the place of one token, counted along the block table of its sequence: slot s lies in block
    ``table[s // block_size]``. ``unit`` slots, those that the codec encodes together, are the least that can move.
    """

    def __init__(self, spec: CacheSpec, num_blocks: int, block_size: int, codec: Split, backend: Backend) -> None:
        self.spec, self.block_size, self.codec, self.backend = spec, block_size, codec, backend
        self.unit = codec.group
        self._lead = (spec.num_layers, num_blocks, spec.num_kv_heads)
        self._layout: dict[str, dict[str, Plane]] = {}  # the planes of "k" and of "v"
        self.k = self._allocate("k", codec.k, spec.head_dim)
        self.v = self._allocate("v", codec.v, spec.stored_value_dim)  # no planes at all when V is a view of K

    def _allocate(self, side: str, codec: Codec, width: int) -> Planes:
        if width:
            codec.check(width)
        self._layout[side] = layout = codec.planes(width) if width else {}
        return {
            name: self.backend.zeros((*self._lead, self.block_size // plane.tokens, plane.columns), plane.dtype)
            for name, plane in layout.items()
        }

    def arrays(self) -> Iterator[Array]:
        yield from self.k.values()
        yield from self.v.values()

    def holds(self, dtype: str) -> bool:
        """Whether rows lie here as numbers of ``dtype``, so that reading inside a block is no more than a view."""
        return all(isinstance(codec, Plain) and codec.dtype == dtype for codec in (self.codec.k, self.codec.v))

    # -- writing -----------------------------------------------------------------------------------------------------

    def encode(self, k: Array, v: Array | None) -> tuple[Planes, Planes]:
        """The planes of k (..., T, D) and v (..., T, Dv), ready for `write`.

        Raises:
            ValueError: a number in them is NaN, infinite, or too large for the codec; or its planes are not as it said.
        """
        return self._encode("k", self.codec.k, k), self._encode("v", self.codec.v, v) if self.v else {}

    def _encode(self, side: str, codec: Codec, rows: Array) -> Planes:
        if isinstance(codec, Plain):
            return codec.encode(rows)  # as they are: NaN stays NaN
        largest = self.largest(rows)
        planes = codec.encode(rows) if largest <= LARGEST else {}
        floats = [x for x in planes.values() if self.backend.dtype_name(x) in FLOAT_BYTES]
        if not largest <= LARGEST or not all(self.backend.xp.isfinite(x).all() for x in floats):
            raise ValueError(
                f"{side} must be finite and within reach of the codec {codec.name}, and its largest magnitude is "
                f"{largest:.3g}; clip it, or use codec='plain'"
            )
        *lead, tokens, _ = rows.shape
        said = {name: (*lead, tokens // x.tokens, x.columns) for name, x in self._layout[side].items()}
        came = {name: tuple(x.shape) for name, x in planes.items()}
        if came != said:  # a reader's codec; what fits would be written before the rest does not
            raise ValueError(f"{codec.name}.encode must give planes of shapes {said} as its `planes` says, got {came}")
        return planes

    def largest(self, rows: Array) -> float:
        """The largest magnitude; NaN if one of them is."""
        return float(self.backend.xp.max(self.backend.xp.abs(rows)))

    def check_waiting(self, k: Array, v: Array | None) -> None:
        """Raise ValueError, as `encode`, if one of k (Hkv, T, D) and v could not be encoded once its group closes."""
        for side, codec, rows in (("k", self.codec.k, k), ("v", self.codec.v, v if self.v else None)):
            if rows is None or isinstance(codec, Plain):
                continue
            rows = self.backend.astype(rows, self.spec.dtype)  # as the tail will hold them
            if not self.largest(rows) <= SAFE:
                alone = self.backend.xp.stack([rows] * self.unit, axis=-2)  # each token as a group of its own
                self._encode(side, codec, alone.reshape(*rows.shape[:-2], -1, rows.shape[-1]))

    def write(self, layer: int, tables: SequenceOf[np.ndarray], starts: SequenceOf[int], encoded: tuple) -> None:
        """Store encoded tokens (B, Hkv, T, …): those of sequence b from slot ``starts[b]`` on, behind ``tables[b]``.

        Starts and T are multiples of `unit`.
        """
        for side, planes, fresh in zip("kv", (self.k, self.v), encoded, strict=True):
            for name, values in fresh.items():
                plane, tokens = planes[name][layer], self._layout[side][name].tokens
                size, rows = self.block_size // tokens, [start // tokens for start in starts]
                if values.shape[2] == 1:  # a decode step: one row in each sequence, all in one assignment
                    ids = [int(table[row // size]) for table, row in zip(tables, rows, strict=True)]
                    slots = [row % size for row in rows]
                    plane[self.backend.asarray(ids), :, self.backend.asarray(slots)] = values[:, :, 0]
                else:
                    for table, row, run in zip(tables, rows, values, strict=True):
                        self._write_run(plane, size, table, row, run)

    def _write_run(self, plane: Array, size: int, table: np.ndarray, start: int, run: Array) -> None:
        """run (Hkv, T, columns) into consecutive rows: the end of a block, whole blocks at once, a beginning."""
        stop = start + run.shape[1]
        whole = min(stop, math.ceil(start / size) * size)
        last = max(whole, stop // size * size)
        for lo, hi in ((start, whole), (last, stop)):
            if lo < hi:
                plane[int(table[lo // size]), :, lo % size : lo % size + hi - lo] = run[:, lo - start : hi - start]
        if whole < last:
            ids = self.backend.asarray(table[whole // size : last // size])
            blocks = run[:, whole - start : last - start].reshape(run.shape[0], len(ids), size, -1)
            plane[ids] = blocks.swapaxes(0, 1)

    def copy(self, source: int, target: int) -> None:
        """Copy one block, all layers and planes."""
        for array in self.arrays():
            array[:, target] = array[:, source]

    def move(self, layer: int, table: np.ndarray, heads: np.ndarray, source: np.ndarray, target: np.ndarray) -> None:
        """Copy unit ``source[i]`` of head ``heads[i]`` over its unit ``target[i]``, encoded as it is."""
        units = self.block_size // self.unit
        to, come = ((table[x // units].astype(np.int64), x % units) for x in (target, source))
        to, come, heads = [[self.backend.asarray(i) for i in x] for x in (to, come, (heads,))]
        for array in self.arrays():
            plane = array[layer].reshape(*self._lead[1:], units, -1)
            plane[to[0], heads[0], to[1]] = plane[come[0], heads[0], come[1]]

    # -- reading -----------------------------------------------------------------------------------------------------

    def gather(self, side: str, layer: int, table: np.ndarray, start: int, stop: int) -> Planes:
        """The planes of slots start … stop-1, multiples of `unit`: (Hkv, rows, columns) each; ``side`` is "k" or "v".

        Slots of one block come back as views of it; those of several blocks are gathered into scratch memory. Either
        way the answer is good only until the next read or write.
        """
        first, last = start // self.block_size, (stop - 1) // self.block_size
        planes = {name: plane[layer] for name, plane in getattr(self, side).items()}
        tokens = {name: self._layout[side][name].tokens for name in planes}
        here = {
            name: slice((start - first * self.block_size) // count, (stop - first * self.block_size) // count)
            for name, count in tokens.items()
        }
        if first == last:
            return {name: plane[int(table[first]), :, here[name]] for name, plane in planes.items()}

        heads = np.arange(self.spec.num_kv_heads)[:, None]
        # (Hkv, blocks): a head's part of each block, in order; int64, for int32 ids times heads may pass 2^31
        parts = table[first : last + 1].astype(np.int64) * len(heads) + heads
        gathered = {}
        for name, plane in planes.items():
            part = plane.shape[2:]  # of one head in one block: (rows, columns)
            out = self.backend.scratch((side, name), (*parts.shape, *part), self.backend.dtype_name(plane))
            self.backend.take(plane.reshape(-1, *part), parts, out)
            gathered[name] = out.reshape(len(heads), -1, part[-1])[:, here[name]]
        return gathered

    def read(self, layer: int, table: np.ndarray, start: int, stop: int, dtype: str) -> tuple[Array, Array]:
        """Slots start … stop-1, decoded: k (Hkv, S, D) and v (Hkv, S, Dv) in ``dtype``. Good until the next read."""
        lo, hi = start // self.unit * self.unit, math.ceil(stop / self.unit) * self.unit
        here = slice(start - lo, stop - lo)
        k = self.codec.k.decode(self.gather("k", layer, table, lo, hi), dtype)[:, here]
        if self.spec.latent:
            return k, k[..., : self.spec.latent]
        return k, self.codec.v.decode(self.gather("v", layer, table, lo, hi), dtype)[:, here]
