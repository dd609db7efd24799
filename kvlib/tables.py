"""BlockTables: which blocks hold which sequence, and whose they are to write into."""

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf

import numpy as np

from kvlib.blocks import BlockPool


class Table:
    """One sequence: its blocks in position order, and how many tokens each layer has stored in them."""

    __slots__ = ("filled", "ids", "num_blocks")

    def __init__(self, max_blocks: int, num_layers: int) -> None:
        self.ids = np.full(max_blocks, -1, np.int32)  # the first num_blocks entries are in use
        self.filled = np.zeros(num_layers, np.int64)
        self.num_blocks = 0

    @property
    def blocks(self) -> np.ndarray:
        """The ids in use, (num_blocks,)."""
        return self.ids[: self.num_blocks]

    @property
    def length(self) -> int:
        """Tokens seen: those of the layer that is furthest."""
        return int(self.filled.max())


class BlockTables:
    """The open sequences of a cache over one `BlockPool`. Ids of sequences are not used twice."""

    def __init__(self, num_blocks: int, block_size: int, max_blocks: int, num_layers: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size, self.max_blocks, self.num_layers = block_size, max_blocks, num_layers
        self.open_tables: dict[int, Table] = {}
        self._next_id = 0

    def __getitem__(self, seq: int) -> Table:
        # True == 1 and 0.0 == 0: a mask handed over as ids would silently name sequences 1 and 0
        if isinstance(seq, int | np.integer) and not isinstance(seq, bool) and seq in self.open_tables:
            return self.open_tables[seq]
        raise KeyError(f"sequence {seq!r} is not open; open sequences: {list(self.open_tables)}")

    def arrays(self) -> Iterator[np.ndarray]:
        yield from self.pool.arrays()
        for table in self.open_tables.values():
            yield table.ids
            yield table.filled

    def open(self) -> int:
        seq, self._next_id = self._next_id, self._next_id + 1
        self.open_tables[seq] = Table(self.max_blocks, self.num_layers)
        return seq

    def fork(self, seq: int) -> int:
        """A sequence with the same blocks, each of which now has one holder more."""
        parent = self[seq]
        self.pool.share(parent.blocks)
        twin = self.open()
        child = self.open_tables[twin]
        child.ids[:], child.filled[:], child.num_blocks = parent.ids, parent.filled, parent.num_blocks
        return twin

    def truncate(self, seq: int, n: int) -> None:
        table = self[seq]
        if not isinstance(n, int | np.integer) or isinstance(n, bool) or not 0 <= n <= table.length:
            raise ValueError(f"sequence {seq} holds {table.length} tokens: cannot truncate it to {n!r}")
        keep = math.ceil(n / self.block_size)
        self.pool.release(table.ids[keep : table.num_blocks])
        table.ids[keep : table.num_blocks] = -1
        table.num_blocks = min(keep, table.num_blocks)
        np.minimum(table.filled, n, out=table.filled)

    def close(self, seq: int) -> None:
        self.pool.release(self[seq].blocks)
        del self.open_tables[seq]

    def reserve(
        self, tables: SequenceOf[Table], starts: SequenceOf[int], tokens: int, copy_block: Callable[[int, int], None]
    ) -> None:
        """Make positions start … start + tokens - 1 of every table its own to write: the one place blocks are taken.

        A missing block is allocated; a block that somebody else holds too is replaced by a copy (copy-on-write), made
        by ``copy_block(source, target)``. Raises CacheFull, and changes nothing, if the pool cannot give them all.
        """
        copies, leaving, grow = [], {}, []
        for table, start in zip(tables, starts, strict=True):
            end = math.ceil((start + tokens) / self.block_size)
            for index in range(start // self.block_size, min(end, table.num_blocks)):
                block = int(table.ids[index])
                if self.pool.refs[block] - leaving.get(block, 0) > 1:  # the last of its holders may keep it
                    leaving[block] = leaving.get(block, 0) + 1
                    copies.append((table, index))
            grow.append(max(0, end - table.num_blocks))

        fresh = self.pool.allocate(len(copies) + sum(grow))
        for (table, index), own in zip(copies, fresh.tolist(), strict=False):
            shared = int(table.ids[index])
            copy_block(shared, own)
            self.pool.release([shared])
            table.ids[index] = own
        fresh = fresh[len(copies) :]
        for table, count in zip(tables, grow, strict=True):
            table.ids[table.num_blocks : table.num_blocks + count] = fresh[:count]
            table.num_blocks += count
            fresh = fresh[count:]
