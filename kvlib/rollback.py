"""How tokens are taken back: what is stored is cut, and groups that the cut goes through are opened again."""

from typing import NamedTuple

import numpy as np

from kvlib.arrays import Array
from kvlib.storage import BlockStorage
from kvlib.tables import BlockTables, Table


class Cut(NamedTuple):
    """Where one layer is cut: positions from ``closed`` on leave the blocks, and ``rows`` (k, v) wait instead."""

    closed: int
    rows: tuple[Array, Array | None] | None


def truncate(storage: BlockStorage, tables: BlockTables, table: Table, n: int) -> None:
    """Forget positions n and up, in every layer. What was evicted before stays away.

    Within the last append the layer becomes what it would be without those tokens, exactly. Before it, only a group
    that the cut goes through is opened again: its first rows return to the tail as they decode.

    Raises:
        ValueError: some head has evicted such a group. Nothing has changed.
    """
    cuts = {layer: _cut(storage, table, layer, n) for layer in range(len(table.seen)) if n < table.seen[layer]}
    for layer, (closed, rows) in cuts.items():
        opened = closed < table.seen[layer] - table.waiting[layer]
        if opened:
            _forget(storage, table, layer, closed)
        table.seen[layer], table.waiting[layer] = n, n - closed
        if table.tail:
            if rows:
                table.tail.put(layer, 0, *rows)
            if table.tail.runs[layer]:
                table.tail.runs[layer] = table.tail.runs[layer].before(n)
        if table.slots:
            # what waits is what waited, unless a group was opened: nobody has counted its tokens one by one
            table.slots.tail_mass[layer, :, 0 if opened else n - closed :] = 0
            table.slots.decided[layer] &= n > 0
            table.slots.recent[layer] = None
    tables.trim(table)


def _cut(storage: BlockStorage, table: Table, layer: int, n: int) -> Cut:
    """Where to cut one layer so that n tokens are left. Changes nothing."""
    unit, first_waiting = storage.unit, int(table.seen[layer] - table.waiting[layer])
    run = table.tail.runs[layer] if table.tail else None
    if run and run.first < n:
        closed = min(first_waiting, max(run.first, (n - storage.codec.residual) // unit * unit))
        here = slice(closed - run.first, n - run.first)
        return Cut(closed, (run.k[:, here], run.v if run.v is None else run.v[:, here]))
    closed = n // unit * unit
    if n >= first_waiting:
        return Cut(first_waiting, None)
    return Cut(closed, _decoded(storage, table, layer, closed, n) if closed < n else None)


def _decoded(storage: BlockStorage, table: Table, layer: int, start: int, stop: int) -> tuple[Array, Array | None]:
    """Rows start … stop-1, the beginning of a closed group, decoded: k (Hkv, rows, D) and v."""
    slots = [start] * storage.spec.num_kv_heads
    if table.slots:
        here = table.slots.positions[layer] == start
        if not here.any(axis=1).all():
            raise ValueError(
                f"cannot truncate to {stop} tokens: layer {layer} has evicted the group of tokens {start} to "
                f"{start + storage.unit - 1}, or part of it; truncate to a multiple of {storage.unit}"
            )
        slots = (here.argmax(axis=1) * storage.unit).tolist()
    rows = []
    for head, slot in enumerate(slots):
        k, v = storage.read(layer, table.ids, slot, slot + stop - start, storage.spec.dtype)
        rows.append([storage.backend.xp.asarray(x[head], copy=True) for x in (k, v)])
    k, v = (storage.backend.xp.stack(x) for x in zip(*rows, strict=True))
    return k, None if storage.spec.latent else v


def _forget(storage: BlockStorage, table: Table, layer: int, closed: int) -> None:
    """Positions from ``closed`` on have left the blocks."""
    table.stored[layer] = closed
    if table.slots:
        positions = table.slots.positions[layer]
        gone = positions >= closed
        positions[gone] = -1
        live = np.flatnonzero((positions >= 0).any(axis=0))
        table.stored[layer] = (live.max(initial=-1) + 1) * storage.unit
        if table.slots.mass.size:
            table.slots.mass[layer][gone] = 0
