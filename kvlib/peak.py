"""How much memory a prefill takes at its worst moment, predicted from shapes; `kvlib.memory` measures.

The prediction is an inventory. It goes through the moments that can be the worst (a tile is mixed, the outputs are put
together, the outputs of the heads are projected, the feed-forward block has its three widest arrays), lists the arrays
that are alive in each, as the code of `kvlib.prefill`, `kvlib.heads` and `kvlib.feedforward` holds them, and takes the
largest sum. Nothing in it is fitted. It is checked against what NumPy allocates, in float32.

Counted are arrays that grow with the chunk, the tile or the prompt. Not counted: the weights and the prompt, which are
there before; what Python itself needs, some 10 to 20 KB; workspaces of a GPU's libraries.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kvlib.arrays import SCRATCH_BYTES
from kvlib.cache import KVCache
from kvlib.codecs import Plain
from kvlib.prefill import TILE, _pieces, _sizes
from kvlib.spec import FLOAT_BYTES

Buffers = dict[str, int]
Piece = tuple[int, int, list[int]]  # a chunk: where it starts, its size, and where the chunks before it ended


class Peak(NamedTuple):
    """The worst moment of a prefill: what it is, the bytes of the arrays alive in it, and those of the cache beside."""

    moment: str
    chunk: tuple[int, int]  # (start, size) of the chunk in which it comes
    buffers: Buffers
    cache: int  # blocks that hold the prompt once it is in

    @property
    def scores(self) -> int:
        """Bytes of scores, and of the mask that hides the future in them."""
        return self.buffers.get("scores", 0) + self.buffers.get("mask", 0)

    @property
    def activations(self) -> int:
        """Bytes of all else that is computed."""
        return self.nbytes - self.scores

    @property
    def nbytes(self) -> int:
        """Scores and activations: what is taken on top of weights and cache."""
        return sum(self.buffers.values())


def attention_peak(
    cache: KVCache,
    num_heads: int,
    tokens: int,
    chunk: int | Sequence[int] | None = None,
    tile: int | None = TILE,
    dtype: str = "float32",
) -> Peak:
    """The worst moment of `kvlib.prefill.prefill_attention` on the empty sequences of ``cache``.

    Args:
        cache: whose spec, block size, batch of open sequences and codec count; its blocks may be of any number.
        num_heads: query heads. ``dtype``: of q, k and v.

    Raises ValueError: the codec is not a plain one: others decode in buffers of their own, which are not listed here.
    """
    batch = max(1, len(cache.lengths))
    answers = {"answers": batch * num_heads * tokens * cache.spec.value_dim * FLOAT_BYTES[dtype]}
    moments = (
        (moment, piece, answers | buffers)
        for piece in _worst(_sizes(tokens, chunk))
        for moment, buffers in _attention(cache, num_heads, batch, piece, tile, dtype)
    )
    return _largest(moments, _cache_bytes(cache, tokens, batch))


def prefill_peak(
    model: Any,
    cache: KVCache,
    tokens: int,
    chunk: int | Sequence[int] | None = None,
    tile: int | None = TILE,
) -> Peak:
    """The worst moment of `kvlib.prefill.prefill` with ``model`` on the empty sequences of ``cache``.

    Raises ValueError: the model is none of attention over grouped heads and SwiGLU without biases, norms of single
        heads or second norms (such as Llama and Mistral); or the codec is not a plain one.
    """
    config, batch = model.config, max(1, len(cache.lengths))
    odd = (config.latent, config.experts, config.qk_norm, config.sandwich_norms, config.qkv_bias, config.mlp_bias)
    if any(odd) or config.activation != "silu":
        raise ValueError(f"the arrays of a layer are listed for the architecture of Llama, not {config.architecture}")
    moments = (
        (moment, piece, buffers)
        for piece in _worst(_sizes(tokens, chunk))
        for moment, buffers in _model(model, cache, batch, piece, tile)
    )
    return _largest(moments, _cache_bytes(cache, tokens, batch))


# -- the inventory -----------------------------------------------------------------------------------------------------


def _attention(
    cache: KVCache, heads: int, batch: int, piece: Piece, tile: int | None, dtype: str
) -> Iterator[tuple[str, Buffers]]:
    """What `Tiled.attend` holds when it mixes a tile, and when it puts the outputs of the sequences together."""
    spec, (start, size, _), item = cache.spec, piece, 8 if dtype == "float64" else 4
    stop, rows = start + size, heads * size
    width = spec.head_dim if spec.latent else spec.value_dim  # a latent cache mixes whole rows, and cuts them then
    one_output = rows * width * item
    queries = {"queries": batch * rows * spec.head_dim * item}
    finished = (batch - 1) * one_output  # of sequences that were answered before the last one
    for lo, hi in _tiles(cache, stop, tile):
        partials = 2 if lo else 1  # what all tiles before have given, and what this one gives
        read = _Read.of(cache, lo, hi, item, piece, tile)
        scores = queries | {
            "scores": rows * (hi - lo) * item,
            "mask": size * (hi - lo) * item if hi - 1 > start else 0,
            "maxima and sums": 2 * partials * rows * item,
        }
        before = scores | {"outputs": (partials - 1) * one_output + finished}
        yield "values are gathered", before | {"keys and values": read.gathered + read.outgrown}
        mixed = {"outputs": partials * one_output + finished, "keys and values": read.gathered + read.decoded}
        yield "a tile is mixed", scores | mixed
    narrow = batch * one_output * FLOAT_BYTES[dtype] // item if FLOAT_BYTES[dtype] != item else 0
    yield "outputs are joined", queries | {"outputs": 2 * batch * one_output + narrow}


def _tiles(cache: KVCache, stop: int, tile: int | None) -> Iterator[tuple[int, int]]:
    """As `kvlib.tiling.Reader.blocks` cuts the slots before ``stop``."""
    lo, tile = 0, stop if tile is None else tile
    edge = max(tile, cache.block_size)
    while lo < stop:
        hi = min(lo + tile, (lo // edge + 1) * edge, stop)
        yield lo, hi
        lo = hi


class _Read(NamedTuple):
    """Bytes that reading a tile takes."""

    gathered: int  # K and V of several blocks, side by side; nothing inside one block
    outgrown: int  # the scratch memory of V, while a larger one takes its place
    decoded: int  # V in the dtype of the scores

    @classmethod
    def of(cls, cache: KVCache, lo: int, hi: int, item: int, piece: Piece, tile: int | None) -> "_Read":
        spec, codecs = cache.spec, (cache.codec.k, cache.codec.v)
        if not all(isinstance(codec, Plain) for codec in codecs):
            raise ValueError(f"the buffers of a plain codec are listed, not of {cache.codec.name}")
        stored = [FLOAT_BYTES[codec.dtype] for codec in codecs]
        widths = spec.head_dim, spec.stored_value_dim
        slot_bytes = [spec.num_kv_heads * width * each for width, each in zip(widths, stored, strict=True)]

        def slots(start: int, stop: int) -> int:
            first, last = start // cache.block_size, (stop - 1) // cache.block_size
            return 0 if first == last else (last - first + 1) * cache.block_size

        now, gathered, outgrown = slots(lo, hi), 0, 0
        earlier = [slots(0, end if tile is None else min(tile, end)) for end in piece[2]]
        for each in slot_bytes:
            kept = 0
            if cache.backend.name == "numpy":  # a thread keeps its largest gather, up to a limit
                kept = max((each * count for count in earlier if each * count <= SCRATCH_BYTES), default=0)
            gathered += each * now + (kept if each * now > SCRATCH_BYTES else 0)
            outgrown = kept if kept < each * now <= SCRATCH_BYTES else 0  # in the end that of V, which comes last
        side = 0 if spec.latent else 1
        decoded = spec.num_kv_heads * (hi - lo) * widths[side] * item if stored[side] != item else 0
        return cls(gathered, outgrown, decoded)


def _model(
    model: Any, cache: KVCache, batch: int, piece: Piece, tile: int | None
) -> Iterator[tuple[str, Buffers]]:
    """What a layer holds behind the first: of the model, of the layer, and of what happens in it."""
    config, tokens = model.config, batch * piece[1]
    item, wide = FLOAT_BYTES[model.dtype], max(4, FLOAT_BYTES[model.dtype])
    hidden, inner = (tokens * width * item for width in (config.hidden_size, config.intermediate_size))
    q, kv = (tokens * heads * config.head_dim * item for heads in (config.num_heads, config.num_kv_heads))
    base = {
        "positions and angles": tokens * (2 * 8 + 4 * config.head_dim),  # ids, positions, cosines, sines
        "logits": batch * config.vocab_size * 4 if piece[0] else 0,  # of the chunk before
        # what the layer was given, and what the first layer was given
        "hidden states": hidden * (1 if config.num_layers == 1 else 2),
    }
    layer = base | {"normed": hidden, "q, k, v": q + 2 * kv}
    for moment, buffers in _attention(cache, config.num_heads, batch, piece, tile, model.dtype):
        yield moment, layer | {"rotated q, k": q + kv} | buffers
    yield "heads are projected", layer | {"outputs": 2 * q, "projected": hidden}
    # two more hidden states: with attention added, and what was added
    states = base["hidden states"] + 2 * hidden
    gate = 3 * inner if item == wide else inner + 3 * tokens * config.intermediate_size * wide
    yield "the feed-forward block", base | {"hidden states": states, "normed": hidden, "gate and up": gate}


def _worst(sizes: list[int]) -> Iterator[Piece]:
    """Of chunks of one size the last: it sees most keys."""
    last = {size: start for start, size in _pieces(sizes)}
    ends = [start + size for start, size in _pieces(sizes)]
    return ((start, size, [end for end in ends if end <= start]) for size, start in last.items())


def _largest(moments: Iterator[tuple[str, Piece, Buffers]], cache: int) -> Peak:
    moment, (start, size, _), buffers = max(moments, key=lambda found: sum(found[2].values()))
    return Peak(moment, (start, size), {name: size for name, size in buffers.items() if size}, cache)


def _cache_bytes(cache: KVCache, tokens: int, batch: int) -> int:
    """The blocks of ``batch`` sequences of ``tokens`` tokens, all layers."""
    per_token = sum(
        plane.columns * cache.backend.zeros((1,), plane.dtype).nbytes / plane.tokens
        for side in cache._storage._layout.values()
        for plane in side.values()
    )
    slots = batch * math.ceil(tokens / cache.block_size) * cache.block_size
    return round(slots * cache.spec.num_layers * cache.spec.num_kv_heads * per_token)
