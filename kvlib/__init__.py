"""kvlib: every key-value cache variant from one composition, on NumPy and torch.

>>> import kvlib
>>> spec = kvlib.CacheSpec(num_kv_heads=2, head_dim=64, num_layers=1, dtype="float32")
>>> cache = kvlib.KVCache(spec, batch=1, max_tokens=1024, block_size=16)
"""

from kvlib.blocks import CacheFull
from kvlib.cache import KVCache
from kvlib.catalogue import CATALOGUE
from kvlib.spec import CacheSpec

__version__ = "0.1.0"
__all__ = ["CATALOGUE", "CacheFull", "CacheSpec", "KVCache", "Transformer", "generate", "tinylm"]

_LATE = {"Transformer": "kvlib.model", "tinylm": "kvlib.generation", "generate": "kvlib.generation"}


def __getattr__(name: str):
    """Import the model half of the library when it is first asked for: a cache alone needs none of it."""
    if name in _LATE:
        import importlib

        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'kvlib' has no attribute {name!r}")
