"""How tokens come into a layer and leave it: making room, closing groups, cutting back. All or nothing."""

from typing import NamedTuple

import numpy as np

from kvlib.arrays import Array
from kvlib.eviction import Policy
from kvlib.planes import Planes
from kvlib.retention import make_room, move
from kvlib.storage import BlockStorage
from kvlib.tables import BlockTables, Table


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
        runs = [_close_groups(storage, table, layer, k[b], None if v is None else v[b]) for b, table in enumerate(rows)]
    else:
        encoded = storage.encode(k, v)

    tables.reserve(rows, [room.start for room in rooms], stops, storage.copy)
    for table, room in zip(rows, rooms, strict=True):
        move(storage, table, layer, room)
        if policy and policy.once and tokens == 1 and table.seen[layer]:
            table.slots.decided[layer], table.slots.recent[layer] = True, None
    if storage.codec.tail:
        for table, room, run in zip(rows, rooms, runs, strict=True):
            _write_run(storage, table, layer, room.stored, run, tokens)
    else:
        storage.write(layer, [table.ids for table in rows], [room.stored for room in rooms], encoded)
        for table, room in zip(rows, rooms, strict=True):
            _count(storage, table, layer, room.stored, tokens, tokens)
    if policy:
        for table in rows:
            tables.trim(table)


def truncate(storage: BlockStorage, tables: BlockTables, table: Table, n: int) -> None:
    """Forget positions n and up, in every layer. What was evicted before stays away.

    A group of tokens that the cut goes through is opened again: its first rows return to the tail as they decode.

    Raises:
        ValueError: some head has evicted the group that the cut goes through. Nothing has changed.
    """
    opened = {layer: _open_group(storage, table, layer, n) for layer in range(len(table.seen)) if n < table.seen[layer]}
    for layer, rows in opened.items():
        first_waiting = int(table.seen[layer] - table.waiting[layer])
        if n >= first_waiting:
            table.waiting[layer] = n - first_waiting
        else:
            whole = n // storage.unit * storage.unit
            table.stored[layer], table.waiting[layer] = whole, n - whole
            if rows:
                table.tail.put(layer, 0, *rows)
            if table.slots:
                gone = table.slots.positions[layer] >= whole
                table.slots.positions[layer][gone] = -1
                live = np.flatnonzero((table.slots.positions[layer] >= 0).any(axis=0))
                table.stored[layer] = (live.max(initial=-1) + 1) * storage.unit
                if table.slots.mass.size:
                    table.slots.mass[layer][gone] = 0
        if table.slots:
            table.slots.tail_mass[layer, :, int(table.waiting[layer]) :] = 0
            table.slots.recent[layer] = None
        table.seen[layer] = n
    tables.trim(table)


# -- closing groups ----------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Rows that wait for their group, oldest first; how many of them are encoded now, and as what."""

    k: Array
    v: Array | None
    closed: int
    encoded: tuple[Planes, Planes] | None
    kept: int  # rows that lie in the tail already, if nothing is closed


def _close_groups(storage: BlockStorage, table: Table, layer: int, k: Array, v: Array | None) -> Run:
    """What becomes of new rows k (Hkv, T, D) and v behind those that wait already. Changes nothing."""
    waiting, codec = int(table.waiting[layer]), storage.codec
    closed = max(0, (waiting + k.shape[1] - codec.residual) // codec.group * codec.group)
    if not closed:
        return Run(k, v, 0, None, waiting)
    k, v = table.tail.joined(layer, waiting, k, v)
    old = k[None, :, :closed], None if v is None else v[None, :, :closed]
    return Run(k[:, closed:], None if v is None else v[:, closed:], closed, storage.encode(*old), 0)


def _write_run(storage: BlockStorage, table: Table, layer: int, start: int, run: Run, tokens: int) -> None:
    if run.closed:
        storage.write(layer, [table.ids], [start], run.encoded)
    table.tail.put(layer, run.kept, run.k, run.v)
    _count(storage, table, layer, start, run.closed, tokens)


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


def _open_group(storage: BlockStorage, table: Table, layer: int, n: int) -> tuple[Array, Array | None] | None:
    """The rows of the closed group that n lies in, up to n: k (Hkv, rows, D) and v. None if n cuts no group."""
    unit, whole = storage.unit, n // storage.unit * storage.unit
    if n == whole or n >= table.seen[layer] - table.waiting[layer]:
        return None
    heads = storage.spec.num_kv_heads
    starts = [whole] * heads
    if table.slots:
        here = table.slots.positions[layer] == whole
        if not here.any(axis=1).all():
            raise ValueError(
                f"cannot truncate to {n} tokens: layer {layer} has evicted the group of tokens {whole} to "
                f"{whole + unit - 1}, or part of it; truncate to a multiple of {unit}"
            )
        starts = (here.argmax(axis=1) * unit).tolist()
    rows = []
    for head, start in enumerate(starts):
        k, v = storage.read(layer, table.ids, start, start + n - whole, storage.spec.dtype)
        rows.append([storage.backend.xp.asarray(x[head], copy=True) for x in (k, v)])
    k, v = (storage.backend.xp.stack(x) for x in zip(*rows, strict=True))
    return k, None if storage.spec.latent else v
