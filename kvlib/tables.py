"""BlockTables: which blocks hold which sequence, and whose they are to write into."""

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np

from kvlib.arrays import Array, Backend
from kvlib.blocks import BlockPool
from kvlib.codecs import Split
from kvlib.eviction import Policy, Slots
from kvlib.spec import CacheSpec, is_whole
from kvlib.tail import Tail


class Table:
    """One sequence: its blocks in slot order, and how many tokens each layer has seen and still has.

    ``seen`` counts all tokens, ``stored`` the slots that are taken in the blocks, ``waiting`` the tokens in the tail.
    Nothing evicted: seen = stored + waiting, and slot s holds position s.
    """

    __slots__ = ("ids", "num_blocks", "seen", "slots", "stored", "tail", "waiting")

    def __init__(self, max_blocks: int, num_layers: int, tail: Tail | None = None, slots: Slots | None = None) -> None:
        self.ids = np.full(max_blocks, -1, np.int32)  # the first num_blocks entries are in use
        self.num_blocks = 0
        self.seen, self.stored, self.waiting = (np.zeros(num_layers, np.int64) for _ in range(3))
        self.tail, self.slots = tail, slots

    @classmethod
    def empty(
        cls,
        spec: CacheSpec,
        codec: Split,
        policy: Policy | None,
        max_blocks: int,
        block_size: int,
        backend: Backend,
    ) -> "Table":
        """A sequence without tokens, with whatever the codec and the policy of its cache have to know about it."""
        tail = Tail(spec, codec, backend) if codec.tail else None
        units = max_blocks * block_size // codec.group
        slots = Slots(policy, spec.num_layers, spec.num_kv_heads, units, codec.tail) if policy else None
        return cls(max_blocks, spec.num_layers, tail, slots)

    @property
    def blocks(self) -> np.ndarray:
        """The ids in use, (num_blocks,)."""
        return self.ids[: self.num_blocks]

    @property
    def length(self) -> int:
        """Tokens seen: those of the layer that is furthest."""
        return int(self.seen.max())

    def held(self, layer: int) -> int:
        """Tokens that ``layer`` has, in blocks and in the tail; holes count."""
        return int(self.stored[layer] + self.waiting[layer])

    def arrays(self) -> Iterator[Array]:
        yield from (self.ids, self.seen, self.stored, self.waiting)
        for part in (self.tail, self.slots):
            if part is not None:
                yield from part.arrays()

    def copy(self) -> "Table":
        twin = Table(len(self.ids), len(self.seen))
        twin.num_blocks = self.num_blocks
        for mine, its in zip((self.ids, self.seen, self.stored, self.waiting), twin.arrays(), strict=True):
            its[:] = mine
        twin.tail = self.tail and self.tail.copy()
        twin.slots = self.slots and self.slots.copy()
        return twin


class BlockTables:
    """The open sequences of a cache over one `BlockPool`. Ids of sequences are not used twice."""

    def __init__(self, pool: BlockPool, block_size: int, new_table: Callable[[], Table]) -> None:
        self.pool = pool
        self.block_size, self.new_table = block_size, new_table
        self.open_tables: dict[int, Table] = {}
        self._next_id = 0

    def __getitem__(self, seq: int) -> Table:
        # True == 1 and 0.0 == 0: a mask handed over as ids would silently name sequences 1 and 0
        if is_whole(seq) and seq in self.open_tables:
            return self.open_tables[seq]
        raise KeyError(f"sequence {seq!r} is not open; open sequences: {list(self.open_tables)}")

    def arrays(self) -> Iterator[Array]:
        yield from self.pool.arrays()
        for table in self.open_tables.values():
            yield from table.arrays()

    def open(self, blocks: SequenceOf[int] = ()) -> int:
        """An empty sequence; or one upon ``blocks``, all full, each of which now has one holder more."""
        table = self.new_table()
        if len(blocks):
            if len(blocks) > len(table.ids):
                raise ValueError(f"a sequence has at most {len(table.ids)} blocks, got {len(blocks)} to start with")
            self.pool.share(blocks)  # which makes sure that they are ids
            table.ids[: len(blocks)], table.num_blocks = blocks, len(blocks)
            table.seen[:] = table.stored[:] = len(blocks) * self.block_size
        return self._add(table)

    def adopt(self, seq: int, blocks: SequenceOf[int]) -> None:
        """Put ``blocks`` in the place of the first ones of ``seq``, which it gives up."""
        table = self[seq]
        self.pool.share(blocks)
        own = table.ids[: len(blocks)].copy()
        table.ids[: len(blocks)] = blocks
        self.pool.release(own)

    def reset(self) -> None:
        """No sequences, and their blocks back in the pool, which its index empties if nobody else holds blocks."""
        for seq in list(self.open_tables):
            self.close(seq)
        self.pool.drain()
        self._next_id = 0

    def fork(self, seq: int) -> int:
        """A sequence with the same blocks, each of which now has one holder more."""
        twin = self[seq].copy()  # first: it may find no memory for the tail
        self.pool.share(twin.blocks)
        return self._add(twin)

    def _add(self, table: Table) -> int:
        seq, self._next_id = self._next_id, self._next_id + 1
        self.open_tables[seq] = table
        return seq

    def trim(self, table: Table) -> None:
        """Return the blocks behind the last slot that a layer has taken, or needs for its tail."""
        keep = math.ceil(int((table.stored + table.waiting).max()) / self.block_size)
        self.pool.release(table.ids[keep : table.num_blocks])
        table.ids[keep : table.num_blocks] = -1
        table.num_blocks = min(keep, table.num_blocks)

    def close(self, seq: int) -> None:
        self.pool.release(self[seq].blocks)
        del self.open_tables[seq]

    def plan(
        self,
        tables: SequenceOf[Table],
        targets: SequenceOf[np.ndarray],
        starts: SequenceOf[int],
        stops: SequenceOf[int],
    ) -> "Plan":
        """What makes slots start … stop - 1 of every table, and its slots ``targets`` before them, its own to write.

        A missing block is allocated; one that somebody else holds too is replaced by a copy (copy-on-write).
        """
        copies, leaving, grow = [], {}, []
        for table, before, start, stop in zip(tables, targets, starts, stops, strict=True):
            end = math.ceil(stop / self.block_size)
            written = np.arange(start // self.block_size, min(end, table.num_blocks))
            if len(before):
                written = np.union1d(before // self.block_size, written)
            for index in written[self.pool.refs[table.ids[written]] > 1].tolist():
                block = int(table.ids[index])
                if self.pool.refs[block] - leaving.get(block, 0) > 1:  # the last of its holders may keep it
                    leaving[block] = leaving.get(block, 0) + 1
                    copies.append((table, index))
            grow.append((table, max(0, end - table.num_blocks)))
        return Plan(copies, grow)

    def take(self, plan: "Plan", copy_block: Callable[[int, int], None]) -> None:
        """Carry out a plan: the one place where blocks are taken. ``copy_block(source, target)`` makes the copies.

        Raises CacheFull, and changes nothing, if the pool cannot give all blocks.
        """
        fresh = self.pool.allocate(plan.blocks)
        for (table, index), own in zip(plan.copies, fresh.tolist(), strict=False):
            shared = int(table.ids[index])
            copy_block(shared, own)
            self.pool.release([shared])
            table.ids[index] = own
        fresh = fresh[len(plan.copies) :]
        for table, count in plan.grow:
            table.ids[table.num_blocks : table.num_blocks + count] = fresh[:count]
            table.num_blocks += count
            fresh = fresh[count:]


class Plan(NamedTuple):
    """Table entries that need a copy of their block, and how many more blocks each table needs."""

    copies: list[tuple[Table, int]]
    grow: list[tuple[Table, int]]

    @property
    def blocks(self) -> int:
        return len(self.copies) + sum(count for _, count in self.grow)
