"""Compile kvlib's kernels for CUDA (sm_90), which needs no GPU, and print a line for each.

Triton's interpreter runs kernels as Python and does not see what its compiler refuses, such as two returns of
different types. TRITON_INTERPRET must be unset.
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvlib.kernels import paged, quantize

TARGET = GPUTarget("cuda", 90, 32)
FLOATS = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}


def build(kernel, constants: dict, types: dict) -> None:
    """Compile with these constants; arguments without a type are 32-bit integers."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=values), target=TARGET)
    print(kernel.__name__, *compiled.asm)


def build_attend(bits: int, symmetric: bool, stored: str, rows: int) -> None:
    """K and V in ``bits``, 0 for floats of the dtype ``stored``; a program of ``rows`` query rows."""
    types = dict.fromkeys(("tables", "stored", "lengths"), "*i32") | dict.fromkeys(("q", "m", "l", "o"), "*fp32")
    constants = {"HEADS": 8, "BLOCK": 32, "D": 128, "DV": 128, "WIDE_D": 128, "WIDE_DV": 128, "ROWS": rows, "TILE": 128}
    constants["HALF"] = FLOATS[stored]
    for side in "kv":
        types[f"{side}_codes"] = "*u8" if bits else f"*{stored}"
        types |= dict.fromkeys((f"{side}_scale", f"{side}_offset"), "*fp16" if bits else f"*{stored}")
        sizes = {"BITS": bits, "TOKENS": 1, "GROUP": 32, "SYMMETRIC": symmetric}
        constants |= {f"{side.upper()}_{name}": value for name, value in sizes.items()}
    build(paged.attend_kernel, constants, types)


def main() -> None:
    build_attend(0, False, "bf16", rows=16)
    build_attend(8, False, "fp16", rows=16)
    build_attend(4, True, "fp16", rows=16)
    merged = dict.fromkeys(("m", "l", "o", "whole_m", "whole_l", "whole_o"), "*fp32")
    build(paged.merge_kernel, {"DV": 128, "WIDE_DV": 128, "MOST": 64}, merged)
    types = {"x": "*fp32", "slots": "*i64", "codes": "*u8", "scale": "*fp16", "offset": "*fp16"}
    constants = {"HEADS": 8, "BLOCK": 32, "WIDTH": 96, "BITS": 4, "GROUP": 32, "SYMMETRIC": False}
    build(quantize.append_kernel, constants | {"WIDE_GROUP": 32, "WIDE_COLUMNS": 64}, types)


if __name__ == "__main__":
    main()
