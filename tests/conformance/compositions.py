"""The full grid: every answer to one question with every answer to the others.

where does a token live (BLOCKS) x how is it stored (CODECS) x which tokens stay (POLICIES) x who computes (BACKENDS).
Groups, tails and budgets are small, so that a text of some forty tokens closes groups and evicts again and again.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

import kvlib
from kvlib.codecs import KIVI, MXFP4, NVFP4, Codec, Float8, Int, Plain, Rotated, Split, get_codec
from kvlib.eviction import HeavyHitter, Policy, SlidingWindow, SnapKV
from tests.conformance.outside_codec import RowInt8


@dataclass(frozen=True)
class LastQuery(Policy):
    """A reader's policy: what the last query attends to least leaves (TOVA, Oren et al. 2024, arXiv:2401.06104)."""

    budget: int
    observe: int = 1

    def score(self, positions: np.ndarray, mass: np.ndarray, length: int) -> np.ndarray:
        return mass


@dataclass(frozen=True)
class EveryThird(Policy):
    """A reader's policy without attention: head h would rather keep the positions h, h + 3, h + 6, …, and new ones."""

    budget: int

    def score(self, positions: np.ndarray, mass: np.ndarray, length: int) -> np.ndarray:
        heads = np.arange(len(positions))[:, None]
        return np.where(positions % 3 == heads % 3, length, 0) + positions


BLOCKS = ("contiguous", "16", "least")  # least: the smallest block that the codec allows, one token or one group

CODECS: dict[str, str | Codec | Split] = {
    "float32": "plain",
    "float16": Plain("float16"),
    "bfloat16": "bfloat16",
    "float16, last 3 exact": Split(Plain("float16"), Plain("float16"), residual=3),
    "int8": "int8",
    "int4": Int(4),
    "int4/16": Int(4, group_size=16),
    "int2/8": Int(2, group_size=8),
    "int8 symmetric": Int(8, symmetric=True),
    "int4 symmetric/16": Int(4, group_size=16, symmetric=True),
    "int4 per channel/4": Int(4, "channel", 4),
    "int4 per channel/8 symmetric": Int(4, "channel", 8, symmetric=True),
    "int4, last 6 exact": Split(Int(4), Int(4), residual=6),
    "kivi-4bit": KIVI(4, group=4, residual=4),
    "kivi-2bit": KIVI(2, group=8, residual=5),
    "e4m3": "fp8",
    "e5m2": Float8("e5m2"),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
    "rotated int4": Rotated(Int(4)),
    "rotated int2 per channel/4": Split(Rotated(Int(2, "channel", 4)), Int(2, "token", 8), residual=2),
    "K int8, V int4": Split(Int(8), Int(4)),
    "K float16, V int4 per channel/4": Split(Plain("float16"), Int(4, "channel", 4)),
    "K int4 per channel/8, V per channel/4": Split(Int(4, "channel", 8), Int(4, "channel", 4), residual=3),
    "outside": RowInt8(),
}

POLICIES: dict[str, Policy | None] = {
    "all": None,
    "window": SlidingWindow(9),
    "window, sinks": SlidingWindow(7, sinks=3),
    "h2o": HeavyHitter(18, recent=7),
    "snapkv": SnapKV(16, window=4, kernel=3),
    "last query": LastQuery(17),
    "every third": EveryThird(15),
}

BACKENDS = ("numpy", "torch")


@dataclass(frozen=True)
class Composition:
    """One point of the grid."""

    block: str
    codec: str
    policy: str
    backend: str

    def __str__(self) -> str:
        return " - ".join((self.codec, self.block, self.policy, self.backend))

    @property
    def eviction(self) -> Policy | None:
        return POLICIES[self.policy]

    def cache(self, spec: kvlib.CacheSpec, max_tokens: int, **settings: Any) -> kvlib.KVCache:
        codec = CODECS[self.codec]
        size = {"contiguous": None, "16": 16, "least": get_codec(codec, spec.dtype).group}[self.block]
        composed = {"block_size": size, "codec": codec, "eviction": self.eviction, "backend": self.backend}
        return kvlib.KVCache(spec, max_tokens=max_tokens, **composed | settings)


GRID = [
    Composition(block, codec, policy, backend)
    for codec, block, policy, backend in itertools.product(CODECS, BLOCKS, POLICIES, BACKENDS)
]


def size() -> str:
    """How large the grid is, in words."""
    axes = {"block sizes": BLOCKS, "codecs": CODECS, "policies": POLICIES, "backends": BACKENDS}
    return " x ".join(f"{len(axis)} {name}" for name, axis in axes.items()) + f" = {len(GRID)} compositions"
