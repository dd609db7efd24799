"""What the paged kernel is compared with on a GPU: the same attention by others, over the same numbers."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvlib.storage import BlockStorage


def rivals(storage: BlockStorage, q: torch.Tensor, tables: torch.Tensor, context: int, bench: Any) -> dict[str, float]:
    """{name: seconds} of one decode step, q (B, Hkv, group, D), scaled, in bfloat16.

    SDPA and FlexAttention read K and V from contiguous memory, (B, Hkv, S, D); FlashInfer reads the blocks themselves.
    """
    flat = [_contiguous(plane["payload"][0], tables[0], context) for plane in (storage.k, storage.v)]
    heads = q.flatten(1, 2)[:, :, None]  # (B, Hq, 1, D)
    copies = [flat, [x.clone() for x in flat]]  # two, so that small ones are not read from L2 either
    runs = {"sdpa": [lambda kv=kv: scaled_dot_product_attention(heads, *kv, scale=1.0, enable_gqa=True)
                     for kv in copies]}  # fmt: skip
    if bench.cuda:
        runs |= _flex(heads, copies)
        runs |= _flashinfer(storage, q, tables, context)
    return {name: bench.seconds(each) for name, each in runs.items()}


def _contiguous(plane: torch.Tensor, table: torch.Tensor, context: int) -> torch.Tensor:
    """The blocks (num_blocks, Hkv, block_size, D) of each sequence, in order: (B, Hkv, context, D)."""
    return plane[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :context].contiguous()


_compiled = None


def _flex(q: torch.Tensor, copies: list) -> dict[str, list]:
    from torch.nn.attention.flex_attention import flex_attention

    global _compiled
    _compiled = _compiled or torch.compile(flex_attention, dynamic=True)
    return {"flex": [lambda kv=kv: _compiled(q, *kv, scale=1.0, enable_gqa=True) for kv in copies]}


def _flashinfer(storage: BlockStorage, q: torch.Tensor, tables: torch.Tensor, context: int) -> dict[str, list]:
    try:
        import flashinfer
    except ImportError:
        return {}
    batch, kv_heads, group, width = q.shape
    size, blocks = storage.block_size, tables.shape[2]
    pages = storage.k["payload"][0], storage.v["payload"][0]  # (num_blocks, Hkv, block_size, D): its HND layout
    indptr = torch.arange(0, (batch + 1) * blocks, blocks, dtype=torch.int32, device=q.device)
    last = torch.full((batch,), context - (blocks - 1) * size, dtype=torch.int32, device=q.device)
    rows = q.flatten(1, 2)
    runs = []
    for table in tables[:2]:
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=group > 1)
        wrapper.plan(indptr, table.flatten().contiguous(), last, kv_heads * group, kv_heads, width, size,
                     q_data_type=q.dtype, kv_data_type=q.dtype, sm_scale=1.0)  # fmt: skip
        runs.append(lambda wrapper=wrapper: wrapper.run(rows, pages))
    return {"flashinfer": runs}
