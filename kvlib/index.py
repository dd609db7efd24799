"""PrefixIndex: the blocks that prompts to come may begin with, how long they are kept, and which go first.

Two ways of looking them up are built on it, see `kvlib.prefix`.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from kvlib.blocks import BlockPool


class Published(NamedTuple):
    """What an insert found and did, in block ids."""

    blocks: list[int]  # the published block of each complete block of the sequence, in order
    new: list[int]  # those of them that this insert published
    duplicates: dict[int, int]  # own block -> the block published before it: point the table there, release your own


class PrefixIndex(ABC):
    """The published blocks of one pool, as a tree: below a block stand those that continue its tokens.

    A tree because a block's keys and values depend on all tokens before it: it is worth nothing without those above
    it. Hence blocks are evicted from the leaves, that is, from the tails of sequences, the least recently used first.

    Args:
        pool: whose blocks they are. When it runs out, it asks the index to evict (`BlockPool.reclaim`).
        block_size: tokens in a block.

    Raises ValueError: the pool has an index already, or block_size is not positive.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        if pool.reclaim is not None:
            raise ValueError("this pool has a prefix index already; build another pool, or use that index")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.pool, self.block_size = pool, block_size
        self._published = np.zeros(len(pool), bool)
        self._above = np.full(len(pool), -1, np.int32)  # the block before it; -1: it begins a prompt
        self._below = np.zeros(len(pool), np.int32)  # how many published blocks continue it; 0: a leaf
        self._used = np.zeros(len(pool), np.int64)  # the time of its last match or insert; never less than below it
        self._clock = 0
        # A heap of (time, block), one for each leaf. Either may be out of date: the leaf was used since, or has got a
        # block below it. Looking is cheap when it is taken out; keeping the heap up to date with every match is not.
        self._queue: list[tuple[int, int]] = []
        pool.reclaim = self._reclaim

    def __repr__(self) -> str:
        blocks = f"{self.num_blocks} blocks of {self.block_size} tokens, {self.evictable} evictable"
        return f"{type(self).__name__}({blocks})"

    # -- accounting: num_blocks == evictable + protected -------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """Blocks that are published."""
        return int(np.count_nonzero(self._published))

    @property
    def protected(self) -> int:
        """Published blocks that somebody else holds, and those above them."""
        locked = self._published & (self.pool.refs > 1)
        frontier = np.flatnonzero(locked)
        while len(frontier):  # who holds a block mostly holds those above it too: then one round is enough
            above = np.unique(self._above[frontier])
            frontier = above[(above >= 0) & ~locked[above]]
            locked[frontier] = True
        return int(np.count_nonzero(locked))

    @property
    def evictable(self) -> int:
        """Published blocks that `evict` could free now."""
        return self.num_blocks - self.protected

    # -- tokens ------------------------------------------------------------------------------------------------------

    def match(self, tokens: Sequence[int], salt: str = "") -> list[int]:
        """The blocks that hold the longest published prefix of the prompt ``tokens``, its last token excepted.

        They are yours once you hold them: ``pool.share(blocks)`` or ``cache.open(blocks=blocks)`` comes next, before
        anything that may allocate. Blocks that were inserted with another ``salt`` are not found: name the tenant with
        it, or the adapter, or whatever else the keys and values depend on.
        """
        return self.match_keys(self.keys(tokens, salt), len(tokens))

    def peek(self, tokens: Sequence[int], salt: str = "") -> list[int]:
        """The blocks that `match` would find, which do not become recently used: for who looks and runs nothing."""
        return self._find(self.keys(tokens, salt)[: max(0, len(tokens) - 1) // self.block_size])

    def insert(self, tokens: Sequence[int], blocks: Sequence[int], computed: int, salt: str = "") -> Published:
        """Publish the complete blocks among the first ``computed`` tokens of a sequence that you hold.

        ``blocks`` is the sequence's block table; ``computed`` counts the tokens whose keys and values lie in them in
        every layer. A prefix that is there already stays as it is, see `Published.duplicates`.

        Raises ValueError: more computed tokens than tokens or blocks; a block that is free, named twice, or published
        for other tokens. Nothing is published then.
        """
        if not 0 <= computed <= len(tokens):
            raise ValueError(f"computed must be from 0 to the {len(tokens)} tokens of the sequence, got {computed}")
        return self.insert_keys(self.keys(tokens[:computed], salt), blocks, computed)

    @abstractmethod
    def keys(self, tokens: Sequence[int], salt: str = "") -> list[Hashable]:
        """The key of each complete block of ``tokens``: what the index knows it by."""

    # -- keys: the same for prompts of which only the hashes are known -----------------------------------------------

    def match_keys(self, keys: Sequence[Hashable], length: int) -> list[int]:
        """`match` for a prompt of ``length`` tokens, given the keys of its blocks (that of a partial last one too)."""
        complete, partial = divmod(length, self.block_size)
        if not complete <= len(keys) <= complete + bool(partial):
            raise ValueError(
                f"{length} tokens have {complete} complete blocks of {self.block_size}, got {len(keys)} keys"
            )
        found = self._find(keys[: (length - 1) // self.block_size])
        self._touch(found)
        return found

    def insert_keys(self, keys: Sequence[Hashable], blocks: Sequence[int], computed: int) -> Published:
        """`insert`, given the keys of the sequence's blocks."""
        count = computed // self.block_size
        if not 0 <= count <= min(len(keys), len(blocks)):
            came = f"got {len(keys)} keys and {len(blocks)} blocks"
            raise ValueError(f"{computed} tokens have {count} complete blocks of {self.block_size}, {came}")
        own = self.pool.in_use(blocks[:count], "publish").tolist()
        found = self._find(keys[:count])
        new = own[len(found) :]
        duplicates = {mine: other for mine, other in zip(own, found, strict=False) if mine != other}
        elsewhere = [block for block in [*duplicates, *new] if self._published[block]]
        if elsewhere or len(set(own)) < count:
            raise ValueError(f"cannot publish {own}: named twice, or published for other tokens: {elsewhere}")

        self._touch(found + new)
        if new:
            above = found[-1] if found else -1
            self._link(above, keys[len(found) : count], new)
            self.pool.share(new)
            self._published[new] = True
            self._above[new] = [above, *new[:-1]]
            self._below[new[:-1]] = 1
            self._below[found[-1:]] += 1
            self._wait(new[-1])
        return Published(found + new, new, duplicates)

    # -- eviction ----------------------------------------------------------------------------------------------------

    def evict(self, count: int) -> int:
        """Release up to ``count`` blocks, least recently used leaves first, and return how many it were.

        Never a block that somebody else holds, nor one above it. Takes O(log leaves) for each block that is released,
        was used again since it was queued, or is the held end of a sequence.
        """
        if count < 0:
            raise ValueError(f"cannot evict {count} blocks")
        freed, held = [], []
        while self._queue and len(freed) < count:
            used, block = heapq.heappop(self._queue)
            if self._below[block]:
                continue  # it comes back when the last block below it goes
            if self.pool.refs[block] > 1:
                held.append(block)
            elif used < self._used[block]:
                self._wait(block)
            else:
                freed.append(block)
                self._unlink(block)
                self._published[block] = False
                above = int(self._above[block])
                if above >= 0:
                    self._below[above] -= 1
                    if not self._below[above]:
                        self._wait(above)
        for block in held:
            self._wait(block)
        self.pool.release(freed)
        return len(freed)

    def _reclaim(self, missing: int) -> int:
        """Evict what the pool is missing; nothing if it would not be enough, for the pool raises CacheFull then."""
        return self.evict(missing) if missing <= self.evictable else 0

    def _touch(self, path: list[int]) -> None:
        self._clock += 1
        self._used[path] = self._clock

    def _wait(self, leaf: int) -> None:
        heapq.heappush(self._queue, (int(self._used[leaf]), leaf))

    # -- how keys are looked up --------------------------------------------------------------------------------------

    @abstractmethod
    def _find(self, keys: Sequence[Hashable]) -> list[int]:
        """The blocks of the longest published prefix of ``keys``."""

    @abstractmethod
    def _link(self, above: int, keys: Sequence[Hashable], blocks: list[int]) -> None:
        """Remember ``blocks`` under ``keys``, in a row below the block ``above`` (-1: at the beginning)."""

    @abstractmethod
    def _unlink(self, block: int) -> None:
        """Forget ``block``, a leaf."""

    def _cut(self, tokens: Sequence[int], salt: str) -> np.ndarray:
        """``tokens`` as (complete blocks, block_size), checked."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind not in "iu"):
            raise TypeError(f"tokens must be a flat list of integers, got {tokens.dtype} of shape {tokens.shape}")
        if not isinstance(salt, str):
            raise TypeError(f"salt must be a string, got {salt!r}")
        count = len(tokens) // self.block_size
        return tokens[: count * self.block_size].astype("<i8").reshape(count, self.block_size)
