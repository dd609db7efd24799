"""Serving in words: what a request is, and what a step did and cost.

Times are seconds of a simulated clock, which a cost model moves on, so that every run is the same on every machine.
With the default `Cost` the clock counts steps.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from kvlib.spec import is_whole
from kvlib.swap import Swapped


class Request:
    """One request and how far it has come. The tokens that its cache lacks are ``tokens[computed:]``.

    Prompt and output are one list: a request that was preempted computes its output again as if it had been prompt.

    Attributes:
        id, arrival (seconds), max_new, stop (token ids): as they were asked for. ``prompt``: its length in tokens.
        tokens: the prompt, and behind it the output so far. ``times``: when each token of the output was there.
        seq: its sequence in the cache, None while it waits. ``computed``: tokens that the cache holds of it.
        swapped: what was taken out of the cache, if that is how it was preempted.
        preemptions: how often. ``reused``: tokens that were found in the cache instead of computed, ``found`` of them
            when it was admitted last; ``recomputed``: tokens that were computed and then computed again.
        published: blocks of it that the prefix index knows.
    """

    __slots__ = (
        *("arrival", "computed", "furthest", "id", "max_new", "preemptions", "prompt", "published"),
        *("found", "recomputed", "reused", "seq", "stop", "swapped", "times", "tokens"),
    )

    def __init__(self, id: int, arrival: float, prompt: Sequence[int], max_new: int, stop: frozenset[int]) -> None:
        self.id, self.arrival, self.max_new, self.stop = id, arrival, max_new, stop
        self.tokens, self.prompt = list(prompt), len(prompt)
        self.times: list[float] = []
        self.seq: int | None = None
        self.swapped: Swapped | None = None
        self.computed = self.furthest = self.found = self.published = 0
        self.preemptions = self.reused = self.recomputed = 0

    def __repr__(self) -> str:
        return f"Request({self.id}: {self.computed} of {len(self.tokens)} tokens computed, prompt {self.prompt})"

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt :]

    @property
    def left(self) -> int:
        """Tokens to be computed before the next one can be chosen: 1 while it decodes, more in a prefill."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        return self.left == 1 and len(self.tokens) > self.prompt

    @property
    def longest(self) -> int:
        """The most tokens that the cache will hold of it: nobody attends to the last one of the output."""
        return self.prompt + self.max_new - 1

    def advance(self, count: int) -> None:
        """``count`` more tokens are in the cache."""
        self.recomputed += max(0, min(count, self.furthest - self.computed))
        self.computed += count
        self.furthest = max(self.furthest, self.computed)

    @property
    def done(self) -> bool:
        """Whether the output is complete."""
        new = len(self.tokens) - self.prompt
        return new >= self.max_new or (new > 0 and self.tokens[-1] in self.stop)


class Work(NamedTuple):
    """What a step computes and moves, in tokens: what its cost depends on."""

    prefill: int
    decode: int
    context: int  # cached tokens that attention reads, a request's own new ones included
    swapped: int  # tokens that went to the host or came back

    @classmethod
    def of(cls, counts: Mapping[Request, int], decoding: Container[Request], context: int, swapped: int) -> "Work":
        """``counts``: tokens that each request computes. ``decoding``: who computes the newest of its output."""
        decodes = sum(request in decoding for request in counts)
        return cls(sum(counts.values()) - decodes, decodes, context, swapped)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that a step takes: so many for itself, and for each token of its `Work`."""

    step: float = 1.0
    token: float = 0.0
    context: float = 0.0
    swapped: float = 0.0

    def __call__(self, work: Work) -> float:
        tokens = self.token * (work.prefill + work.decode)
        return self.step + tokens + self.context * work.context + self.swapped * work.swapped


class Step(NamedTuple):
    """The record of one step. Requests are named by their ids; pairs are (request, tokens)."""

    clock: float  # when it began
    seconds: float
    prefill: tuple[tuple[int, int], ...]  # who computed how much of a prompt, or of what was preempted
    decode: tuple[int, ...]  # who computed one token of output
    running: tuple[int, ...]  # who had a place in the cache at the end
    waiting: tuple[int, ...]  # who had arrived and had none
    admitted: tuple[int, ...]
    reused: tuple[tuple[int, int], ...]  # what of the admitted was in the cache already
    preempted: tuple[int, ...]
    swapped_out: tuple[int, ...]  # those of the preempted whose tokens went to the host
    swapped_in: tuple[int, ...]  # those of the admitted whose tokens came back from there
    finished: tuple[int, ...]
    free_blocks: int  # when all was stored and nobody had left
    kept_blocks: int  # held by the prefix index alone, and given up when they are wanted
    work: Work
    tables: tuple[tuple[int, tuple[int, ...]], ...] = ()  # (request, its blocks), if the engine keeps them


def token_ids(name: str, given: Any, vocab: int | None) -> list[int]:
    """``given`` as a list of token ids: a flat sequence, one id, or text as its bytes, if those are the tokens.

    ``vocab``: how many ids there are; None if nobody knows. Raises TypeError or ValueError, which call it ``name``.
    """
    if isinstance(given, str | bytes):
        if vocab != 256:
            raise TypeError(f"{name} may be text only for a model whose tokens are bytes; pass token ids")
        given = list(given.encode() if isinstance(given, str) else given)
    given = [given] if is_whole(given) else given
    ids = np.asarray(given if len(given) else np.zeros(0, int))
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a flat list of integer token ids, got {ids.dtype} of shape {ids.shape}")
    if ids.size and (ids.min() < 0 or (vocab is not None and ids.max() >= vocab)):
        raise ValueError(f"{name} holds ids from {ids.min()} to {ids.max()}; the vocabulary has {vocab}")
    return ids.tolist()
