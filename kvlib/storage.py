"""BlockStorage: the arrays behind the blocks, written and read through a codec."""

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import numpy as np

from kvlib.arrays import Array, Backend
from kvlib.codecs import Codec
from kvlib.spec import CacheSpec


class BlockStorage:
    """K and V of ``num_blocks`` blocks of ``block_size`` tokens, for every layer.

    Each plane of the codec is one array (num_layers, num_blocks, num_kv_heads, block_size, columns): a block of one
    layer is contiguous, and inside it every head's tokens lie side by side, which is what Q K^T walks over.
    """

    def __init__(self, spec: CacheSpec, num_blocks: int, block_size: int, codec: Codec, backend: Backend) -> None:
        self.spec, self.block_size, self.codec, self.backend = spec, block_size, codec, backend
        lead = (spec.num_layers, num_blocks, spec.num_kv_heads, block_size)

        def allocate(width: int) -> dict[str, Array]:
            planes = codec.planes(width) if width else {}
            return {name: backend.zeros((*lead, columns), dtype) for name, (columns, dtype) in planes.items()}

        self.k = allocate(spec.head_dim)
        self.v = allocate(spec.stored_value_dim)  # no planes at all when V is a view of K

    def arrays(self) -> Iterator[Array]:
        yield from self.k.values()
        yield from self.v.values()

    def encode(self, k: Array, v: Array | None) -> tuple[dict[str, Array], dict[str, Array]]:
        """The planes of k (B, Hkv, T, D) and v (B, Hkv, T, Dv), ready for `write`."""
        return self.codec.encode(k), self.codec.encode(v) if self.v else {}

    def write(
        self, layer: int, tables: SequenceOf[np.ndarray], starts: SequenceOf[int], encoded: tuple[dict, dict]
    ) -> None:
        """Store encoded tokens: those of sequence b from position ``starts[b]`` on, behind its table ``tables[b]``."""
        for planes, fresh in zip((self.k, self.v), encoded, strict=True):
            for name, values in fresh.items():
                plane = planes[name][layer]
                if values.shape[2] == 1:  # a decode step: one slot in each sequence, all in one assignment
                    ids = [int(table[start // self.block_size]) for table, start in zip(tables, starts, strict=True)]
                    slots = [start % self.block_size for start in starts]
                    plane[self.backend.asarray(ids), :, self.backend.asarray(slots)] = values[:, :, 0]
                else:
                    for table, start, tokens in zip(tables, starts, values, strict=True):
                        self._write_run(plane, table, start, tokens)

    def _write_run(self, plane: Array, table: np.ndarray, start: int, tokens: Array) -> None:
        """tokens (Hkv, T, columns) into consecutive slots: the end of a block, whole blocks at once, a beginning."""
        size, stop = self.block_size, start + tokens.shape[1]
        whole = min(stop, math.ceil(start / size) * size)
        tail = max(whole, stop // size * size)
        for lo, hi in ((start, whole), (tail, stop)):
            if lo < hi:
                plane[int(table[lo // size]), :, lo % size : lo % size + hi - lo] = tokens[:, lo - start : hi - start]
        if whole < tail:
            ids = self.backend.asarray(table[whole // size : tail // size])
            blocks = tokens[:, whole - start : tail - start].reshape(tokens.shape[0], len(ids), size, -1)
            plane[ids] = blocks.swapaxes(0, 1)

    def read(self, layer: int, table: np.ndarray, start: int, stop: int, dtype: str) -> tuple[Array, Array]:
        """Tokens start … stop-1 of the sequence behind ``table``: k (Hkv, S, D) and v (Hkv, S, Dv) in ``dtype``.

        Tokens of one block come back as a view of it when the codec allows; those of several blocks are gathered into
        scratch memory. Either way the answer is good only until the next read or write.
        """
        k = self.codec.decode(self._gather("k", layer, table, start, stop), dtype)
        if self.spec.latent:
            return k, k[..., : self.spec.latent]
        return k, self.codec.decode(self._gather("v", layer, table, start, stop), dtype)

    def copy(self, source: int, target: int) -> None:
        """Copy one block, all layers and planes."""
        for array in self.arrays():
            array[:, target] = array[:, source]

    def _gather(self, side: str, layer: int, table: np.ndarray, start: int, stop: int) -> dict[str, Array]:
        """The planes of tokens start … stop-1, (Hkv, S, columns) each."""
        first, last = start // self.block_size, (stop - 1) // self.block_size
        here = slice(start - first * self.block_size, stop - first * self.block_size)
        planes = {name: plane[layer] for name, plane in getattr(self, side).items()}
        if first == last:
            return {name: plane[int(table[first]), :, here] for name, plane in planes.items()}

        heads = np.arange(self.spec.num_kv_heads)[:, None]
        # (Hkv, blocks): a head's part of each block, in order; int64, for int32 ids times heads may pass 2^31
        rows = table[first : last + 1].astype(np.int64) * len(heads) + heads
        tokens = {}
        for name, plane in planes.items():
            part = plane.shape[2:]  # of one head in one block: (block_size, columns)
            out = self.backend.scratch((side, name), (*rows.shape, *part), self.backend.dtype_name(plane))
            self.backend.take(plane.reshape(-1, *part), rows, out)
            tokens[name] = out.reshape(len(heads), -1, part[-1])[:, here]
        return tokens
