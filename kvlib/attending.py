"""What a layer answers: the scaled queries of several sequences, attended, observed, and normalised."""

from collections.abc import Sequence

from kvlib.arrays import Array
from kvlib.attention import with_sinks
from kvlib.eviction import Policy
from kvlib.retention import observe
from kvlib.sight import Sight
from kvlib.storage import BlockStorage
from kvlib.tables import Table
from kvlib.tiling import attend_sequences, refusal


def attend(
    storage: BlockStorage,
    tables: Sequence[Table],
    layer: int,
    q: Array,
    scale: float,
    rules: tuple[tuple[int, int], ...],
    sinks: Array | None,
    policy: Policy | None,
) -> Array:
    """Attention of the last T positions, as `KVCache.attend`: q (B, Hq, T, D) -> (B, Hq, T, Dv) in the dtype of q.

    ``rules`` are the (window, sinks) pairs of `Sight`, ``sinks`` (Hkv, group) the learned scores.
    """
    backend, spec = storage.backend, storage.spec
    batch, heads, tokens, width = q.shape
    dtype = "float64" if backend.dtype_name(q) == "float64" else "float32"
    sights = [Sight.of(storage, layer, table, tokens, rules) for table in tables]
    scaled = backend.astype(q, dtype) * scale
    rows = scaled.reshape(batch, spec.num_kv_heads, -1, width)  # query heads of one KV head become its rows
    with backend.exact():
        fused = refusal(storage, tables, sights, backend.dtype_name(q)) is None
        partials = attend_sequences(rows, storage, layer, tables, sights, dtype, fused)
        if sinks is not None:
            sinks = backend.astype(sinks, dtype)
            partials = [with_sinks(partial, sinks) for partial in partials]
        if policy and policy.observe != 0:
            for table, row, whole, sight in zip(tables, rows, partials, sights, strict=True):
                observe(storage, table, layer, row, whole, sight, sinks, policy)
    outputs = [partial.normalise() for partial in partials]
    out = backend.xp.stack(outputs).reshape(batch, heads, tokens, spec.value_dim)
    return backend.astype(out, backend.dtype_name(q))


def attend_path(
    storage: BlockStorage,
    tables: Sequence[Table],
    layer: int,
    tokens: int,
    rules: tuple[tuple[int, int], ...],
    dtype: str,
) -> str:
    """Which way `attend` goes for queries of ``dtype``, and why."""
    sights = [Sight.of(storage, layer, table, tokens, rules) for table in tables]
    reason = refusal(storage, tables, sights, dtype)
    return "kernel" if reason is None else f"fold: {reason}"
