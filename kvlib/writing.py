"""How tokens come into a layer: making room, closing groups, writing and counting. All or nothing."""

from typing import NamedTuple

import numpy as np

from kvlib import kernels
from kvlib.arrays import Array
from kvlib.eviction import Policy
from kvlib.planes import Planes
from kvlib.retention import make_room, move
from kvlib.storage import BlockStorage
from kvlib.tables import BlockTables, Table
from kvlib.tail import Run


def append(
    storage: BlockStorage,
    tables: BlockTables,
    sequences: dict[int, Table],
    layer: int,
    k: Array,
    v: Array | None,
    policy: Policy | None,
    max_tokens: int,
) -> None:
    """Add tokens k (B, Hkv, T, D) and v to one layer of B sequences.

    Raises:
        ValueError: a sequence would hold more than ``max_tokens``, or the codec cannot store a number.
        CacheFull: the pool has too few free blocks. Either way nothing has changed.
    """
    tokens, rows = k.shape[2], list(sequences.values())
    rooms = [make_room(storage, table, layer, tokens, policy) for table in rows]
    stops = [room.stored + int(table.waiting[layer]) + tokens for room, table in zip(rooms, rows, strict=True)]
    for seq, stop in zip(sequences, stops, strict=True):
        if stop > max_tokens:
            limit = f"{tokens} more would exceed max_tokens={max_tokens}"
            raise ValueError(f"sequence {seq} holds {stop - tokens} tokens: {limit}; build the cache with a larger one")
    if storage.codec.tail:
        sides = zip(k, [None] * len(rows) if v is None else v, strict=True)
        closings = [_close_groups(storage, table, layer, *side) for table, side in zip(rows, sides, strict=True)]
    else:
        fused = kernels.encodes(storage, k, v)
        encoded = None if fused else storage.encode(k, v)

    targets, starts = [room.targets(storage.unit) for room in rooms], [room.stored for room in rooms]
    tables.take(tables.plan(rows, targets, starts, stops), storage.copy)
    for table, room in zip(rows, rooms, strict=True):
        move(storage, table, layer, room)
        if policy and policy.once and tokens == 1 and table.seen[layer]:
            table.slots.decided[layer], table.slots.recent[layer] = True, None
    if storage.codec.tail:
        for table, room, closing in zip(rows, rooms, closings, strict=True):
            _write_closing(storage, table, layer, room.stored, closing, tokens)
    else:
        if fused:
            from kvlib.kernels import calls  # which needs Triton

            calls.append(storage, layer, rows, starts, k, v)
        else:
            storage.write(layer, [table.ids for table in rows], starts, encoded)
        for table, room in zip(rows, rooms, strict=True):
            _count(storage, table, layer, room.stored, tokens, tokens)
    if policy:
        for table in rows:
            tables.trim(table)


# -- closing groups ----------------------------------------------------------------------------------------------------


class Closing(NamedTuple):
    """Rows that wait for their group, oldest first; how many of them are encoded now, and as what."""

    k: Array
    v: Array | None
    closed: int
    encoded: tuple[Planes, Planes] | None
    kept: int  # rows before these that lie in the tail already, if nothing is closed


def _close_groups(storage: BlockStorage, table: Table, layer: int, k: Array, v: Array | None) -> Closing:
    """What becomes of new rows k (Hkv, T, D) and v behind those that wait already. Changes nothing.

    Raises ValueError if one of them cannot be encoded: now, and not when its group closes and all after it are stuck.
    """
    waiting, codec = int(table.waiting[layer]), storage.codec
    closed = max(0, (waiting + k.shape[1] - codec.residual) // codec.group * codec.group)
    if (first := max(0, closed - waiting)) < k.shape[1]:
        storage.check_waiting(k[:, first:], None if v is None else v[:, first:])
    if not closed:
        return Closing(k, v, 0, None, waiting)
    k, v = table.tail.joined(layer, waiting, k, v)
    old = k[None, :, :closed], None if v is None else v[None, :, :closed]
    return Closing(k, v, closed, storage.encode(*old), 0)


def _write_closing(storage: BlockStorage, table: Table, layer: int, start: int, closing: Closing, tokens: int) -> None:
    k, v, closed, encoded, kept = closing
    table.tail.let_go(layer)
    if closed:
        storage.write(layer, [table.ids], [start], encoded)
        if tokens > 1:
            own = (x if x is None else storage.backend.xp.asarray(x, copy=True) for x in (k, v))  # not the caller's
            table.tail.runs[layer] = Run(int(table.seen[layer] - table.waiting[layer]), *own)
    table.tail.put(layer, kept, k[:, closed:], None if v is None else v[:, closed:])
    _count(storage, table, layer, start, closed, tokens)


def _count(storage: BlockStorage, table: Table, layer: int, start: int, closed: int, tokens: int) -> None:
    """Count ``tokens`` new tokens; the ``closed`` oldest of those that wait now lie in slots from ``start``."""
    first_waiting = int(table.seen[layer] - table.waiting[layer])
    if table.slots:
        unit, slots = storage.unit, table.slots
        new = slice(start // unit, (start + closed) // unit)
        slots.positions[layer, :, new] = np.arange(first_waiting, first_waiting + closed, unit)
        if slots.mass.size:
            tail = slots.tail_mass[layer]
            leaving = np.zeros((len(tail), closed), np.float32)
            leaving[:, : tail.shape[1]] = tail[:, :closed]
            slots.mass[layer, :, new] = leaving.reshape(len(tail), -1, unit).sum(axis=-1)
            rest = tail[:, closed:].copy()
            tail[:] = 0
            tail[:, : rest.shape[1]] = rest
    table.stored[layer] = start + closed
    table.waiting[layer] += tokens - closed
    table.seen[layer] += tokens
