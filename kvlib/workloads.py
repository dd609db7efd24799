"""Workloads: seeded requests of unequal lengths, and conversations whose prompts begin alike.

Nothing here is recorded traffic: every request is drawn from a distribution that its `Traffic` states, from uniform
numbers of a seeded generator, so that it is the same on every machine. `kvlib.traces` replays recorded traffic.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Lengths(NamedTuple):
    """A log-normal length in tokens, at least 1: its mean, and sigma, the standard deviation of its logarithm."""

    mean: float
    sigma: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """What users send. A request's prompt and output together are cut to ``limit`` tokens, the output first.

    Attributes:
        prompt, output: `Lengths` of the two, drawn independently.
        limit: the longest that a request may become, in tokens.
        rate: requests per second; the gaps between arrivals are exponential.
    """

    prompt: Lengths
    output: Lengths
    limit: int = 2048
    rate: float = 1.0


# Means of figure 11 of Kwon et al. 2023 (arXiv:2309.06180). The paper prints no spread: both sigmas are this library's.
SHAREGPT = Traffic(Lengths(161.31, 1.2), Lengths(337.99, 0.9))
ALPACA = Traffic(Lengths(19.31, 0.6), Lengths(58.45, 0.9))
MESSAGE, ANSWER = Lengths(48, 0.8), Lengths(96, 0.8)  # of a chat, in `conversations`; this library's choice


class Request(NamedTuple):
    """One request: when it comes (seconds), and how many tokens it brings and will be given."""

    arrival: float
    prompt: int
    output: int

    @property
    def total(self) -> int:
        """Tokens of prompt and output."""
        return self.prompt + self.output


def requests(traffic: Traffic, count: int, seed: int = 0) -> list[Request]:
    """``count`` requests in the order of their arrival. The first ones do not depend on ``count``."""
    arrival, drawn = 0.0, []
    for first, second, gap in np.random.default_rng(seed).random((count, 3)).tolist():
        arrival -= math.log(1 - gap) / traffic.rate
        prompt = min(_length(traffic.prompt, first), traffic.limit - 1)
        output = min(_length(traffic.output, second), traffic.limit - prompt)
        drawn.append(Request(arrival, prompt, output))
    return drawn


def _length(lengths: Lengths, uniform: float) -> int:
    """The length below which a share ``uniform`` of all lengths lie."""
    centre = math.log(lengths.mean) - lengths.sigma**2 / 2  # the mean of a log-normal is exp(centre + sigma² / 2)
    uniform = min(max(uniform, 1e-12), 1 - 1e-12)
    return max(1, round(math.exp(NormalDist(centre, lengths.sigma or 1e-12).inv_cdf(uniform))))


class Turn(NamedTuple):
    """One turn of a conversation: what is sent (everything so far), and the answer that comes back."""

    conversation: int
    prompt: list[int]
    answer: list[int]


def conversations(
    count: int,
    turns: int,
    system: int = 256,
    message: Lengths = MESSAGE,
    answer: Lengths = ANSWER,
    vocab: int = 32_000,
    seed: int = 0,
) -> list[Turn]:
    """The turns of ``count`` chats of ``turns`` turns each, in the order in which they are sent.

    All begin with the same ``system`` tokens. Each turn sends the whole conversation again and one message more. Who
    speaks next is drawn evenly among the chats that have not ended, so they interleave. Tokens are drawn evenly from
    ``vocab``: two chats share nothing by chance beyond the system prompt, up to one token in ``vocab``.
    """
    rng = np.random.default_rng(seed)

    def text(length: int) -> list[int]:
        return (rng.random(length) * vocab).astype(int).tolist()

    opening = text(system)
    histories, left, sent = [list(opening) for _ in range(count)], [turns] * count, []
    while any(left):
        speaking = [chat for chat in range(count) if left[chat]]
        chat = speaking[int(rng.random() * len(speaking))]
        prompt = histories[chat] + text(_length(message, rng.random()))
        said = text(_length(answer, rng.random()))
        sent.append(Turn(chat, prompt, said))
        histories[chat], left[chat] = prompt + said, left[chat] - 1
    return sent
