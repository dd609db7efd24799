"""Generation: feed the prompt, choose a token, feed it back. A byte-level model takes and gives text."""

import codecs
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvlib.cache import KVCache
from kvlib.groups import GroupedCache
from kvlib.model import Transformer

TINYLM = Path(__file__).parent / "data" / "tinylm"
Prompt = str | bytes | Sequence[int]


def tinylm(backend: str = "numpy", device: str | None = None) -> Transformer:
    """The bundled byte-level model, trained on Python source: token ids are the bytes of UTF-8 text.

    Raises FileNotFoundError if the installation lacks it.
    """
    if not (TINYLM / "config.json").is_file():
        raise FileNotFoundError(
            f"the bundled model is not in {TINYLM}; install kvlib again, or run scripts/train_tinylm.py"
        )
    return Transformer.from_pretrained(TINYLM, backend, device)


def generate(
    model: Transformer,
    prompt: Prompt,
    max_new_tokens: int,
    cache: KVCache | GroupedCache | bool | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: Prompt | int | None = None,
) -> Iterator[Any]:
    """Continue ``prompt``: an iterator that computes one more token whenever one is asked for.

    Args:
        prompt: token ids; or, for a model whose tokens are bytes (vocab_size 256), text or bytes. What you
            give you get: ids for ids, bytes for bytes, and for text pieces of text, never half a character.
        max_new_tokens: the most tokens to generate.
        cache: None builds a contiguous cache that fits, with `Transformer.new_cache`. A cache with one open sequence
            is continued: the prompt goes behind what it holds, and at the end it holds all but the last token.
            False uses no cache: every step computes the whole sequence again.
        temperature: 0 takes the most likely token; above, logits are divided by it and a token is drawn.
        top_k: draw among the ``top_k`` most likely tokens only.
        seed: of the draws.
        stop: end after this token id, or after these ids, bytes or text in a row; they are still yielded.

    Raises:
        TypeError, ValueError: an argument does not fit; raised at once, not when the first token is due.
    """
    ids = _encode(model, "prompt", prompt)
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("top_k", top_k, 1), ("seed", seed, 0)):
        if (value is None and name == "top_k") or (isinstance(value, int | np.integer) and value >= least):
            continue
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not isinstance(temperature, int | float | np.floating) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature!r}")
    stop = [stop] if isinstance(stop, int | np.integer) else stop
    ending = [] if stop is None else _encode(model, "stop", stop)
    rng = np.random.default_rng(seed)

    def choose(logits: np.ndarray) -> int:
        return sample(logits, temperature, top_k, rng)

    if cache is False:
        tokens = _recompute(model, ids, choose)
    else:
        cache, seq = _checked_cache(model, cache, len(ids), max_new_tokens)
        tokens = _decode(model, ids, choose, cache, seq)
    tokens = _until(itertools.islice(tokens, max_new_tokens), ending)
    if isinstance(prompt, str):
        return codecs.iterdecode((bytes([token]) for token in tokens), "utf-8", errors="replace")
    return (bytes([token]) for token in tokens) if isinstance(prompt, bytes) else tokens


def sample(logits: np.ndarray, temperature: float, top_k: int | None, rng: np.random.Generator) -> int:
    """Choose a token from logits (vocab,)."""
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
    return int(rng.choice(order, p=weights / weights.sum()))


def _decode(model: Transformer, ids: list[int], choose: Callable, cache: Any, seq: int) -> Iterator[int]:
    """The loop that remembers: after the prompt, each step computes one token."""
    step = int(min(getattr(cache, "max_step", math.inf), len(ids)))  # a cache with windows takes so many at once
    while True:
        for start in range(0, len(ids), step):
            logits = model([ids[start : start + step]], cache, seqs=[seq], last_only=True)
        ids = [choose(model.backend.to_numpy(logits)[0, -1])]
        yield ids[0]


def _recompute(model: Transformer, ids: list[int], choose: Callable) -> Iterator[int]:
    """The loop that forgets: each step computes every token again."""
    while True:
        logits = model([ids], last_only=True)
        ids = [*ids, choose(model.backend.to_numpy(logits)[0, -1])]
        yield ids[-1]


def _until(tokens: Iterator[int], ending: list[int]) -> Iterator[int]:
    """``tokens`` up to and including the first time that ``ending`` has come in a row."""
    last: deque[int] = deque(maxlen=len(ending))
    for token in tokens:
        yield token
        last.append(token)
        if ending and list(last) == ending:
            return


def _encode(model: Transformer, name: str, text: Any) -> list[int]:
    vocab = model.config.vocab_size
    if isinstance(text, str | bytes):
        if vocab != 256:
            raise TypeError(
                f"{name} may be text only for a model whose tokens are bytes (vocab_size 256); this one has "
                f"{vocab} tokens: encode with its own tokenizer and pass the ids"
            )
        text = list(text.encode() if isinstance(text, str) else text)
    try:
        ids = np.asarray(text.detach().cpu() if hasattr(text, "detach") else text)
    except ValueError:
        ids = np.empty((0, 0))
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(
            f"{name} must be text or a flat sequence of token ids with at least one token, got {text!r}"
        )
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integer token ids, got {ids.dtype}")
    if ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(
            f"{name} holds ids from {ids.min()} to {ids.max()}; the vocabulary runs from 0 to {vocab - 1}"
        )
    return ids.tolist()


def _checked_cache(model: Transformer, cache: Any, prompt: int, new: int) -> tuple[KVCache | GroupedCache, int]:
    """The cache to write into and its one sequence."""
    if cache is None:
        return model.new_cache(1, prompt + new), 0
    if not hasattr(cache, "lengths"):
        raise TypeError(
            f"cache must be a KVCache, None for a new one or False for none, got {type(cache).__name__}"
        )
    if len(cache.lengths) != 1:
        raise ValueError(
            f"cache must have exactly one open sequence to continue, and has {len(cache.lengths)}"
        )
    ((seq, held),) = cache.lengths.items()
    room = getattr(cache, "max_tokens", math.inf)
    if held + prompt + new - 1 > room:
        raise ValueError(
            f"the cache holds {held} of at most {room} tokens, and a prompt of {prompt} with {new} new ones "
            f"does not fit; build it with max_tokens={held + prompt + new}"
        )
    return cache, seq
