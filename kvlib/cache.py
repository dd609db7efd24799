"""KVCache: the composition of block tables, storage and attention behind one small interface."""

import functools
import itertools
import math
from collections.abc import Sequence as SequenceOf

import numpy as np

from kvlib.arrays import Array, check_float, get_backend
from kvlib.attending import attend, attend_path
from kvlib.blocks import BlockPool
from kvlib.checks import check_shape, checked_policy, checked_sinks, checked_size, whole_groups
from kvlib.codecs import Codec, Split, get_codec
from kvlib.eviction import Policy
from kvlib.reading import read_tokens
from kvlib.rollback import truncate
from kvlib.spec import CacheSpec, is_whole
from kvlib.storage import BlockStorage
from kvlib.tables import BlockTables, Table
from kvlib.writing import append


class KVCache:
    """A key-value cache for a batch of sequences.

    Args:
        spec: shapes and dtype of what is stored.
        batch: sequences opened at once, with ids 0 … batch-1; 0 for none.
        max_tokens: the most tokens that a sequence may hold. Where nothing is evicted, that is how long it may become.
        block_size: tokens per block, a multiple of the tokens that the codec encodes together. None is one block as
            long as ``max_tokens``: the contiguous cache.
        num_blocks: blocks in the pool. None is enough for ``batch`` (at least one) full sequences.
        codec: how a token is stored: a name (plain, int8, int4, int2, fp8, mxfp4, nvfp4, kivi-4bit, kivi-2bit) or an
            object of `kvlib.codecs`.
        eviction: which tokens stay: a `kvlib.eviction.Policy`; None is all of them.
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
        codec: str | Codec | Split = "plain",
        eviction: Policy | None = None,
        backend: str = "numpy",
        device: str | None = None,
    ) -> None:
        if not isinstance(spec, CacheSpec):
            raise TypeError(f"spec must be a kvlib.CacheSpec, got {type(spec).__name__}")
        self.batch = checked_size("batch", batch, least=0)
        self.max_tokens = checked_size("max_tokens", max_tokens)
        self.spec = spec
        self.backend = get_backend(backend, device)
        self.codec = get_codec(codec, spec.dtype)
        self.eviction = checked_policy(eviction, self.codec)
        self.block_size = whole_groups(block_size, self.max_tokens, self.codec)
        self._max_blocks = math.ceil(self.max_tokens / self.block_size)  # in one sequence
        enough = max(self.batch, 1) * self._max_blocks
        self.num_blocks = enough if num_blocks is None else checked_size("num_blocks", num_blocks)
        self._storage = BlockStorage(spec, self.num_blocks, self.block_size, self.codec, self.backend)
        # not a method of self: a circle of references would keep the arrays alive until the garbage collector comes
        sizes = spec, self.codec, self.eviction, self._max_blocks, self.block_size
        new_table = functools.partial(Table.empty, *sizes, self.backend)
        self._tables = BlockTables(BlockPool(self.num_blocks), self.block_size, new_table)
        self.reset()

    def __repr__(self) -> str:
        in_use = self.num_blocks - self.num_free_blocks
        blocks = f"{in_use} of {self.num_blocks} blocks of {self.block_size} tokens in use"
        where = self.backend.name if self.backend.device is None else f"{self.backend.name} on {self.backend.device}"
        how = self.codec.name + (f", {self.eviction}" if self.eviction else "")
        return f"KVCache({self.spec}, {how}, {where}; {len(self.lengths)} sequences, {blocks})"

    # -- sequences ---------------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> dict[int, int]:
        """Tokens seen by each open sequence: {sequence id: tokens}."""
        return {seq: table.length for seq, table in self._tables.open_tables.items()}

    @property
    def pool(self) -> BlockPool:
        """Who holds which block: what an index of `kvlib.prefix` is built on."""
        return self._tables.pool

    @property
    def num_free_blocks(self) -> int:
        return self._tables.pool.num_free

    @property
    def nbytes(self) -> int:
        """Bytes of every array the cache holds: planes, reference counts, free list; of every open sequence the block
        table, the lengths, the exact tail, and what eviction knows of its slots.
        """
        arrays = itertools.chain(self._storage.arrays(), self._tables.arrays())
        return sum({id(array): array.nbytes for array in arrays}.values())  # forks share the queries to look back with

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks in use, of which a shared one counts once, and of the open sequences' exact tails."""
        per_block = sum(array.nbytes for array in self._storage.arrays()) // self.num_blocks
        tails = [table.tail.arrays() for table in self._tables.open_tables.values() if table.tail]
        blocks = per_block * (self.num_blocks - self.num_free_blocks)
        return blocks + sum(array.nbytes for array in itertools.chain(*tails))

    def block_table(self, seq: int) -> list[int]:
        """The ids of the blocks that hold ``seq``, in the order of its slots: of positions, if nothing is evicted."""
        return self._tables[seq].blocks.tolist()

    def open(self, blocks: SequenceOf[int] = ()) -> int:
        """Start a sequence and return its id. An empty one takes no block until something is appended.

        ``blocks``: ids of full blocks in use, which become its first tokens in every layer, shared with whoever holds
        them (`kvlib.prefix`). They must lie within `computed` of a sequence that began with these tokens.

        What follows is as if those tokens had been appended, unless the codec keeps the last ``residual`` of them
        exact: blocks have their codes only. Until ``residual`` more have been appended, queries see codes where they
        would have seen exact rows; from then on the same rows read the same, to the last bit. But a model computes its
        next rows from what queries see, so those and its answers differ, however few blocks are taken. `fork` is exact.

        Raises ValueError if a block is free, or if the cache evicts: its blocks have no fixed place.
        """
        if len(blocks) and self.eviction:
            raise ValueError(f"a cache with {self.eviction} cannot start upon blocks, for what they hold may move")
        return self._tables.open(blocks)

    def computed(self, seq: int) -> int:
        """Tokens from the beginning of ``seq`` that lie in blocks in every layer: what may be published of it."""
        return 0 if self.eviction else int(self._tables[seq].stored.min())

    def adopt(self, seq: int, blocks: SequenceOf[int]) -> None:
        """Let ``seq`` begin with ``blocks``, which hold the same tokens as its own first ones, and release those.

        What `PrefixIndex.insert` found to be there twice is kept once. Raises ValueError if one is free, or there are
        more of them than of complete blocks.
        """
        if len(blocks) > self.computed(seq) // self.block_size:
            had = f"sequence {seq} has {self.computed(seq)} computed tokens"
            raise ValueError(f"{had}, too few to adopt {len(blocks)} blocks of {self.block_size}")
        self._tables.adopt(seq, blocks)

    def fork(self, seq: int) -> int:
        """A new sequence with the same tokens. The two share every block; who writes into a shared one copies it."""
        return self._tables.fork(seq)

    def truncate(self, seq: int, n: int) -> None:
        """Forget all but the first ``n`` tokens, in every layer; blocks that become empty return to the pool.

        Within the last append that is exact. A cut through a token group before it decodes the group into the tail,
        with the error that its codec left in it; what was evicted stays away. Raises ValueError if such a group was
        evicted, or ``n`` is more than there are.
        """
        table = self._tables[seq]
        if not is_whole(n) or not 0 <= n <= table.length:
            raise ValueError(f"sequence {seq} holds {table.length} tokens: cannot truncate it to {n!r}")
        truncate(self._storage, self._tables, table, int(n))

    def close(self, seq: int) -> None:
        """Forget the sequence and return its blocks; its id is not used again until `reset`."""
        self._tables.close(seq)

    def reset(self) -> None:
        """Back to the state after construction: every block free, ``batch`` empty sequences with ids 0 … batch-1.

        A prefix index forgets its blocks too, unless somebody but it holds some: those, and their contents, stay.
        """
        self._tables.reset()
        for _ in range(self.batch):
            self.open()

    # -- tokens ------------------------------------------------------------------------------------------------------

    def append(self, k: Array, v: Array | None = None, layer: int = 0, seqs: SequenceOf[int] | None = None) -> None:
        """Add T tokens to one layer of each sequence.

        k (B, Hkv, T, D) and v (B, Hkv, T, Dv), in any float dtype: the codec stores them in its own. ``seqs`` names the
        B sequences; None means all open ones, in the order of their ids. v is left out when the spec is latent.
        The first layer to reach a position reserves its slot; the other layers write into it.

        Raises:
            ValueError, TypeError, KeyError, IndexError: shape, dtype or backend, sequence id, layer; a number that a
            lossy codec cannot store.
            CacheFull: the pool has too few free blocks. In every case the cache is as it was before.
        """
        tables = self._resolve(layer, seqs)
        k = self._checked("k", k, len(tables), self.spec.num_kv_heads, self.spec.head_dim)
        if self.spec.latent is None:
            v = self._checked("v", v, len(tables), self.spec.num_kv_heads, self.spec.value_dim)
            if v.shape[2] != k.shape[2] or v.dtype != k.dtype:
                came = f"k is {tuple(k.shape)} {k.dtype}, v is {tuple(v.shape)} {v.dtype}"
                raise ValueError(f"k and v must have the same number of tokens and the same dtype: {came}")
        elif v is not None:
            raise ValueError(f"this spec is latent: V is the first {self.spec.latent} columns of K; leave v out")
        append(self._storage, self._tables, tables, layer, k, v, self.eviction, self.max_tokens)

    def attend(
        self,
        q: Array,
        layer: int = 0,
        seqs: SequenceOf[int] | None = None,
        scale: float | None = None,
        window: int | None = None,
        sinks: Array | None = None,
    ) -> Array:
        """Causal attention of the last T positions of each sequence over what is stored of its tokens.

        q (B, Hq, T, D), Hq a multiple of Hkv -> (B, Hq, T, Dv) in the dtype of q. ``scale`` defaults to 1 / sqrt(D).
        ``window``: a query sees itself and the window - 1 positions before it, or fewer if the policy's is narrower.
        ``sinks`` (Hq,): a learned score for each query head, which joins its softmax as one more key of value zero.
        Computed in float32, or float64 if q is. Each cached byte is read once; once more if the policy observes
        attention, which is counted at every call.

        Raises:
            ValueError, TypeError, KeyError, IndexError: shape, dtype or backend, more positions than the layer holds,
            sequence id, layer.
        """
        tables = self._resolve(layer, seqs)
        q = self._checked("q", q, len(tables), None, self.spec.head_dim)
        _, heads, tokens, width = q.shape
        for seq, table in tables.items():
            if tokens > table.held(layer):
                held = f"layer {layer} of sequence {seq} holds {table.held(layer)} tokens"
                raise ValueError(f"q asks for the last {tokens} positions, but {held}; append k and v first")
        rules = () if window is None else ((checked_size("window", window), 0),)
        rules += self.eviction.rules() if self.eviction else ()
        if sinks is not None:
            sinks = checked_sinks(sinks, heads, self.spec.num_kv_heads, self.backend)
        scale = 1 / math.sqrt(width) if scale is None else float(scale)
        return attend(self._storage, list(tables.values()), layer, q, scale, rules, sinks, self.eviction)

    def attend_path(self, q: Array, layer: int = 0, seqs: SequenceOf[int] | None = None) -> str:
        """How `attend` answers q (B, Hq, T, D): "kernel", or "fold: …" and why no kernel does it."""
        tables, dtype = self._resolve(layer, seqs).values(), self.backend.dtype_name(q)
        rules = self.eviction.rules() if self.eviction else ()
        return attend_path(self._storage, list(tables), layer, q.shape[2], rules, dtype)

    def read(self, seq: int, layer: int = 0) -> tuple[Array, Array, np.ndarray]:
        """What the last position sees, decoded: k (Hkv, S, D), v (Hkv, S, Dv) in the spec's dtype and positions (S,).

        In the order of positions. Where the heads keep different tokens, positions are (Hkv, S), and those heads that
        keep fewer end in rows of zeros with position -1. Copies: writing into them does not change the cache.
        """
        (table,) = self._resolve(layer, [seq]).values()
        return read_tokens(self._storage, table, layer, self.eviction)

    # -- checks ------------------------------------------------------------------------------------------------------

    def _resolve(self, layer: int, seqs: SequenceOf[int] | None) -> dict[int, Table]:
        if not is_whole(layer) or not 0 <= layer < self.spec.num_layers:
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
        check_shape(name, x, batch, heads, self.spec.num_kv_heads, width)
        return self.backend.detach(x)
