"""How well everybody was served: times of each request, and the figures of a run.

Times are seconds of the engine's clock (`kvlib.serving`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvlib.serving import Request, Step


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
