"""Triton kernels for the CUDA path, each beside its plain reference.

`paged` walks the block table inside the kernel: decoding with split-KV and chunked prefill are one kernel, cut
differently, over plain and integer codecs. `quantize` writes new tokens into quantised blocks. `KVCache` uses both by
itself on CUDA where they apply; `refusal` says why not. Without a GPU they run in Triton's interpreter
(TRITON_INTERPRET=1), which is how they are tested.
"""

import functools
import importlib.util
import os

from kvlib.arrays import Array, Backend
from kvlib.codecs import Plain
from kvlib.integers import Int
from kvlib.planes import Codec
from kvlib.storage import SAFE, BlockStorage


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported; it is asked for nothing until a kernel is wanted."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU: slowly, for tests and for looking inside."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(backend: Backend) -> bool:
    """Whether kernels can run where ``backend`` keeps its arrays. The interpreter serves only who calls it by name."""
    return backend.name == "torch" and backend.device.type == "cuda" and installed() and not interpreted()


def refusal(storage: BlockStorage, dtype: str) -> str | None:
    """Why queries of ``dtype`` over ``storage`` are not for these kernels, in words; None if they are."""
    if dtype not in ("float16", "bfloat16"):
        return f"queries of {dtype} are answered in that precision, and the kernels multiply in half"
    if storage.spec.latent:
        return "V is a view of K"
    for side, codec in (("K", storage.codec.k), ("V", storage.codec.v)):
        if not _known(codec):
            return f"no kernel reads {codec.name}, the codec of {side}"
    return None


def _known(codec: Codec) -> bool:
    return isinstance(codec, Int) or (isinstance(codec, Plain) and codec.dtype in ("float32", "float16", "bfloat16"))


def encodes(storage: BlockStorage, k: Array, v: Array | None) -> bool:
    """Whether new rows can be encoded as they are written: whole codes for each token, and numbers that surely fit."""
    codecs = (storage.codec.k, storage.codec.v)
    if v is None or not runs_on(storage.backend) or not all(isinstance(c, Int) and c.axis == "token" for c in codecs):
        return False
    return max(storage.largest(k), storage.largest(v)) <= SAFE  # else, and where it is NaN, `encode` has its say
