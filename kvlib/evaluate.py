"""What a cache costs a real model: bits per byte of a text, what it still recalls, and how far attention is off.

Everything is read through the cache as generation reads it: new tokens are appended first, and attend to what the
cache then holds. ``settings`` are keyword arguments of `KVCache`, such as those in `kvlib.CATALOGUE`; unless they say
otherwise, sequences are contiguous. Rows that a cache stores unencoded, in ``codec="plain"`` and in an exact tail, are
in float16. A model whose tokens are bytes is needed for text, as `kvlib.tinylm` is.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvlib.arrays import Array
from kvlib.cache import KVCache
from kvlib.generation import TINYLM
from kvlib.model import Transformer
from kvlib.planes import Codec
from kvlib.spec import CacheSpec


class Question(NamedTuple):
    """``prompt`` ends in ``key_xy?``, a key that it defined ``distance`` bytes ago as ``answer``."""

    prompt: str
    answer: str
    distance: int


class Heads(NamedTuple):
    """What one layer's attention was given: q (B, Hq, T, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv), in float32."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


def heldout_text() -> bytes:
    """The 32 KB of Python source that the bundled model has not been trained on."""
    return (TINYLM / "heldout.txt").read_bytes()


def recall_questions() -> list[Question]:
    """The 200 recall questions that come with the bundled model, 40 for each of five distances."""
    lines = (TINYLM / "recall.jsonl").read_text("ascii").splitlines()
    return [Question(**json.loads(line)) for line in lines]


def windows(text: bytes, window: int = 1024, stride: int | None = None) -> np.ndarray:
    """Token ids (N, window) of the text's whole windows; ``stride`` is ``window`` unless given.

    Raises ValueError if the text is shorter than one window.
    """
    if len(text) < window:
        raise ValueError(f"the text has {len(text)} bytes, and one window takes {window}")
    ids = np.frombuffer(text, np.uint8)
    return np.lib.stride_tricks.sliding_window_view(ids, window)[:: stride or window].astype(np.int64)


def text_bits(
    model: Transformer, ids: np.ndarray, chunk: int = 16, prompt: int = 0, batch: int = 8, **settings: Any
) -> np.ndarray:
    """Bits that the model needs for each token of ids (N, T), read through a cache: (N, T - max(prompt, 1)).

    The mean is the bits per byte. Every row of ids starts with an empty cache.

    Args:
        chunk: tokens that are appended at once. 1 is what decoding does. More is faster, and changes nothing but
            rounding unless tokens are evicted: then the last query of a chunk sees up to ``chunk`` - 1 too many.
        prompt: tokens that are appended whole before that, and not counted; the token after them comes alone, which
            is when `SnapKV` chooses.
        batch: rows of ids that are computed together.
    """
    if not 0 <= prompt < ids.shape[1] - 1 or chunk < 1:
        came = f"chunk={chunk} and prompt={prompt} for rows of {ids.shape[1]}"
        raise ValueError(f"chunk must be at least 1, and two tokens must come after the prompt; got {came}")
    pieces = _pieces(ids.shape[1] - 1, chunk, prompt)
    costs = []
    for rows in np.split(ids, range(batch, len(ids), batch)):
        cache = _new_cache(model, len(rows), ids.shape[1], settings)
        bits = [_bits(model, rows, start, end, cache) for start, end in pieces]
        costs.append(np.concatenate(bits, axis=1)[:, max(prompt - 1, 0) :])
    return np.concatenate(costs)


def _bits(model: Transformer, ids: np.ndarray, start: int, end: int, cache: KVCache) -> np.ndarray:
    """Feed tokens start … end - 1, and return what the tokens behind each of them cost."""
    logits = model.backend.to_numpy(model(ids[:, start:end], cache)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(logits, ids[:, start + 1 : end + 1, None], axis=-1)[..., 0]
    return (np.log(np.exp(logits).sum(axis=-1)) - chosen) / np.log(2)


def recall(
    model: Transformer,
    questions: Sequence[Question],
    chunk: int | None = None,
    apart: bool = False,
    batch: int = 8,
    **settings: Any,
) -> np.ndarray:
    """Whether greedy generation through the cache gives each whole answer, (N,) of bool.

    Args:
        chunk: tokens of the prompt that are appended at once, as in `text_bits`; None is the whole prompt, as
            `kvlib.generate` does it.
        apart: the question comes behind the prompt byte by byte, so an eviction policy that acts upon a prompt has
            chosen before it knows what will be asked. Otherwise the question is the prompt's end, and whatever is
            evicted leaves after the first byte of the answer has been read.
        batch: questions that are computed together, those with prompts of similar length.
    """
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    hits = np.zeros(len(questions), bool)
    for start in range(0, len(order), batch):
        these = order[start : start + batch]
        hits[these] = _answers(model, [questions[i] for i in these], chunk, apart, settings)
    return hits


def _answers(
    model: Transformer, questions: list[Question], chunk: int | None, apart: bool, settings: dict[str, Any]
) -> list[bool]:
    prompts, answers = ([list(text.encode()) for text in column] for column in list(zip(*questions, strict=True))[:2])
    longest = max(len(prompt) for prompt in prompts)
    size = max(len(answer) for answer in answers)
    cache = _new_cache(model, len(prompts), longest + size, settings)
    ends = [bytes(prompt).rindex(b"\n") + 1 if apart else len(prompt) for prompt in prompts]
    tokens = _feed(model, [prompt[:end] for prompt, end in zip(prompts, ends, strict=True)], cache, chunk or longest)
    if apart:
        tokens = _feed(model, [prompt[end:] for prompt, end in zip(prompts, ends, strict=True)], cache, 1)
    found = [tokens]
    for _ in range(size - 1):
        found.append(_feed(model, [[token] for token in found[-1]], cache, 1))
    rows = zip(*found, strict=True)  # from steps of all sequences to sequences of all steps
    return [list(row[: len(answer)]) == answer for row, answer in zip(rows, answers, strict=True)]


def _feed(model: Transformer, rows: list[list[int]], cache: KVCache, step: int) -> list[int]:
    """Append ``rows[i]`` to sequence i, ``step`` tokens at once -> the most likely next token of each."""
    together = min(map(len, rows)) // step * step  # what longer rows have more comes first, each by itself
    tokens = []
    for seq, row in enumerate(rows):
        alone = len(row) - together
        for start in range(0, alone, step):
            logits = model([row[start : min(start + step, alone)]], cache, [seq], last_only=True)
            tokens[seq:] = [int(logits[0, -1].argmax())]
    for start in range(-together, 0, step):
        logits = model([row[start : start + step or None] for row in rows], cache, last_only=True)
        tokens = [int(row[-1].argmax()) for row in logits]
    return tokens


def record(model: Transformer, ids: np.ndarray) -> list[Heads]:
    """What every layer's attention is given when the model reads ids (N, T) with nothing rounded or dropped."""
    recorder = _Recorder(_new_cache(model, len(ids), ids.shape[1], {"codec": "float32"}))
    model(ids, recorder)
    return recorder.layers


def rounding_error(codec: Codec, rows: np.ndarray) -> np.ndarray:
    """Root mean square of what ``codec`` does to rows (..., H, T, D), relative to that of the rows, by head: (H,).

    Tokens are left out at the end if they do not fill a group.
    """
    rows = rows[..., : rows.shape[-2] // codec.group * codec.group, :]
    return _relative_error(codec.decode(codec.encode(rows), "float32"), rows)


def output_error(heads: Heads, chunk: int = 16, prompt: int = 0, **settings: Any) -> np.ndarray:
    """The same of the attention outputs, for each query head: (Hq,). Reads as `text_bits` does, past ``prompt``.

    The queries are those of the exact model: an error is that of one layer, and not of all below it.
    """
    batch, kv_heads, length, width = heads.k.shape
    spec = CacheSpec(kv_heads, width, v_head_dim=heads.v.shape[-1], dtype="float16")
    reference = KVCache(spec, batch, length, codec="float32")
    reference.append(heads.k, heads.v)
    cache, found = KVCache(spec, batch, length, **settings), []
    for start, end in _pieces(length, chunk, prompt):
        cache.append(heads.k[:, :, start:end], heads.v[:, :, start:end])
        found.append(cache.attend(heads.q[:, :, start:end]))
    return _relative_error(np.concatenate(found, axis=2)[:, :, prompt:], reference.attend(heads.q)[:, :, prompt:])


def _pieces(length: int, chunk: int, prompt: int) -> list[tuple[int, int]]:
    """How ``length`` tokens are appended: the prompt whole, one token, and from there on chunks."""
    starts = [0, prompt, *range(prompt + 1, length, chunk)] if prompt else list(range(0, length, chunk))
    return list(zip(starts, [*starts[1:], length], strict=True))


def _relative_error(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """(..., H, T, D) -> (H,)"""
    axes = tuple(axis for axis in range(exact.ndim) if axis != exact.ndim - 3)
    squares = [np.square(x, dtype=np.float64).sum(axis=axes) for x in (found - exact, exact)]
    return np.sqrt(squares[0] / squares[1])


def _new_cache(model: Transformer, batch: int, tokens: int, settings: dict[str, Any]) -> KVCache:
    spec = dataclasses.replace(model.spec, dtype="float16")
    device = None if model.backend.device is None else str(model.backend.device)
    return KVCache(spec, batch, tokens, backend=model.backend.name, device=device, **settings)


class _Recorder:
    """A cache that remembers, layer by layer, what it is asked."""

    def __init__(self, cache: KVCache) -> None:
        self.cache, self.layers = cache, []

    @property
    def lengths(self) -> dict[int, int]:
        return self.cache.lengths

    def append(self, k: Array, v: Array, layer: int, seqs: Sequence[int] | None) -> None:
        self.cache.append(k, v, layer, seqs)
        self.k, self.v = k, v

    def attend(self, q: Array, layer: int, seqs: Sequence[int] | None, **options: Any) -> Array:
        to_numpy = self.cache.backend.to_numpy
        self.layers.append(Heads(*(np.array(to_numpy(x), np.float32) for x in (q, self.k, self.v))))
        return self.cache.attend(q, layer, seqs, **options)
