"""From a cache's tables to a kernel's arguments: what `kvlib.tiling` and `kvlib.writing` call on CUDA."""

import weakref
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from kvlib.attention import Partial
from kvlib.kernels.paged import attend_blocks
from kvlib.kernels.quantize import append_tokens
from kvlib.storage import BlockStorage
from kvlib.tables import Table

# The block tables last sent to the device, for each storage: all layers of a step use the same.
_sent: "weakref.WeakKeyDictionary[BlockStorage, tuple[np.ndarray, torch.Tensor]]" = weakref.WeakKeyDictionary()


def attend(q: torch.Tensor, storage: BlockStorage, layer: int, tables: SequenceOf[Table], tokens: int) -> list[Partial]:
    """Attention of the last ``tokens`` positions of each sequence over its blocks: q as in `attend_blocks`."""
    stored = [int(table.stored[layer]) for table in tables]
    seen = [int(table.seen[layer]) for table in tables]
    counts = torch.tensor([stored, seen], dtype=torch.int32, device=q.device)
    ids = _on_device(storage, tables, max(1, -(-max(stored) // storage.block_size)))
    m, l, o = attend_blocks(q, storage, layer, ids, counts[0], counts[1], tokens, max(stored))  # noqa: E741
    return [Partial(*each) for each in zip(m, l, o, strict=True)]


def append(
    storage: BlockStorage,
    layer: int,
    tables: SequenceOf[Table],
    starts: SequenceOf[int],
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Encode k (B, Hkv, T, D) and v and write them from slot ``starts[b]`` of each table on."""
    size = storage.block_size
    places = [start + np.arange(k.shape[2]) for start in starts]
    slots = [
        table.ids[at // size].astype(np.int64) * size + at % size for table, at in zip(tables, places, strict=True)
    ]
    slots = torch.as_tensor(np.stack(slots), device=k.device)
    append_tokens(k, storage.codec.k, storage.k, layer, slots)
    append_tokens(v, storage.codec.v, storage.v, layer, slots)


def _on_device(storage: BlockStorage, tables: SequenceOf[Table], blocks: int) -> torch.Tensor:
    """The first ``blocks`` entries of every table, (B, blocks) int32; 0 where there are fewer, which nobody reads."""
    ids = np.maximum(np.stack([table.ids[:blocks] for table in tables]), 0)
    last = _sent.get(storage)
    if last is None or not np.array_equal(last[0], ids):
        last = _sent[storage] = ids, torch.as_tensor(ids, device=storage.backend.device)
    return last[1]
