"""kvlib: every key-value cache variant from one composition, on NumPy and torch.

>>> import kvlib
>>> spec = kvlib.CacheSpec(num_kv_heads=2, head_dim=64, num_layers=1, dtype="float32")
>>> cache = kvlib.KVCache(spec, batch=1, max_tokens=1024, block_size=16)
"""

from kvlib.blocks import CacheFull
from kvlib.cache import KVCache
from kvlib.catalogue import CATALOGUE
from kvlib.codecs import KIVI, MXFP4, NVFP4, Float8, Int, Rotated, Split
from kvlib.eviction import HeavyHitter, SlidingWindow, SnapKV
from kvlib.spec import CacheSpec

__version__ = "0.1.0"
__all__ = [
    "CATALOGUE",
    "KIVI",
    "MXFP4",
    "NVFP4",
    "CacheFull",
    "CacheSpec",
    "Float8",
    "GroupedCache",
    "HeavyHitter",
    "Int",
    "KVCache",
    "Rotated",
    "SlidingWindow",
    "SnapKV",
    "Split",
    "Transformer",
    "generate",
    "sizing",
    "tinylm",
]

_LATE = {
    "GroupedCache": "kvlib.groups",
    "Transformer": "kvlib.model",
    "tinylm": "kvlib.generation",
    "generate": "kvlib.generation",
}


def __getattr__(name: str):
    """Import the rest of the library when it is first asked for: a cache alone needs none of it."""
    import importlib

    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    if name == "sizing":
        return importlib.import_module("kvlib.sizing")
    raise AttributeError(f"module 'kvlib' has no attribute {name!r}")
