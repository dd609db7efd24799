"""KVCache: blocks of tokens, a codec, and attention as a fold over tiles."""

import itertools
import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from kvlib.arrays import Array, check_float, get_backend, num_threads
from kvlib.attention import Partial, attend_strips, attend_tile, causal_bias, fold
from kvlib.blocks import BlockPool, CacheFull
from kvlib.codecs import Codec, get_codec
from kvlib.spec import CacheSpec
from kvlib.storage import BlockStorage

TILE_BYTES = 1 << 20  # K of one tile, decoded to float32: what a core's second-level cache can hold
TILE_SCORES = 1 << 20  # scores of one tile, over all heads and rows: keeps a long prefill from building T x S
SERIAL_GEMM = 1 << 18  # multiply-adds up to which OpenBLAS stays on the calling thread


@dataclass(slots=True)
class _Sequence:
    """One sequence's block table and how many tokens each layer has stored."""

    table: np.ndarray  # (blocks per sequence,) int32; the first num_blocks entries are in use
    filled: np.ndarray  # (num_layers,) int64
    num_blocks: int = 0

    @property
    def length(self) -> int:
        return int(self.filled.max())

    @property
    def blocks(self) -> np.ndarray:
        return self.table[: self.num_blocks]


class KVCache:
    """A key-value cache for a batch of sequences.

    Args:
        spec: shapes and dtype of what is stored.
        batch: sequences opened at once, with ids 0 … batch-1; 0 for none.
        max_tokens: the longest a sequence may become.
        block_size: tokens per block. None is one block as long as ``max_tokens``: the contiguous cache.
        num_blocks: blocks in the pool. None is enough for ``batch`` (at least one) full sequences.
        codec: how a token is stored: a name ("plain") or a codec object.
        backend: "numpy" or "torch"; device: "cpu" or "cuda" (torch only).

    Raises:
        ValueError: a size is not positive, or a name is unknown. Every method checks its arguments first and leaves the
            cache exactly as it was when it raises.

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
        backend: str = "numpy",
        device: str | None = None,
    ) -> None:
        block_size = max_tokens if block_size is None else block_size
        for name, value, least in (("batch", batch, 0), ("max_tokens", max_tokens, 1), ("block_size", block_size, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        self.spec, self.batch, self.max_tokens, self.block_size = spec, batch, max_tokens, block_size
        self._table_size = math.ceil(max_tokens / block_size)
        num_blocks = max(batch, 1) * self._table_size if num_blocks is None else num_blocks
        if not isinstance(num_blocks, int) or num_blocks < 1:
            raise ValueError(f"num_blocks must be an integer of at least 1, got {num_blocks!r}")
        self.backend = get_backend(backend, device)
        self.codec = get_codec(codec, spec.dtype)
        self._pool = BlockPool(num_blocks)
        self._storage = BlockStorage(spec, num_blocks, block_size, self.codec, self.backend)
        self.reset()

    # -- sequences ---------------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens seen by each open sequence: {sequence id: tokens}."""
        return {seq: state.length for seq, state in self._sequences.items()}

    @property
    def num_blocks(self) -> int:
        return len(self._pool)

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def nbytes(self) -> int:
        """Bytes of every array the cache holds: planes, reference counts, free list, block tables, lengths."""
        tables = (array for state in self._sequences.values() for array in (state.table, state.filled))
        return sum(a.nbytes for a in itertools.chain(self._storage.arrays(), self._pool.arrays(), tables))

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks in use; a block that several sequences share counts once."""
        per_block = sum(a.nbytes for a in self._storage.arrays()) // self.num_blocks
        return per_block * (self.num_blocks - self.num_free_blocks)

    def block_table(self, seq: int) -> list[int]:
        """The ids of the blocks that hold ``seq``, in position order."""
        return self._state(seq).blocks.tolist()

    def open(self) -> int:
        """Start an empty sequence and return its id. Takes no block until something is appended."""
        seq = self._next_id
        self._next_id += 1
        table = np.full(self._table_size, -1, np.int32)
        self._sequences[seq] = _Sequence(table, np.zeros(self.spec.num_layers, np.int64))
        return seq

    def fork(self, seq: int) -> int:
        """A new sequence with the same tokens. They share every block; whoever writes into a shared one copies it."""
        parent = self._state(seq)
        twin = self.open()
        self._pool.share(parent.blocks)
        self._sequences[twin] = _Sequence(parent.table.copy(), parent.filled.copy(), parent.num_blocks)
        return twin

    def truncate(self, seq: int, n: int) -> None:
        """Forget all but the first ``n`` tokens, in every layer; blocks that become empty return to the pool."""
        state = self._state(seq)
        if not 0 <= n <= state.length:
            raise ValueError(f"sequence {seq} holds {state.length} tokens: cannot truncate it to {n}")
        keep = math.ceil(n / self.block_size)
        self._pool.release(state.table[keep : state.num_blocks])
        state.table[keep : state.num_blocks] = -1
        state.num_blocks = keep
        np.minimum(state.filled, n, out=state.filled)

    def close(self, seq: int) -> None:
        """Forget the sequence and return its blocks; the id is not used again until `reset`."""
        self._pool.release(self._state(seq).blocks)
        del self._sequences[seq]

    def reset(self) -> None:
        """Back to the state after construction: every block free, ``batch`` empty sequences with ids 0 … batch-1."""
        self._pool = BlockPool(self.num_blocks)
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
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
        states = self._resolve(layer, seqs)
        k = self._checked("k", k, len(states), self.spec.num_kv_heads, self.spec.head_dim)
        tokens = k.shape[2]
        if self.spec.latent is None:
            v = self._checked("v", v, len(states), self.spec.num_kv_heads, self.spec.value_dim)
            if v.shape[2] != tokens or v.dtype != k.dtype:
                raise ValueError(f"k and v must agree: k is {tuple(k.shape)} {k.dtype}, v is {tuple(v.shape)} {v.dtype}")
        elif v is not None:
            raise ValueError(f"this spec is latent: V is the first {self.spec.latent} columns of K; leave v out")
        starts = np.array([state.filled[layer] for state in states.values()], np.int64)
        for seq, start in zip(states, starts.tolist()):
            if start + tokens > self.max_tokens:
                raise ValueError(
                    f"sequence {seq} holds {start} tokens: {tokens} more would exceed max_tokens={self.max_tokens}"
                )

        encoded = self._storage.encode(*(x if x is None else _rows(x) for x in (k, v)))
        self._reserve(list(states.values()), starts, tokens)
        positions = starts[:, None] + np.arange(tokens)
        tables = np.stack([state.table for state in states.values()])
        blocks = np.take_along_axis(tables, positions // self.block_size, axis=1)
        self._storage.write(layer, blocks.reshape(-1), (positions % self.block_size).reshape(-1), encoded)
        for state in states.values():
            state.filled[layer] += tokens

    def attend(
        self, q: Array, layer: int = 0, seqs: SequenceOf[int] | None = None, scale: float | None = None
    ) -> Array:
        """Causal attention of the last T positions of each sequence over all of its tokens.

        q (B, Hq, T, D), Hq a multiple of Hkv -> (B, Hq, T, Dv) in the dtype of q. ``scale`` defaults to 1 / sqrt(D).
        Computed in float32, or float64 if q is. Each cached byte is read once.
        """
        states = self._resolve(layer, seqs)
        q = self._checked("q", q, len(states), None, self.spec.head_dim)
        batch, heads, tokens, width = q.shape
        for seq, state in states.items():
            if tokens > state.filled[layer]:
                raise ValueError(
                    f"q asks for the last {tokens} positions, but layer {layer} of sequence {seq} holds "
                    f"{state.filled[layer]} tokens; append k and v first"
                )
        dtype = "float64" if self.backend.dtype_name(q) == "float64" else "float32"
        scale = 1 / math.sqrt(width) if scale is None else scale
        rows = self.backend.astype(q, dtype) * scale
        rows = rows.reshape(batch, self.spec.num_kv_heads, -1, width)  # a KV head's query heads become its rows
        outputs = self._attend_rows(rows, list(states.values()), layer, tokens, dtype)
        out = self.backend.xp.stack(outputs).reshape(batch, heads, tokens, self.spec.value_dim)
        return self.backend.astype(out, self.backend.dtype_name(q))

    def read(self, seq: int, layer: int = 0) -> tuple[Array, Array, np.ndarray]:
        """What is stored, decoded: k (Hkv, S, D), v (Hkv, S, Dv) in the spec's dtype and positions (S,), in order.

        Copies: writing into them does not change the cache.
        """
        (state,) = self._resolve(layer, [seq]).values()
        length = int(state.filled[layer])
        if length == 0:
            shape = (self.spec.num_kv_heads, 0)
            k, v = (self.backend.zeros((*shape, d), self.spec.dtype) for d in (self.spec.head_dim, self.spec.value_dim))
        else:
            k, v = self._storage.read(layer, state.table, 0, length, self.spec.dtype)
        return self.backend.xp.asarray(k, copy=True), self.backend.xp.asarray(v, copy=True), np.arange(length)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _reserve(self, states: list[_Sequence], starts: np.ndarray, tokens: int) -> None:
        """Give every sequence blocks of its own for the slots it is about to write, or raise CacheFull."""
        grow, copies, leaving = [], [], {}
        for state, start in zip(states, starts.tolist()):
            last = (start + tokens - 1) // self.block_size
            for index in range(start // self.block_size, min(last + 1, state.num_blocks)):
                block = int(state.table[index])
                if self._pool.refs[block] - leaving.get(block, 0) > 1:  # the last one to hold it may keep it
                    leaving[block] = leaving.get(block, 0) + 1
                    copies.append((state, index))
            grow.append(max(0, last + 1 - state.num_blocks))
        fresh = iter(self._pool.allocate(len(copies) + sum(grow)))
        for state, index in copies:
            shared, own = int(state.table[index]), int(next(fresh))
            self._storage.copy(shared, own)
            self._pool.release([shared])
            state.table[index] = own
        for state, count in zip(states, grow):
            state.table[state.num_blocks : state.num_blocks + count] = list(itertools.islice(fresh, count))
            state.num_blocks += count

    def _attend_rows(self, q: Array, states: list, layer: int, tokens: int, dtype: str) -> list[Array]:
        """q (B, Hkv, R, D), scaled -> B outputs (Hkv, R, Dv). Few rows: the tiles are shared out among threads."""
        _, kv_heads, rows, width = q.shape
        tile = max(16, min(TILE_BYTES // (4 * kv_heads * width), TILE_SCORES // (kv_heads * rows)))
        strip = 1 << max(0, SERIAL_GEMM // (rows * width)).bit_length() - 1 if rows * width <= SERIAL_GEMM else 0
        threaded = rows > 1 and strip >= 64  # one row is a matrix-vector product, which BLAS shares out by itself
        spans = []
        for index, state in enumerate(states):
            length = int(state.filled[layer])
            pieces = math.ceil(num_threads() / len(states)) if threaded else 1
            step = tile * math.ceil(length / (tile * pieces))
            spans += [(index, start, min(start + step, length)) for start in range(0, length, step)]

        def attend_span(span: tuple[int, int, int]) -> Partial:
            index, start, stop = span
            return fold(self._partials(q[index], states[index], layer, start, stop, tile, tokens, strip, dtype))

        each = self.backend.map(attend_span, spans) if threaded else map(attend_span, spans)
        by_sequence = itertools.groupby(zip(spans, each), key=lambda pair: pair[0][0])
        return [fold(partial for _, partial in group).normalise() for _, group in by_sequence]

    def _partials(self, q, state, layer, start, stop, tile, tokens, strip, dtype) -> Iterator[Partial]:
        """The partial of each tile of positions start..stop-1; only tiles that reach past a query need a mask."""
        length = int(state.filled[layer])
        arange = self.backend.xp.arange
        for lo in range(start, stop, tile):
            hi = min(lo + tile, stop)
            k, v = self._storage.read(layer, state.table, lo, hi, dtype)
            if hi - 1 > length - tokens:
                queries, keys = (self.backend.asarray(arange(a, b)) for a, b in ((length - tokens, length), (lo, hi)))
                yield attend_tile(q, k, v, causal_bias(queries, keys, dtype))
            elif strip:
                yield attend_strips(q, k, v, strip)
            else:
                yield attend_tile(q, k, v)

    def _state(self, seq: int) -> _Sequence:
        try:
            return self._sequences[seq]
        except (KeyError, TypeError):
            raise KeyError(f"sequence {seq!r} is not open; open sequences: {list(self._sequences)}") from None

    def _resolve(self, layer: int, seqs: SequenceOf[int] | None) -> dict[int, _Sequence]:
        if not 0 <= layer < self.spec.num_layers:
            raise IndexError(f"layer must be 0 … {self.spec.num_layers - 1}, got {layer}")
        seqs = list(self._sequences) if seqs is None else list(seqs)
        if not seqs or len(set(seqs)) < len(seqs):
            raise ValueError(f"seqs must name at least one sequence, and none twice, got {seqs}")
        return {seq: self._state(seq) for seq in seqs}

    def _checked(self, name: str, x: Array, batch: int, heads: int | None, width: int) -> Array:
        check_float(name, x, self.backend)
        shape = (batch, heads or f"a multiple of {self.spec.num_kv_heads}", "T >= 1", width)
        fits = x.ndim == 4 and x.shape[0] == batch and x.shape[2] >= 1 and x.shape[3] == width
        if not fits or x.shape[1] == 0 or x.shape[1] % self.spec.num_kv_heads or x.shape[1] != (heads or x.shape[1]):
            expected = ", ".join(map(str, shape))
            raise ValueError(f"{name} must have shape (sequences, heads, tokens, width) = ({expected}), got {tuple(x.shape)}")
        return self.backend.detach(x)


def _rows(x: Array) -> Array:
    """(B, H, T, D) -> (B * T, H, D): one row per token."""
    batch, heads, tokens, width = x.shape
    return x.swapaxes(1, 2).reshape(batch * tokens, heads, width)
