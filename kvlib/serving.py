"""Serving in words and numbers: what a request is, what a step did, what it cost, and how well everybody was served.

Times are seconds of a simulated clock, which a cost model moves on, so that every run is the same on every machine.
With the default `Cost` the clock counts steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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


class Finished(NamedTuple):
    """A request that got its whole output. ``times``: when each token of it was there, in seconds."""

    id: int
    arrival: float
    prompt: int  # tokens
    tokens: tuple[int, ...]
    times: tuple[float, ...]
    preemptions: int
    reused: int  # tokens, each time that it was admitted
    recomputed: int  # tokens

    @classmethod
    def of(cls, request: Request) -> "Finished":
        tokens, times = tuple(request.output), tuple(request.times)
        counts = request.preemptions, request.reused, request.recomputed
        return cls(request.id, request.arrival, request.prompt, tokens, times, *counts)

    @property
    def time_to_first_token(self) -> float:
        return self.times[0] - self.arrival

    @property
    def time_per_output_token(self) -> float:
        """Seconds from one token to the next, after the first and on average; 0 if there was but one."""
        return (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)

    @property
    def longest_gap(self) -> float:
        """The longest that the reader waited between two tokens."""
        return max(np.diff(self.times), default=0.0)

    @property
    def latency(self) -> float:
        return self.times[-1] - self.arrival


class Summary(NamedTuple):
    """How a run went. Times in seconds; "p99": 99 of 100 requests waited no longer."""

    requests: int
    steps: int
    seconds: float  # from the first arrival to the last token
    prompt_tokens: int
    output_tokens: int
    throughput: float  # output tokens per second
    batch: float  # requests that computed something, in the mean step
    time_to_first_token: float  # mean
    time_to_first_token_p99: float
    time_per_output_token: float  # mean
    time_per_output_token_p99: float
    latency: float  # mean
    preemptions: int
    reused_tokens: int
    recomputed_tokens: int  # computed more than once


def summarise(finished: Sequence[Finished], steps: Sequence[Step]) -> Summary:
    """The figures of a run: its requests, all finished, and its steps. Raises ValueError if nothing has finished."""
    if not finished:
        raise ValueError("no request has finished: there is nothing to summarise")
    first = np.array([one.time_to_first_token for one in finished])
    each = np.array([one.time_per_output_token for one in finished if len(one.tokens) > 1] or [0.0])
    seconds = max(one.times[-1] for one in finished) - min(one.arrival for one in finished)
    prompts, outputs = sum(one.prompt for one in finished), sum(len(one.tokens) for one in finished)
    return Summary(
        requests=len(finished),
        steps=len(steps),
        seconds=seconds,
        prompt_tokens=prompts,
        output_tokens=outputs,
        throughput=outputs / seconds if seconds else float("inf"),
        batch=sum(len(step.prefill) + len(step.decode) for step in steps) / max(1, len(steps)),
        time_to_first_token=float(first.mean()),
        time_to_first_token_p99=float(np.quantile(first, 0.99, method="inverted_cdf")),
        time_per_output_token=float(each.mean()),
        time_per_output_token_p99=float(np.quantile(each, 0.99, method="inverted_cdf")),
        latency=float(np.mean([one.latency for one in finished])),
        preemptions=sum(one.preemptions for one in finished),
        reused_tokens=sum(one.reused for one in finished),
        recomputed_tokens=sum(one.recomputed for one in finished),
    )
