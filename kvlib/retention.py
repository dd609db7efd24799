"""How a policy's choice is carried out: what it is told, what leaves a sequence, and which slots move."""

from typing import NamedTuple

import numpy as np

from kvlib.arrays import Array
from kvlib.attention import Partial, with_sinks
from kvlib.eviction import Moves, Policy, Recent, choose, pack
from kvlib.storage import BlockStorage
from kvlib.tables import Table
from kvlib.tiling import Sight, attend_sequences, attention_mass


class Room(NamedTuple):
    """What one sequence does before its new tokens are written: which slots stay (None: all), how they move."""

    stays: np.ndarray | None
    moves: Moves | None
    stored: int  # slots taken once that is done; the new tokens follow there

    def targets(self, unit: int) -> np.ndarray:
        """The first slot of every unit of ``unit`` tokens that another one moves into."""
        return np.zeros(0, np.int64) if self.moves is None else self.moves.target * unit


def observe(
    storage: BlockStorage,
    table: Table,
    layer: int,
    q: Array,
    whole: Partial,
    sight: Sight,
    sinks: Array | None,
    policy: Policy,
) -> None:
    """Let the policy know what the last queries q (Hkv, R, D), scaled, have attended to."""
    slots = table.slots
    if policy.observe is None:
        stored, tail = attention_mass(q, storage, layer, table, sight, whole, storage.backend.dtype_name(q))
        slots.mass[layer, :, : stored.shape[1]] += stored
        slots.tail_mass[layer, :, : tail.shape[1]] += tail
    elif policy.observe and not slots.decided[layer]:
        q, old = q.reshape(q.shape[0], -1, sight.tokens, q.shape[-1]), slots.recent[layer]
        follows = old and old.length == sight.first and old.q.shape[:2] == q.shape[:2]
        if follows and sight.tokens < policy.observe:
            q = storage.backend.xp.concat([old.q, q], axis=2)
        q = storage.backend.xp.asarray(q[:, :, -policy.observe :], copy=True)
        sinks = None if sinks is None else storage.backend.xp.asarray(sinks, copy=True)
        slots.recent[layer] = Recent(q, sight.length, sight.rules, sinks)


def make_room(storage: BlockStorage, table: Table, layer: int, tokens: int, policy: Policy | None) -> Room:
    """What has to leave before ``tokens`` new tokens are written. Changes nothing."""
    stored, waiting = int(table.stored[layer]), int(table.waiting[layer])
    everything = Room(None, None, stored)
    if policy is None or (policy.once and (tokens > 1 or table.slots.decided[layer])):
        return everything
    units, keep = stored // storage.unit, policy.units(waiting, storage.unit)
    if units <= keep:
        return everything
    positions = table.slots.positions[layer, :, :units]
    length = int(table.seen[layer])
    stays = choose(policy, positions, _mass(storage, table, layer, policy), length, keep)
    moves = pack(stays)
    return Room(stays, moves, moves.kept * storage.unit)


def _mass(storage: BlockStorage, table: Table, layer: int, policy: Policy) -> np.ndarray:
    """What each unit of slots got of the attention of the observed queries, (Hkv, units)."""
    slots, units = table.slots, int(table.stored[layer]) // storage.unit
    if policy.observe is None:
        return slots.mass[layer, :, :units]
    recent = slots.recent[layer]
    if recent is None:
        return np.zeros((storage.spec.num_kv_heads, units), np.float32)
    heads, _, tokens, width = recent.q.shape
    q, dtype = recent.q.reshape(heads, -1, width), storage.backend.dtype_name(recent.q)
    sight = Sight.of(storage, layer, table, tokens, recent.rules, recent.length)
    (whole,) = attend_sequences(q[None], storage, layer, [table], [sight], dtype)
    whole = whole if recent.sinks is None else with_sinks(whole, recent.sinks)
    return attention_mass(q, storage, layer, table, sight, whole, dtype)[0]


def move(storage: BlockStorage, table: Table, layer: int, room: Room) -> None:
    """Carry it out, in blocks that belong to the sequence alone."""
    if room.stays is None:
        return
    moves, slots = room.moves, table.slots
    if len(moves.heads):
        storage.move(layer, table.ids, moves.heads, moves.source, moves.target)
    units = room.stays.shape[1]
    known = [(slots.positions, -1)] + ([(slots.mass, 0)] if slots.mass.size else [])
    for notes, empty in known:
        notes[layer, :, :units][~room.stays] = empty
        moves.apply(notes[layer], empty)
    table.stored[layer] = room.stored
