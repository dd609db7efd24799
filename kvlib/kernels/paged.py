# ruff: noqa: E741  l is the letter that the papers use
"""Attention over a paged cache: the fold of `kvlib.attention`, with the block table walked inside the kernel.

One program holds a few query rows of one KV head, the rows of all query heads that share it, so that a tile of K and V
is read once for all of them. It goes through its share of the sequence tile by tile and keeps a partial (m, l, o).
Decoding has few rows and cuts the sequence into splits, whose partials a second kernel merges; a prefill chunk has many
rows and needs no splits. Codes are decoded as they are read: what comes from memory is what the cache stores.

Sources: PagedAttention, Kwon et al. 2023 (arXiv:2309.06180); split-KV ("Flash-Decoding"), Dao et al. 2023.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvlib.attention import Partial
from kvlib.codecs import Plain
from kvlib.kernels import interpreted
from kvlib.planes import Codec, Planes
from kvlib.storage import BlockStorage


@triton.jit
def load_rows(
    codes,
    scale,
    offset,
    place,
    seen,
    dims,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """Rows ``place`` (TILE,) of one plane, decoded: (TILE, len(dims)). Rows that are not ``seen`` come out as zeros.

    BITS 0 is a plane of floats. Else a byte holds 8 / BITS codes, those of columns j, j + WIDTH * BITS / 8, …; a scale
    serves TOKENS rows and GROUP columns.
    """
    inside = seen[:, None] & (dims < WIDTH)[None, :]
    if BITS == 0:
        rows = tl.load(codes + place[:, None] * WIDTH + dims[None, :], mask=inside, other=0.0)
    else:
        columns: tl.constexpr = WIDTH * BITS // 8
        byte = tl.load(codes + place[:, None] * columns + (dims % columns)[None, :], mask=inside, other=0).to(tl.int32)
        code = (byte >> (dims // columns * BITS)[None, :]) & (2**BITS - 1)
        group = (place // TOKENS)[:, None] * (WIDTH // GROUP) + (dims // GROUP)[None, :]
        step = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
        if SYMMETRIC:
            rows = (code - (2**BITS - 2) // 2).to(tl.float32) * step
        else:
            rows = code.to(tl.float32) * step + tl.load(offset + group, mask=inside, other=0.0).to(tl.float32)
    return rows  # the only return: Triton compiles what follows another, and wants one type


@triton.jit
def attend_kernel(
    q, tables, stored, lengths, k_codes, k_scale, k_offset, v_codes, v_scale, v_offset, m, l, o,
    num_rows, tokens, splits, max_blocks,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    WIDE_D: tl.constexpr, WIDE_DV: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr,
    K_BITS: tl.constexpr, K_TOKENS: tl.constexpr, K_GROUP: tl.constexpr, K_SYMMETRIC: tl.constexpr,
    V_BITS: tl.constexpr, V_TOKENS: tl.constexpr, V_GROUP: tl.constexpr, V_SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """q (B, HEADS, num_rows, D), scaled; tables (B, max_blocks); stored, lengths (B,) -> m, l (B, HEADS, splits,
    num_rows) and o (…, DV). Row r of a head is query head r // tokens of its group, at the r % tokens-th new position.
    """
    lane, split = tl.program_id(0), tl.program_id(2)  # a lane: a KV head of a sequence
    seq, head = lane // HEADS, lane % HEADS
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dims, value_dims = tl.arange(0, WIDE_D), tl.arange(0, WIDE_DV)
    live = rows < num_rows
    at = (lane.to(tl.int64) * num_rows + rows)[:, None] * D + dims[None, :]
    inside = live[:, None] & (dims < D)[None, :]
    query = tl.load(q + at, mask=inside, other=0.0).to(HALF)
    position = tl.load(lengths + seq) - tokens + rows % tokens

    slots = tl.load(stored + seq)
    share = tl.cdiv(tl.cdiv(slots, TILE), splits) * TILE
    start = split * share
    newest = tl.max(tl.where(live, position, -1))
    stop = tl.minimum(tl.minimum(start + share, slots), newest + 1)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDE_DV), tl.float32)
    for first in range(start, stop, TILE):
        slot = first + tl.arange(0, TILE)
        seen = slot < stop
        entry = tables + seq * max_blocks + slot // BLOCK
        block = tl.load(entry, mask=seen, other=0).to(tl.int64)
        place = (block * HEADS + head) * BLOCK + slot % BLOCK
        k = load_rows(k_codes, k_scale, k_offset, place, seen, dims, D,
                      K_BITS, K_TOKENS, K_GROUP, K_SYMMETRIC)  # fmt: skip
        scores = tl.dot(query, tl.trans(k.to(HALF)), input_precision="ieee")
        visible = seen[None, :] & (slot[None, :] <= position[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        top = tl.maximum(best, tl.max(scores, axis=1))
        shift = tl.where(top == float("-inf"), 0.0, top)  # nothing seen yet
        weights = tl.exp(scores - shift[:, None])
        keep = tl.exp(best - shift)
        v = load_rows(v_codes, v_scale, v_offset, place, seen, value_dims, DV,
                      V_BITS, V_TOKENS, V_GROUP, V_SYMMETRIC)  # fmt: skip
        total = total * keep + tl.sum(weights, axis=1)
        tile = tl.dot(weights.to(HALF), v.to(HALF), input_precision="ieee")
        mixed = mixed * keep[:, None] + tile
        best = top

    to = (lane.to(tl.int64) * splits + split) * num_rows + rows
    tl.store(m + to, best, mask=live)
    tl.store(l + to, total, mask=live)
    inside = live[:, None] & (value_dims < DV)[None, :]
    tl.store(o + to[:, None] * DV + value_dims[None, :], mixed, mask=inside)


@triton.jit
def merge_kernel(
    m, l, o, whole_m, whole_l, whole_o, num_rows, splits, DV: tl.constexpr, WIDE_DV: tl.constexpr, MOST: tl.constexpr
):
    """The partials of all splits as one: m, l (lanes, splits, num_rows), o (…, DV) -> (lanes, num_rows), (…, DV)."""
    lane, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, dims = tl.arange(0, MOST), tl.arange(0, WIDE_DV)
    there = split < splits
    at = (lane * splits + split) * num_rows + row
    tops = tl.load(m + at, mask=there, other=float("-inf"))
    top = tl.max(tops)
    keep = tl.exp(tops - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(keep * tl.load(l + at, mask=there, other=0.0))
    inside = there[:, None] & (dims < DV)[None, :]
    mixed = tl.sum(keep[:, None] * tl.load(o + at[:, None] * DV + dims[None, :], mask=inside, other=0.0), axis=0)
    to = lane * num_rows + row
    tl.store(whole_m + to, top)
    tl.store(whole_l + to, total)
    tl.store(whole_o + to * DV + dims, mixed, mask=dims < DV)


class Schedule(NamedTuple):
    """Who computes what: query rows to a program, tokens to a tile, and splits of a sequence."""

    rows: int
    tile: int
    splits: int

    @classmethod
    def plan(cls, lanes: int, num_rows: int, longest: int, width: int, processors: int) -> "Schedule":
        """Splits enough for two programs to a processor, if there are not as many anyway; each at least four tiles."""
        rows = min(64, max(16, triton.next_power_of_2(num_rows)))  # a tensor core's tile has at least 16
        tile = 64 if width > 128 else 128
        programs = lanes * triton.cdiv(num_rows, rows)
        splits = min(triton.cdiv(2 * processors, programs), triton.cdiv(longest, 4 * tile), 64)
        return cls(rows, tile, max(1, splits))


def attend_blocks(
    q: torch.Tensor,
    storage: BlockStorage,
    layer: int,
    tables: torch.Tensor,
    stored: torch.Tensor,
    lengths: torch.Tensor,
    tokens: int,
    longest: int,
    schedule: Schedule | None = None,
) -> Partial:
    """Causal attention of the last ``tokens`` positions over what lies in blocks; the exact tail is not among it.

    q (B, Hkv, R, D) scaled, where R = (query heads to a KV head) x tokens; tables (B, max_blocks) int32; stored and
    lengths (B,) int32: slots taken in the layer, and tokens seen by it; ``longest``: the largest of stored. Returns a
    partial with m and l (B, Hkv, R, 1) and o (B, Hkv, R, Dv) in float32.
    """
    batch, heads, rows, width = q.shape
    value = storage.spec.value_dim
    if schedule is None:
        schedule = Schedule.plan(batch * heads, rows, longest, width, _processors(q.device))
    k, v = (_operands(codec, planes, layer, size) for codec, planes, size in
            ((storage.codec.k, storage.k, width), (storage.codec.v, storage.v, value)))  # fmt: skip
    shape, whole = (batch * heads, schedule.splits, rows), (batch, heads, rows, 1)
    m, l = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in "ml")
    o = torch.empty((*shape, value), dtype=torch.float32, device=q.device)
    wide = {"WIDE_D": triton.next_power_of_2(width), "WIDE_DV": triton.next_power_of_2(value)}
    attend_kernel[(batch * heads, triton.cdiv(rows, schedule.rows), schedule.splits)](
        q.contiguous(), tables, stored, lengths, *k.planes, *v.planes, m, l, o,
        rows, tokens, schedule.splits, tables.shape[1],
        HEADS=heads, BLOCK=storage.block_size, D=width, DV=value, **wide, ROWS=schedule.rows, TILE=schedule.tile,
        HALF=_product_dtype(storage), **k.sizes("K"), **v.sizes("V"),
    )  # fmt: skip
    if schedule.splits == 1:
        return Partial(m.view(whole), l.view(whole), o.view(*whole[:3], value))
    merged = Partial(m.new_empty(whole), l.new_empty(whole), o.new_empty((*whole[:3], value)))
    merge_kernel[(batch * heads, rows)](
        m, l, o, *merged, rows, schedule.splits, DV=value, WIDE_DV=wide["WIDE_DV"],
        MOST=triton.next_power_of_2(schedule.splits),
    )  # fmt: skip
    return merged


class _Operands(NamedTuple):
    """One side's planes of a layer (codes, scale, offset), and what `load_rows` must know about them."""

    planes: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    bits: int
    tokens: int
    group: int
    symmetric: bool

    def sizes(self, side: str) -> dict[str, int | bool]:
        names = ("BITS", "TOKENS", "GROUP", "SYMMETRIC")
        return {f"{side}_{name}": value for name, value in zip(names, self[1:], strict=True)}


def _operands(codec: Codec, planes: Planes, layer: int, width: int) -> _Operands:
    payload = planes["payload"][layer]
    if isinstance(codec, Plain):
        return _Operands((payload, payload, payload), 0, 1, 1, False)
    scale = planes["scale"][layer]
    offset = scale if codec.symmetric else planes["offset"][layer]
    return _Operands((payload, scale, offset), codec.bits, codec.group, width // scale.shape[-1], codec.symmetric)


def _product_dtype(storage: BlockStorage) -> tl.dtype:
    """What both products multiply: stored floats as they are; codes as float16, which has their scales' precision."""
    dtypes = {codec.dtype for codec in (storage.codec.k, storage.codec.v) if isinstance(codec, Plain)}
    if "float32" in dtypes or ("bfloat16" in dtypes and interpreted()):  # which multiplies bfloat16's bits as integers
        return tl.float32
    return tl.bfloat16 if "bfloat16" in dtypes else tl.float16


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def reference(
    q: torch.Tensor, storage: BlockStorage, layer: int, tables: torch.Tensor, stored: torch.Tensor,
    lengths: torch.Tensor, tokens: int,
) -> Partial:  # fmt: skip
    """What `attend_blocks` computes, in plain torch: gather, decode, one softmax, a sequence at a time, in float32."""
    partials = []
    for rows, table, slots, length in zip(q.float(), tables, stored.tolist(), lengths.tolist(), strict=True):
        if not slots:
            shape = (*rows.shape[:-1], 1)
            nothing = rows.new_zeros((*shape[:-1], storage.spec.value_dim))
            partials.append(Partial(rows.new_full(shape, float("-inf")), rows.new_zeros(shape), nothing))
            continue
        k, v = storage.read(layer, table.cpu().numpy(), 0, slots, "float32")
        positions = length - tokens + torch.arange(rows.shape[1], device=q.device) % tokens
        hidden = torch.arange(slots, device=q.device) > positions[:, None]
        scores = (rows @ k.mT).masked_fill(hidden, float("-inf"))
        m = scores.amax(-1, keepdim=True)
        weights = (scores - m.nan_to_num(neginf=0)).exp()
        partials.append(Partial(m, weights.sum(-1, keepdim=True), weights @ v))
    return Partial(*map(torch.stack, zip(*partials, strict=True)))
