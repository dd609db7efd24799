"""What a step over several caches asks of each of them: room before it begins, and whether there is a way back."""

import numpy as np

from kvlib.cache import KVCache
from kvlib.retention import make_room
from kvlib.sight import Sight
from kvlib.tables import Plan


def plan(cache: KVCache, ends: dict[int, int]) -> Plan:
    """The blocks that sequences need to become ``ends`` tokens long; none where they are that long already.

    Raises ValueError or CacheFull, and changes nothing, if they cannot.
    """
    tables, targets, starts, stops = [], [], [], []
    for seq, end in ends.items():
        table = cache._tables[seq]
        layer, tokens = int(table.seen.argmax()), end - table.length
        if tokens <= 0:
            continue
        room = make_room(cache._storage, table, layer, tokens, cache.eviction)
        held = room.stored + int(table.waiting[layer])
        if held + tokens > cache.max_tokens:
            raise ValueError(
                f"sequence {seq} holds {held} tokens in one of the groups: {tokens} more would exceed its "
                f"max_tokens={cache.max_tokens}; feed a long prompt in steps of at most max_step tokens, or build the "
                f"cache with a larger chunk or max_tokens"
            )
        tables.append(table)
        targets.append(room.targets(cache.codec.group))
        starts.append(room.stored)
        stops.append(held + tokens)
    needed = cache._tables.plan(tables, targets, starts, stops)
    cache.pool.ensure(needed.blocks)
    return needed


def evicted(cache: KVCache, seq: int, n: int) -> int:
    """How many of the tokens that position ``n`` would see through the windows of ``cache`` it holds no longer."""
    if cache.eviction is None or not cache.eviction.rules():
        return 0
    table, unit, lost = cache._tables[seq], cache.codec.group, 0
    needed = np.flatnonzero(Sight(n + 1, 1, cache.eviction.rules()).visible(np.arange(n))[0])
    for layer in np.flatnonzero(table.seen > n):
        seen, waiting = int(table.seen[layer]), int(table.waiting[layer])
        stored = table.slots.by_token(layer, 0, int(table.stored[layer]) // unit, unit)
        held = np.concatenate([stored[0], np.arange(seen - waiting, seen)])  # windows are alike in all heads
        lost = max(lost, int((~np.isin(needed, held)).sum()))
    return lost
