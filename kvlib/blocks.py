"""BlockPool: who holds which block. It knows ids and counts, and nothing of what the blocks contain."""

from collections.abc import Callable, Iterable

import numpy as np


class CacheFull(MemoryError):
    """A step needed more blocks than are free. Nothing was stored; free or preempt a sequence and try again.

    Attributes: ``needed`` and ``free``, in blocks.
    """

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"this step needs {needed} more blocks, and {free} of {total} are free; close or truncate a sequence, "
            f"or build the cache with a larger num_blocks"
        )
        self.needed, self.free, self.total = needed, free, total

    def __reduce__(self) -> tuple:
        return CacheFull, (self.needed, self.free, self.total)  # so that it can leave a worker process


class BlockPool:
    """``num_blocks`` blocks, each with a reference count; a count of 0 means that the block is free.

    The free ids lie in the first ``num_free`` slots of one array, used as a stack: taking and returning are O(1) and
    the pool never grows.

    ``reclaim`` is the way of asking somebody who keeps blocks in case they are wanted again (a prefix index) to give
    some back: it is called with the number of blocks that are missing, and releases at least that many, or none.
    """

    def __init__(self, num_blocks: int) -> None:
        self.refs = np.zeros(num_blocks, np.int32)
        self._free = np.arange(num_blocks, dtype=np.int32)[::-1].copy()  # block 0 is handed out first
        self.num_free = num_blocks
        self.reclaim: Callable[[int], object] | None = None

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.refs, self._free

    def __len__(self) -> int:
        return len(self.refs)

    def allocate(self, count: int) -> np.ndarray:
        """Take ``count`` free blocks, each with one reference. Raises CacheFull and takes none if there are too few."""
        self.ensure(count)
        self.num_free -= count
        ids = self._free[self.num_free : self.num_free + count][::-1].copy()
        self.refs[ids] = 1
        return ids

    def ensure(self, count: int) -> None:
        """Raise CacheFull unless ``count`` blocks are free, or can be reclaimed, which then happens."""
        if count < 0:
            raise ValueError(f"cannot allocate {count} blocks")
        if count > self.num_free and self.reclaim is not None:
            self.reclaim(count - self.num_free)
        if count > self.num_free:
            raise CacheFull(count, self.num_free, len(self))

    def share(self, ids: Iterable[int]) -> None:
        """Add one reference to each block. Raises ValueError, and changes nothing, if one of them is free."""
        ids = self.in_use(ids, "share")
        np.add.at(self.refs, ids, 1)

    def release(self, ids: Iterable[int]) -> None:
        """Drop one reference of each block; those that reach 0 are free again. Raises ValueError on a double free."""
        ids, counts = np.unique(self.in_use(ids, "release"), return_counts=True)
        if np.any(self.refs[ids] < counts):
            unheld = ids[self.refs[ids] < counts].tolist()
            raise ValueError(f"blocks {unheld} are released more often than they are held")
        self.refs[ids] -= counts.astype(self.refs.dtype)
        freed = ids[self.refs[ids] == 0][::-1]
        self._free[self.num_free : self.num_free + len(freed)] = freed
        self.num_free += len(freed)

    def drain(self) -> None:
        """Let the index give up all blocks that it alone holds, and hand out free ones in the order of ids again."""
        if self.num_free < len(self) and self.reclaim is not None:
            self.reclaim(len(self) - self.num_free)
        free = np.flatnonzero(self.refs == 0)[::-1]
        self._free[: self.num_free] = free

    def in_use(self, ids: Iterable[int], what: str) -> np.ndarray:
        """``ids`` as a flat array. Raises ValueError, which says that one cannot ``what`` them, if one of them is free,
        or they are no list of integers.
        """
        given = np.asarray(ids)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise ValueError(f"cannot {what} blocks {given.tolist()}: their ids must be a flat list of integers")
        ids = given.astype(np.int64)
        if np.any((ids < 0) | (ids >= len(self))):
            raise ValueError(f"cannot {what} blocks {ids.tolist()}: ids run from 0 to {len(self) - 1}")
        if np.any(self.refs[ids] == 0):
            raise ValueError(f"cannot {what} blocks {ids[self.refs[ids] == 0].tolist()}: they are free")
        return ids
