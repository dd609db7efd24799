"""Footprint: how many bytes a KVCache takes, by arithmetic: no array is built.

`KVCache.nbytes` adds up the arrays that a cache holds; here the same number follows from the spec, the codec's planes
and the number of blocks. That is said twice on purpose: tests hold one against the other.
"""

import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple

import numpy as np

from kvlib.codecs import Codec, Split, get_codec
from kvlib.eviction import Policy, SlidingWindow
from kvlib.registry import ModelLike, find
from kvlib.spec import FLOAT_BYTES, CacheSpec, is_whole

ID, LENGTH, POSITION, MASS, FLAG = 4, 8, 4, 4, 1  # bytes of one entry of what a cache knows about its blocks and slots


class Footprint(NamedTuple):
    """Bytes of a cache by what they are for. Each of the three sums below is what somebody calls "the cache's size".

    payload: the numbers that stand for K and V of the tokens that stay: codes, and rows that a codec keeps exact.
    metadata: scales and offsets, without which the codes of those tokens say nothing.
    unused: places for tokens that nobody has taken: the rest of a block, blocks that are free, the rest of a tail.
    tables: free list, reference counts, block tables, lengths; positions and attention mass if tokens are evicted.
    elements: numbers (no bytes) that the payload stands for.
    """

    payload: int
    metadata: int
    unused: int
    tables: int
    elements: int

    @property
    def stored(self) -> int:
        """Payload and metadata: what a paper on compression compares."""
        return self.payload + self.metadata

    @property
    def total(self) -> int:
        """Everything: what `KVCache.nbytes` says."""
        return self.payload + self.metadata + self.unused + self.tables

    @property
    def bits(self) -> float:
        """Bits per element that stays, metadata counted."""
        return 8 * self.stored / self.elements

    def __add__(self, other: "Footprint") -> "Footprint":
        return Footprint(*(mine + its for mine, its in zip(self, other, strict=True)))


def footprint(
    spec: CacheSpec,
    tokens: int | SequenceOf[int],
    batch: int | None = None,
    block_size: int | None = None,
    num_blocks: int | None = None,
    max_tokens: int | None = None,
    codec: str | Codec | Split = "plain",
    eviction: Policy | None = None,
    chunk: int = 1,
    prompt: int | None = None,
    query_heads: int | None = None,
) -> Footprint:
    """What `KVCache(spec, batch, max_tokens, block_size, num_blocks, codec, eviction)` takes when it is filled.

    Args:
        tokens: tokens seen by each of ``batch`` sequences (1 if left out), or the length of each, as a list.
        max_tokens: None is what the longest sequence needs: its tokens, or what is left of them when a policy evicts
            and at most ``chunk`` tokens are appended at once. A policy that chooses once holds the whole prompt.
        num_blocks: None is just enough for the sequences.
        prompt: for a policy that chooses once, the tokens before that; None: all but the last.
        query_heads: count the queries that a policy with ``observe`` = n keeps: those of the last n positions, in every
            query head, in float32. None: it has none (SnapKV has chosen, or nothing was attended yet).

    Raises:
        ValueError: a size that is no positive integer, a codec or block size that does not fit (as `KVCache` does).
    """
    codec = get_codec(codec, spec.dtype)
    widths = {"k": (codec.k, spec.head_dim), "v": (codec.v, spec.stored_value_dim)}
    sides = [(side, width) for side, width in widths.values() if width]
    for side, width in sides:
        side.check(width)
    if eviction is not None:
        eviction.check(codec.tail)
    lengths = _lengths(tokens, batch)
    needs = [_most(n, codec, eviction, _positive("chunk", chunk)) for n in lengths]
    pool = _pool(needs, block_size, num_blocks, max_tokens, codec.group, equal=not isinstance(tokens, Iterable))

    lanes = spec.num_layers * spec.num_kv_heads
    codes, scales = map(sum, zip(*(_group_bytes(side, width, codec.group) for side, width in sides), strict=True))
    exact = (spec.head_dim + spec.stored_value_dim) * FLOAT_BYTES[spec.dtype]  # of one token in the tail
    closed, waiting = map(sum, zip(*(_held(n, codec, eviction, prompt) for n in lengths), strict=True))
    places = pool.num_blocks * pool.block_size // codec.group * (codes + scales) + len(lengths) * codec.tail * exact
    payload, metadata = closed * codes + waiting * exact, closed * scales

    units = pool.per_sequence * pool.block_size // codec.group  # groups that one block table has room for
    table = pool.per_sequence * ID + 3 * spec.num_layers * LENGTH
    if eviction is not None:
        table += lanes * units * POSITION + spec.num_layers * FLAG
        if eviction.observe is None:
            table += lanes * (units + codec.tail) * MASS
        elif query_heads is not None:
            rows = spec.num_layers * _positive("query_heads", query_heads) * min(eviction.observe, *lengths)
            table += rows * spec.head_dim * FLOAT_BYTES["float32"]
    return Footprint(
        payload=lanes * payload,
        metadata=lanes * metadata,
        unused=lanes * (places - payload - metadata),
        tables=2 * ID * pool.num_blocks + len(lengths) * table,
        elements=lanes * (closed * codec.group + waiting) * (spec.head_dim + spec.stored_value_dim),
    )


def model_footprint(
    model: ModelLike,
    tokens: int | SequenceOf[int],
    batch: int | None = None,
    max_tokens: int | None = None,
    eviction: Policy | None = None,
    **settings: Any,
) -> Footprint:
    """As `footprint`, for all layers of a model: those that cache alike share one KVCache.

    A layer with a window keeps its newest tokens and needs no more room than they take, however long a sequence may
    become; ``eviction`` acts on it only where it keeps less.
    """
    parts = []
    for spec, window in find(model).groups:
        policy, room = eviction, max_tokens
        if window is not None and (policy is None or window <= policy.budget):
            policy = SlidingWindow(window)
            if max_tokens is not None:
                codec = get_codec(settings.get("codec", "plain"), spec.dtype)
                room = _most(_positive("max_tokens", max_tokens), codec, policy, settings.get("chunk", 1))
        parts.append(footprint(spec, tokens, batch, max_tokens=room, eviction=policy, **settings))
    return sum(parts[1:], parts[0])


def _lengths(tokens: int | SequenceOf[int], batch: int | None) -> list[int]:
    if not isinstance(tokens, Iterable):
        return [_positive("tokens", tokens)] * _positive("batch", 1 if batch is None else batch)
    lengths = [_positive("tokens", n) for n in tokens]
    if not lengths or batch not in (None, len(lengths)):
        raise ValueError(f"tokens lists the lengths of {len(lengths)} sequences, and batch={batch}")
    return lengths


class _Pool(NamedTuple):
    block_size: int
    num_blocks: int
    per_sequence: int  # blocks that a block table has room for


def _pool(
    needs: list[int], block_size: int | None, num_blocks: int | None, max_tokens: int | None, group: int, equal: bool
) -> _Pool:
    """The blocks of a cache whose sequences need room for ``needs`` tokens; ``equal``: a full sequence for each."""
    max_tokens = max(needs) if max_tokens is None else _positive("max_tokens", max_tokens)
    if max_tokens < max(needs):
        raise ValueError(f"max_tokens={max_tokens} is too few: a sequence holds {max(needs)} tokens at once")
    block_size = math.ceil(max_tokens / group) * group if block_size is None else _positive("block_size", block_size)
    if block_size % group:
        raise ValueError(f"block_size must be a multiple of the codec's {group} tokens, got {block_size}")
    per_sequence = math.ceil(max_tokens / block_size)
    enough = sum(math.ceil(need / block_size) for need in needs)
    if num_blocks is None:
        num_blocks = len(needs) * per_sequence if equal else enough
    if _positive("num_blocks", num_blocks) < enough:
        raise ValueError(f"num_blocks={num_blocks} is too few: the sequences need {enough} blocks of {block_size}")
    return _Pool(block_size, num_blocks, per_sequence)


def _group_bytes(codec: Codec, width: int, group: int) -> tuple[int, int]:
    """Bytes of the codes, and of the scales and offsets, of ``group`` tokens of one head in one layer."""
    planes = codec.planes(width)
    sizes = {
        name: group // plane.tokens * plane.columns * np.dtype(_numpy_name(plane.dtype)).itemsize
        for name, plane in planes.items()
    }
    return sizes["payload"], sum(sizes.values()) - sizes["payload"]


def _most(tokens: int, codec: Split, policy: Policy | None, chunk: int) -> int:
    """Tokens that a sequence must have room for at once, when ``tokens`` come in pieces of at most ``chunk``."""
    if policy is None or policy.once:
        return tokens
    waiting = range(codec.residual, codec.tail + 1)  # what may lie in the tail, once a group has closed
    return min(tokens, max(policy.units(n, codec.group) * codec.group + n for n in waiting) + chunk)


def _held(tokens: int, codec: Split, policy: Policy | None, prompt: int | None) -> tuple[int, int]:
    """What a layer holds of a sequence whose last token came alone: groups in its blocks, tokens in its tail."""

    def closed(n: int) -> int:
        return max(0, n - codec.residual) // codec.group

    waiting = tokens - closed(tokens) * codec.group
    if policy is None:
        return closed(tokens), waiting
    before = tokens - 1
    if policy.once and prompt is not None:
        before = min(before, _positive("prompt", prompt))
    kept = min(closed(before), policy.units(before - closed(before) * codec.group, codec.group))
    return kept + closed(tokens) - closed(before), waiting


def _numpy_name(dtype: str) -> str:
    return "float16" if dtype == "bfloat16" else dtype  # as wide, and NumPy knows it without ml_dtypes


def _positive(name: str, value: int) -> int:
    if not is_whole(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)
