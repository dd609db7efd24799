"""What a cache accepts: every message names what was expected, and what came."""

import math

from kvlib.arrays import Array, Backend, check_float
from kvlib.codecs import Split
from kvlib.eviction import Policy
from kvlib.spec import is_whole


def checked_size(name: str, value: int, least: int = 1) -> int:
    """``value`` as an int. Raises ValueError unless it is an integer of at least ``least``."""
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def whole_groups(block_size: int | None, max_tokens: int, codec: Split) -> int:
    """Tokens per block, which must hold whole groups of the codec; for None the least that holds ``max_tokens``."""
    if block_size is None:
        return math.ceil(max_tokens / codec.group) * codec.group
    if checked_size("block_size", block_size) % codec.group:
        raise ValueError(
            f"block_size must be a multiple of the {codec.group} tokens that the codec {codec.name} encodes together, "
            f"got {block_size}"
        )
    return int(block_size)


def checked_policy(eviction: Policy | None, codec: Split) -> Policy | None:
    """``eviction`` if it is None or a policy whose budget can hold the codec's tail."""
    if eviction is None:
        return None
    if not isinstance(eviction, Policy):
        raise TypeError(f"eviction must be None or a kvlib.eviction.Policy like SlidingWindow(64); got {eviction!r}")
    kind = type(eviction).__name__
    checked_size(f"{kind}.budget", getattr(eviction, "budget", None))
    if eviction.observe is not None:
        checked_size(f"{kind}.observe", eviction.observe, least=0)
    eviction.check(codec.tail)
    return eviction


def checked_sinks(sinks: Array, heads: int, num_kv_heads: int, backend: Backend) -> Array:
    """Learned sinks (Hq,) as (Hkv, group)."""
    check_float("sinks", sinks, backend)
    if tuple(sinks.shape) != (heads,):
        raise ValueError(f"sinks must have shape ({heads},), a number for each query head; got {tuple(sinks.shape)}")
    return backend.detach(sinks).reshape(num_kv_heads, -1)


def check_shape(name: str, x: Array, batch: int, heads: int | None, num_kv_heads: int, width: int) -> None:
    """Raise ValueError unless x is (batch, heads, T >= 1, width); heads=None: any multiple of ``num_kv_heads``."""
    fits = x.ndim == 4 and x.shape[0] == batch and x.shape[2] >= 1 and x.shape[3] == width
    if fits and (x.shape[1] == heads or (heads is None and x.shape[1] >= 1 and x.shape[1] % num_kv_heads == 0)):
        return
    expected = f"({batch}, {heads or f'a multiple of {num_kv_heads}'}, T >= 1, {width})"
    raise ValueError(f"{name} must have shape (sequences, heads, tokens, width) = {expected}, got {tuple(x.shape)}")
