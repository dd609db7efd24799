"""BlockStorage: the arrays behind the blocks, written and read through a codec."""

from collections.abc import Iterator

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
        """The planes of rows k (N, Hkv, D) and v (N, Hkv, Dv), ready for `write`."""
        return self.codec.encode(k), self.codec.encode(v) if self.v else {}

    def write(self, layer: int, blocks: np.ndarray, slots: np.ndarray, encoded: tuple[dict, dict]) -> None:
        """Store encoded rows: row n goes to slot ``slots[n]`` of block ``blocks[n]``."""
        blocks, slots = self.backend.asarray(blocks), self.backend.asarray(slots)
        for planes, rows in zip((self.k, self.v), encoded):
            for name, values in rows.items():
                planes[name][layer][blocks, :, slots] = values

    def read(self, layer: int, table: np.ndarray, start: int, stop: int, dtype: str) -> tuple[Array, Array]:
        """Tokens start..stop-1 of the sequence whose blocks are ``table``: k (Hkv, S, D) and v (Hkv, S, Dv) in ``dtype``.

        Tokens that lie in one block come back as a view of it when the codec allows; several blocks are gathered.
        """
        k = self.codec.decode(self._rows(self.k, layer, table, start, stop), dtype)
        if self.spec.latent:
            return k, k[..., : self.spec.latent]
        return k, self.codec.decode(self._rows(self.v, layer, table, start, stop), dtype)

    def copy(self, source: int, target: int) -> None:
        """Copy one block, all layers and planes."""
        for array in self.arrays():
            array[:, target] = array[:, source]

    def _rows(self, planes: dict[str, Array], layer: int, table: np.ndarray, start: int, stop: int) -> dict[str, Array]:
        first, last = start // self.block_size, (stop - 1) // self.block_size
        offset = first * self.block_size
        if first == last:
            return {name: a[layer, int(table[first]), :, start - offset : stop - offset] for name, a in planes.items()}
        heads = np.arange(self.spec.num_kv_heads)[:, None]
        rows = table[first : last + 1][None, :] * len(heads) + heads  # (Hkv, blocks): each head's blocks in order

        def gather(plane: Array) -> Array:
            _, _, block_size, columns = plane.shape
            tokens = self.backend.take(plane.reshape(-1, block_size, columns), rows)
            return tokens.reshape(len(heads), -1, columns)[:, start - offset : stop - offset]

        return {name: gather(a[layer]) for name, a in planes.items()}
