"""Appending to quantised blocks: new tokens are encoded by `Int`'s rule and written where they belong, in one pass.

One program encodes one token of one KV head. It finds scale and offset of each group first, then the codes, from scale
and offset as they were rounded to float16: bit for bit what `kvlib.integers.Int.encode` and `BlockStorage.write` leave.
"""

import torch
import triton
import triton.language as tl

from kvlib.integers import LEAST, UNIT, Int
from kvlib.planes import Planes

STEP, SMALLEST = tl.constexpr(UNIT), tl.constexpr(LEAST)


@triton.jit
def append_kernel(
    x, slots, codes, scale, offset, tokens,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    SYMMETRIC: tl.constexpr, WIDE_GROUP: tl.constexpr, WIDE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """x (B, HEADS, tokens, WIDTH) float32; slots (B, tokens) int64: block * BLOCK + place within the block."""
    row = tl.program_id(0).to(tl.int64)  # a token of a head of a sequence, in the order of x
    token, lane = row % tokens, row // tokens
    slot = tl.load(slots + lane // HEADS * tokens + token)
    place = (slot // BLOCK * HEADS + lane % HEADS) * BLOCK + slot % BLOCK
    levels: tl.constexpr = 2**BITS - 2 if SYMMETRIC else 2**BITS - 1
    groups: tl.constexpr = WIDTH // GROUP
    within = tl.arange(0, WIDE_GROUP)
    for group in tl.static_range(groups):
        at = row * WIDTH + group * GROUP + within
        largest = tl.max(tl.load(x + at, mask=within < GROUP, other=float("-inf")))
        least = tl.min(tl.load(x + at, mask=within < GROUP, other=float("inf")))
        if SYMMETRIC:
            reach = 2 * tl.maximum(largest, -least)
        else:
            low = (least - tl.abs(least) * STEP - SMALLEST).to(tl.float16)
            tl.store(offset + place * groups + group, low)
            reach = largest - low.to(tl.float32)
        step = tl.div_rn(reach, levels + 0.0) * (1 + STEP) + SMALLEST
        tl.store(scale + place * groups + group, step.to(tl.float16))

    tl.debug_barrier()  # every thread sees the scales before it uses them
    columns: tl.constexpr = WIDTH * BITS // 8
    column = tl.arange(0, WIDE_COLUMNS)
    inside = column < columns
    byte = tl.zeros((WIDE_COLUMNS,), tl.int32)
    for part in tl.static_range(8 // BITS):
        dim = part * columns + column
        step = tl.load(scale + place * groups + dim // GROUP, mask=inside, other=1.0).to(tl.float32)
        if SYMMETRIC:
            low = -step * (levels // 2)
        else:
            low = tl.load(offset + place * groups + dim // GROUP, mask=inside, other=0.0).to(tl.float32)
        steps = tl.div_rn(tl.load(x + row * WIDTH + dim, mask=inside, other=0.0) - low, step)
        nearest = (steps + 8388608.0) - 8388608.0  # 2^23: float32 has no fractions there, and rounds halves to even
        byte |= tl.minimum(tl.maximum(nearest, 0.0), levels + 0.0).to(tl.int32) << part * BITS
    tl.store(codes + place * columns + column, byte.to(tl.uint8), mask=inside)


def append_tokens(x: torch.Tensor, codec: Int, planes: Planes, layer: int, slots: torch.Tensor) -> None:
    """Encode x (B, Hkv, T, D) and write it: token t of sequence b into slot ``slots[b, t]`` of the whole pool.

    ``planes`` are a side's of `BlockStorage`, written in place. Only for a codec whose tokens stand for themselves
    (axis="token"), and finite x: `BlockStorage.encode` says what must be checked before.
    """
    if codec.axis != "token":
        raise ValueError(f"append_tokens encodes tokens one by one, and {codec.name} needs {codec.group} at once")
    heads, tokens, width = x.shape[1:]
    payload, scale = planes["payload"][layer], planes["scale"][layer]
    offset = scale if codec.symmetric else planes["offset"][layer]
    group = width // scale.shape[-1]
    append_kernel[(x.shape[0] * heads * tokens,)](
        x.float().contiguous(), slots, payload, scale, offset, tokens,
        HEADS=heads, BLOCK=scale.shape[2], WIDTH=width, BITS=codec.bits, GROUP=group, SYMMETRIC=codec.symmetric,
        WIDE_GROUP=triton.next_power_of_2(group), WIDE_COLUMNS=triton.next_power_of_2(width * codec.bits // 8),
    )  # fmt: skip


def reference(x: torch.Tensor, codec: Int, planes: Planes, layer: int, slots: torch.Tensor) -> None:
    """What `append_tokens` does, in plain torch."""
    for name, values in codec.encode(x).items():
        plane = planes[name][layer]
        plane[slots // plane.shape[2], :, slots % plane.shape[2]] = values.transpose(1, 2)
