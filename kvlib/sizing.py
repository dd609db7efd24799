"""Sizing: how many bytes a model's cache takes, before you build it.

>>> from kvlib import sizing
>>> sizing.kv_cache_bytes("Llama-3.1-8B", tokens=32_768, batch=1, codec="int8")
2214593292
>>> print(sizing.compare_strategies("Llama-3.1-8B", tokens=32_768))   # doctest: +SKIP
"""

import math
from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

from kvlib.codecs import Codec, Split
from kvlib.comparison import HEADER, STRATEGIES, Comparison, Strategy, compare_strategies, human_bytes
from kvlib.eviction import Policy
from kvlib.footprint import Footprint, footprint, model_footprint
from kvlib.registry import Model, ModelLike, find, registry
from kvlib.spec import CacheSpec

__all__ = [
    "CONTEXTS",
    "HEADER",
    "LONGEST",
    "STRATEGIES",
    "Comparison",
    "Footprint",
    "Saving",
    "Strategy",
    "bytes_by_context",
    "compare_strategies",
    "find",
    "human_bytes",
    "kv_cache_bytes",
    "max_batch",
    "max_context",
    "model_footprint",
    "registry",
    "savings_by_kv_groups",
    "weight_bytes",
]

CONTEXTS = tuple(2**power for power in range(8, 18))  # 256 … 131,072 tokens
LONGEST = 2**30  # where `max_context` stops looking, in tokens


def kv_cache_bytes(
    model_or_spec: ModelLike,
    tokens: int | SequenceOf[int],
    batch: int | None = None,
    codec: str | Codec | Split = "plain",
    block_size: int | None = None,
    eviction: Policy | None = None,
    **settings: int | None,
) -> int:
    """Bytes of everything that the caches of a model hold for ``batch`` sequences of ``tokens`` tokens.

    For a `CacheSpec` that is exactly `KVCache(spec, batch, max_tokens=tokens, …).nbytes`: numbers, scales, free places,
    tables. Where a policy evicts, ``max_tokens`` is the least that decoding needs, unless you say how much.
    `model_footprint` tells the parts apart; its ``payload`` is the figure that papers print.

    Args:
        model_or_spec: a name of the registry, a path to a Hugging Face config.json, its contents, a spec, or a `Model`.
        tokens, batch, codec, block_size, eviction, settings: see `kvlib.footprint.footprint`.

    Raises:
        ValueError: an unknown name (with those near it), a config.json without a field that is needed, a bad size.
    """
    return model_footprint(
        model_or_spec, tokens, batch, codec=codec, block_size=block_size, eviction=eviction, **settings
    ).total


# -- series ------------------------------------------------------------------------------------------------------------


def bytes_by_context(model: ModelLike, contexts: SequenceOf[int] = CONTEXTS, **settings: Any) -> dict[int, Footprint]:
    """{tokens: footprint} of one sequence (or ``batch``) at each length; settings as of `model_footprint`."""
    model = find(model)
    return {tokens: model_footprint(model, tokens, **settings) for tokens in contexts}


class Saving(NamedTuple):
    """``n_kv_groups`` query heads share each of ``num_kv_heads`` KV heads; percent less than with one for each."""

    n_kv_groups: int
    num_kv_heads: int
    bytes: int
    percent_saved: float


def savings_by_kv_groups(
    num_heads: int = 24,
    num_layers: int = 48,
    width: int = 2048,
    tokens: int = 8192,
    batch: int = 1,
    dtype: str = "bfloat16",
    head_dim: int | None = None,
) -> list[Saving]:
    """What grouped-query attention saves, for every number of query heads that may share a KV head.

    The payload alone, from multi-head attention (1 to a group) to multi-query attention (all of them). ``head_dim``
    None is ``width / num_heads``, rounded up. The percentage, 1 - 1 / n_kv_groups, does not depend on the other sizes.
    """
    head_dim = math.ceil(width / num_heads) if head_dim is None else head_dim
    counts = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    specs = {n: CacheSpec(num_heads // n, head_dim, num_layers, dtype) for n in counts}
    payload = {n: footprint(spec, tokens, batch).payload for n, spec in specs.items()}
    return [Saving(n, num_heads // n, payload[n], 100 * (1 - payload[n] / payload[1])) for n in counts]


# -- beside the weights ------------------------------------------------------------------------------------------------


def weight_bytes(model: ModelLike, bytes_per_weight: float = 2, parameters: int | None = None) -> int:
    """Bytes of the weights: ``parameters`` (None: the model's own count) times ``bytes_per_weight`` (2: float16)."""
    model = find(model)
    parameters = model.parameters if parameters is None else parameters
    if not parameters or parameters < 0 or bytes_per_weight < 0:
        unknown = f"the number of weights of {model.name} is not known: pass parameters=…"
        raise ValueError(unknown if parameters is None else "parameters and bytes_per_weight must be positive")
    return math.ceil(parameters * bytes_per_weight)


def _room(model: Model, memory: float, bytes_per_weight: float, parameters: int | None, reserve: float) -> float:
    if not memory > 0:
        raise ValueError(f"memory must be a positive number of bytes, got {memory!r}")
    return memory - reserve - weight_bytes(model, bytes_per_weight, parameters)


def max_batch(
    model: ModelLike,
    memory: float,
    tokens: int,
    bytes_per_weight: float = 2,
    parameters: int | None = None,
    reserve: float = 0,
    **settings: Any,
) -> int:
    """The most sequences of ``tokens`` tokens whose cache fits in ``memory`` bytes beside the weights and ``reserve``.

    ``reserve``: bytes for activations and whatever else the device holds. 0 if not even one fits.
    """
    model = find(model)
    room = _room(model, memory, bytes_per_weight, parameters, reserve)
    return max(0, int(room // kv_cache_bytes(model, tokens, 1, **settings)))  # every part grows with the batch


def max_context(
    model: ModelLike,
    memory: float,
    batch: int = 1,
    bytes_per_weight: float = 2,
    parameters: int | None = None,
    reserve: float = 0,
    **settings: Any,
) -> int:
    """The longest that each of ``batch`` sequences can be; arguments as of `max_batch`. 0 if not a single token fits.

    It may be longer than the model was made for (`Model.max_positions`). Where every layer has a window the cache stops
    growing, and the answer is `LONGEST`.
    """
    model = find(model)
    room = _room(model, memory, bytes_per_weight, parameters, reserve)

    def fits(tokens: int) -> bool:
        return kv_cache_bytes(model, tokens, batch, **settings) <= room

    if not fits(1):
        return 0
    fitting, too_long = 1, LONGEST + 1
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        fitting, too_long = (middle, too_long) if fits(middle) else (fitting, middle)
    return fitting
