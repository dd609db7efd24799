"""KVCache: the composition of block tables, storage and attention behind one small interface."""

import itertools
import math
from collections.abc import Sequence as SequenceOf

import numpy as np

from kvlib.arrays import Array, check_float, get_backend
from kvlib.codecs import Codec, get_codec
from kvlib.spec import CacheSpec
from kvlib.storage import BlockStorage
from kvlib.tables import BlockTables, Table
from kvlib.tiling import attend_sequences


class KVCache:
    """A key-value cache for a batch of sequences.

    Args:
        spec: shapes and dtype of what is stored.
        batch: sequences opened at once, with ids 0 … batch-1; 0 for none.
        max_tokens: the longest a sequence may become.
        block_size: tokens per block. None is one block as long as ``max_tokens``: the contiguous cache.
        num_blocks: blocks in the pool. None is enough for ``batch`` (at least one) full sequences.
        codec: how a token is stored: a name ("plain") or a codec object.
        eviction: which tokens stay. None, all of them, is the only answer so far.
        backend: "numpy" or "torch"; device: "cpu" or "cuda" (torch only).

    Raises:
        ValueError: a size is not a positive integer, or a name is unknown. Every method checks its arguments first, and
            leaves the cache exactly as it was when it raises.

    Source: paged storage after PagedAttention, Kwon et al. 2023 (arXiv:2309.06180).
    """

    def __init__(
        self,
        spec: CacheSpec,
        batch: int = 1,
        max_tokens: int = 4096,
        block_size: int | None = None,
        num_blocks: int | None = None,
        codec: str | Codec = "plain",
        eviction: None = None,
        backend: str = "numpy",
        device: str | None = None,
    ) -> None:
        if not isinstance(spec, CacheSpec):
            raise TypeError(f"spec must be a kvlib.CacheSpec, got {type(spec).__name__}")
        self.batch = _size("batch", batch, least=0)
        self.max_tokens = _size("max_tokens", max_tokens)
        self.block_size = self.max_tokens if block_size is None else _size("block_size", block_size)
        self._max_blocks = math.ceil(self.max_tokens / self.block_size)  # in one sequence
        enough = max(self.batch, 1) * self._max_blocks
        self.num_blocks = enough if num_blocks is None else _size("num_blocks", num_blocks)
        if eviction is not None:
            raise ValueError(f"eviction must be None, for every token stays; got {eviction!r}")
        self.spec = spec
        self.backend = get_backend(backend, device)
        self.codec = get_codec(codec, spec.dtype)
        self._storage = BlockStorage(spec, self.num_blocks, self.block_size, self.codec, self.backend)
        self.reset()

    def __repr__(self) -> str:
        in_use = self.num_blocks - self.num_free_blocks
        blocks = f"{in_use} of {self.num_blocks} blocks of {self.block_size} tokens in use"
        where = self.backend.name if self.backend.device is None else f"{self.backend.name} on {self.backend.device}"
        return f"KVCache({self.spec}, {type(self.codec).__name__}, {where}; {len(self.lengths)} sequences, {blocks})"

    # -- sequences ---------------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens seen by each open sequence: {sequence id: tokens}."""
        return {seq: table.length for seq, table in self._tables.open_tables.items()}

    @property
    def num_free_blocks(self) -> int:
        return self._tables.pool.num_free

    @property
    def nbytes(self) -> int:
        """Bytes of every array the cache holds: planes, reference counts, free list, block tables, lengths."""
        return sum(array.nbytes for array in itertools.chain(self._storage.arrays(), self._tables.arrays()))

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks in use; a block that several sequences share counts once."""
        per_block = sum(array.nbytes for array in self._storage.arrays()) // self.num_blocks
        return per_block * (self.num_blocks - self.num_free_blocks)

    def block_table(self, seq: int) -> list[int]:
        """The ids of the blocks that hold ``seq``, in position order."""
        return self._tables[seq].blocks.tolist()

    def open(self) -> int:
        """Start an empty sequence and return its id. It takes no block until something is appended."""
        return self._tables.open()

    def fork(self, seq: int) -> int:
        """A new sequence with the same tokens. The two share every block; who writes into a shared one copies it."""
        return self._tables.fork(seq)

    def truncate(self, seq: int, n: int) -> None:
        """Forget all but the first ``n`` tokens, in every layer; blocks that become empty return to the pool."""
        self._tables.truncate(seq, n)

    def close(self, seq: int) -> None:
        """Forget the sequence and return its blocks; its id is not used again until `reset`."""
        self._tables.close(seq)

    def reset(self) -> None:
        """Back to the state after construction: every block free, ``batch`` empty sequences with ids 0 … batch-1."""
        self._tables = BlockTables(self.num_blocks, self.block_size, self._max_blocks, self.spec.num_layers)
        for _ in range(self.batch):
            self.open()

    # -- tokens ------------------------------------------------------------------------------------------------------

    def append(self, k: Array, v: Array | None = None, layer: int = 0, seqs: SequenceOf[int] | None = None) -> None:
        """Add T tokens to one layer of each sequence.

        k (B, Hkv, T, D) and v (B, Hkv, T, Dv), in any float dtype: the codec stores them in its own. ``seqs`` names the
        B sequences; None means all open ones, in the order of their ids. v is left out when the spec is latent.
        The first layer to reach a position reserves its slot; the other layers write into it.

        Raises:
            ValueError, TypeError, KeyError, IndexError: shape, dtype or backend, sequence id, layer.
            CacheFull: the pool has too few free blocks. In every case the cache is as it was before.
        """
        tables = self._resolve(layer, seqs)
        k = self._checked("k", k, len(tables), self.spec.num_kv_heads, self.spec.head_dim)
        tokens = k.shape[2]
        if self.spec.latent is None:
            v = self._checked("v", v, len(tables), self.spec.num_kv_heads, self.spec.value_dim)
            if v.shape[2] != tokens or v.dtype != k.dtype:
                came = f"k is {tuple(k.shape)} {k.dtype}, v is {tuple(v.shape)} {v.dtype}"
                raise ValueError(f"k and v must have the same number of tokens and the same dtype: {came}")
        elif v is not None:
            raise ValueError(f"this spec is latent: V is the first {self.spec.latent} columns of K; leave v out")
        starts = [int(table.filled[layer]) for table in tables.values()]
        for seq, start in zip(tables, starts, strict=True):
            if start + tokens > self.max_tokens:
                limit = f"{tokens} more would exceed max_tokens={self.max_tokens}"
                raise ValueError(f"sequence {seq} holds {start} tokens: {limit}; build the cache with a larger one")

        encoded = self._storage.encode(k, v)
        self._tables.reserve(list(tables.values()), starts, tokens, self._storage.copy)
        self._storage.write(layer, [table.ids for table in tables.values()], starts, encoded)
        for table in tables.values():
            table.filled[layer] += tokens

    def attend(
        self, q: Array, layer: int = 0, seqs: SequenceOf[int] | None = None, scale: float | None = None
    ) -> Array:
        """Causal attention of the last T positions of each sequence over all of its tokens.

        q (B, Hq, T, D), Hq a multiple of Hkv -> (B, Hq, T, Dv) in the dtype of q. ``scale`` defaults to 1 / sqrt(D).
        Computed in float32, or float64 if q is. Each cached byte is read once.

        Raises:
            ValueError, TypeError, KeyError, IndexError: shape, dtype or backend, more positions than the layer holds,
            sequence id, layer.
        """
        tables = self._resolve(layer, seqs)
        q = self._checked("q", q, len(tables), None, self.spec.head_dim)
        batch, heads, tokens, width = q.shape
        for seq, table in tables.items():
            if tokens > table.filled[layer]:
                held = f"layer {layer} of sequence {seq} holds {table.filled[layer]} tokens"
                raise ValueError(f"q asks for the last {tokens} positions, but {held}; append k and v first")
        dtype = "float64" if self.backend.dtype_name(q) == "float64" else "float32"
        scaled = self.backend.astype(q, dtype) * (1 / math.sqrt(width) if scale is None else float(scale))
        rows = scaled.reshape(batch, self.spec.num_kv_heads, -1, width)  # query heads of one KV head become its rows
        with self.backend.exact():
            outputs = attend_sequences(rows, self._storage, layer, list(tables.values()), tokens, dtype)
        out = self.backend.xp.stack(outputs).reshape(batch, heads, tokens, self.spec.value_dim)
        return self.backend.astype(out, self.backend.dtype_name(q))

    def read(self, seq: int, layer: int = 0) -> tuple[Array, Array, np.ndarray]:
        """What is stored, decoded: k (Hkv, S, D), v (Hkv, S, Dv) in the spec's dtype and positions (S,), in order.

        Copies: writing into them does not change the cache.
        """
        (table,) = self._resolve(layer, [seq]).values()
        length = int(table.filled[layer])
        if length:
            k, v = self._storage.read(layer, table.ids, 0, length, self.spec.dtype)
        else:
            widths = self.spec.head_dim, self.spec.value_dim
            k, v = (self.backend.zeros((self.spec.num_kv_heads, 0, width), self.spec.dtype) for width in widths)
        return self.backend.xp.asarray(k, copy=True), self.backend.xp.asarray(v, copy=True), np.arange(length)

    # -- checks ------------------------------------------------------------------------------------------------------

    def _resolve(self, layer: int, seqs: SequenceOf[int] | None) -> dict[int, Table]:
        if not isinstance(layer, int | np.integer) or isinstance(layer, bool) or not 0 <= layer < self.spec.num_layers:
            raise IndexError(f"layer must be an integer from 0 to {self.spec.num_layers - 1}, got {layer!r}")
        if isinstance(seqs, int | float | np.number):
            raise TypeError(f"seqs must be a list of sequence ids, got {seqs!r}: write seqs=[{seqs!r}]")
        if seqs is None and not self._tables.open_tables:
            raise ValueError("the cache has no open sequence, and this needs at least one; call open() first")
        seqs = list(self._tables.open_tables if seqs is None else seqs)
        tables = {seq: self._tables[seq] for seq in seqs}
        if not tables or len(tables) < len(seqs):
            raise ValueError(f"seqs must name at least one sequence, and none twice, got {seqs}")
        return tables

    def _checked(self, name: str, x: Array, batch: int, heads: int | None, width: int) -> Array:
        """``x`` if it is a float array (batch, heads, T, width) of this backend; heads=None: a multiple of Hkv."""
        check_float(name, x, self.backend)
        groups = self.spec.num_kv_heads
        fits = x.ndim == 4 and x.shape[0] == batch and x.shape[2] >= 1 and x.shape[3] == width
        if fits and (x.shape[1] == heads or (heads is None and x.shape[1] >= groups and x.shape[1] % groups == 0)):
            return self.backend.detach(x)
        expected = f"({batch}, {heads or f'a multiple of {groups}'}, T >= 1, {width})"
        raise ValueError(f"{name} must have shape (sequences, heads, tokens, width) = {expected}, got {tuple(x.shape)}")


def _size(name: str, value: int, least: int = 1) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)
