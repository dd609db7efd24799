"""What benchmarks/quality.py compares: codecs, and policies by the budget they get; two of these are controls."""

from dataclasses import dataclass

import numpy as np

from kvlib.codecs import KIVI, MXFP4, NVFP4, Float8, Int, Plain, Rotated, Split
from kvlib.evaluate import Question
from kvlib.eviction import HeavyHitter, Policy, SlidingWindow, SnapKV

TOKEN, CHANNEL = Int(2, group_size=32), Int(2, "channel", 32)
CODECS: dict[str, Split] = {
    name: codec if isinstance(codec, Split) else Split(codec, codec)
    for name, codec in {
        "float32": Plain("float32"),
        "float16": Plain("float16"),
        "bfloat16": Plain("bfloat16"),
        "int8, row": Int(8),
        "int8, row, symmetric": Int(8, symmetric=True),
        "fp8 e4m3": Float8("e4m3"),
        "fp8 e5m2": Float8("e5m2"),
        "int4, 32": Int(4, group_size=32),
        "int4, 16": Int(4, group_size=16),
        "int4, 8": Int(4, group_size=8),
        "int4, 32, symmetric": Int(4, group_size=32, symmetric=True),
        "int4, 32, rotated": Rotated(Int(4, group_size=32)),
        "mxfp4": MXFP4(),
        "nvfp4": NVFP4(),
        "KIVI-4, last 128 exact": KIVI(4),
        "KIVI-4, last 32 exact": KIVI(4, residual=32),
        "int2, 16": Int(2, group_size=16),
        "int2, 8": Int(2, group_size=8),
        "int2, 32, symmetric": Int(2, group_size=32, symmetric=True),
        "int2, 32, rotated": Rotated(TOKEN),
        "int2: K token, V token": Split(TOKEN, TOKEN),
        # as many as wait, on average, for a group of 32 tokens in the three rows below
        "int2: K token, V token, last 16 exact": Split(TOKEN, TOKEN, 16),
        "int2: K channel, V token": Split(CHANNEL, TOKEN),
        "int2: K token, V channel": Split(TOKEN, CHANNEL),
        "int2: K channel, V channel": Split(CHANNEL, CHANNEL),
        "KIVI-2, last 128 exact": KIVI(2),
        "KIVI-2, last 32 exact": KIVI(2, residual=32),
    }.items()
}


@dataclass(frozen=True, slots=True)
class Chance(Policy):
    """The control of `HeavyHitter`: half of the budget is recent, the other half drawn at random, for each head."""

    budget: int
    seed: int = 0

    def score(self, positions: np.ndarray, mass: np.ndarray, length: int) -> np.ndarray:
        heads = np.arange(len(positions))[:, None]
        draws = np.random.default_rng(self.seed).random((length, len(heads)))  # of a position always the same
        return np.where(positions >= length - self.budget // 2, np.inf, draws[positions.clip(0), heads])


@dataclass(frozen=True, slots=True)
class Told(Policy):
    """The other control: it is told where the answer stands, and keeps the rows that carry it, and recent tokens.

    Those are not the answer's own: the model has moved each byte of it into rows that come later, the last one into
    the second line behind it. From 2 bytes before the line to 28 behind its start it answers as if nothing were gone.
    """

    budget: int
    start: int = 0
    stop: int = 0

    @classmethod
    def about(cls, question: Question, budget: int) -> "Told":
        key = question.prompt[question.prompt.rindex("\n") + 1 : -1]
        start = question.prompt.index(f"{key}={question.answer}")
        return cls(budget, start - 2, start + 28)

    def score(self, positions: np.ndarray, mass: np.ndarray, length: int) -> np.ndarray:
        return np.where((positions >= self.start) & (positions < self.stop), np.inf, positions)


EVICTIONS = {
    "all": lambda budget: None,
    "window": SlidingWindow,
    "window, 4 sinks": lambda budget: SlidingWindow(max(1, budget - 4), sinks=min(4, budget - 1)),
    "H2O": HeavyHitter,
    "SnapKV": lambda budget: SnapKV(budget, window=min(32, budget // 2)),
    "half by chance": Chance,
    "told the answer": Told,
}
