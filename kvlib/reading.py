"""What a sequence holds, as rows in the order of their positions."""

import numpy as np

from kvlib.arrays import Array
from kvlib.eviction import Policy
from kvlib.sight import Sight
from kvlib.storage import BlockStorage
from kvlib.tables import Table


def read_tokens(
    storage: BlockStorage, table: Table, layer: int, policy: Policy | None
) -> tuple[Array, Array, np.ndarray]:
    """K, V and positions of one layer, as `KVCache.read` returns them."""
    backend, spec = storage.backend, storage.spec
    stored, waiting, seen = int(table.stored[layer]), int(table.waiting[layer]), int(table.seen[layer])
    parts = [storage.read(layer, table.ids, 0, stored, spec.dtype)] if stored else []
    parts += [table.tail.read(layer, waiting, spec.dtype)] if waiting else []
    if not parts:
        widths = spec.head_dim, spec.value_dim
        k, v = (backend.zeros((spec.num_kv_heads, 0, width), spec.dtype) for width in widths)
        return k, v, np.arange(0)
    k, v = (backend.xp.concat(x, axis=1) for x in zip(*parts, strict=True))
    if policy is None:
        return k, v, np.arange(seen)
    positions = table.slots.by_token(layer, 0, stored // storage.unit, storage.unit)
    tail = np.broadcast_to(np.arange(seen - waiting, seen), (len(positions), waiting))
    positions = np.concatenate([positions, tail], axis=1)
    gone = ~Sight(seen, 1, policy.rules()).visible(positions)[:, 0]
    order = np.lexsort((positions, gone), axis=-1)[:, : int((~gone).sum(axis=1).max())]
    positions = np.take_along_axis(np.where(gone, -1, positions), order, axis=1)
    heads = backend.asarray(np.arange(len(positions))[:, None])
    k, v = (x[heads, backend.asarray(order)] for x in (k, v))
    empty = backend.asarray(positions < 0)
    k[empty], v[empty] = 0, 0
    return k, v, positions[0] if (positions == positions[0]).all() else positions
