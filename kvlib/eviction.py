"""Which tokens stay: policies that give every slot a score, and the choice that follows from it.

A policy knows nothing of blocks and codecs. When tokens are about to be appended, it scores what a layer holds, head by
head; the best stay, and everything else leaves the cache for good. Positions stay true: a token that is moved to
another slot keeps the position that it had in the text.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvlib.arrays import Array
from kvlib.spec import is_whole


class Policy:
    """How many tokens each KV head of each layer keeps, and which. A policy of your own needs `budget` and `score`.

    Before T tokens are appended, all but the best ``budget - 1`` leave: the first new query sees ``budget`` tokens, its
    own among them, and in a decode step that is all there is. A prompt that is appended whole is attended whole.

    Attributes:
        budget: tokens that stay.
        observe: queries whose attention `score` is told about. 0: none. n: the last n. None: all that there were.
        once: choose a single time, when the first token is appended alone, and keep all that comes later. The prompt's
            last token must then not be appended alone itself.
    """

    __slots__ = ()
    budget: int
    observe: int | None = 0
    once: bool = False

    def score(self, positions: np.ndarray, mass: np.ndarray, length: int) -> np.ndarray:
        """A score for every slot, (Hkv, S): the higher, the rather it stays; inf for certain.

        positions (Hkv, S): of the token in each slot. mass (Hkv, S): the attention weights that it got from the
        observed queries, added up over them and the query heads of the group; zeros if none are observed. length:
        tokens seen.
        With a codec that encodes tokens in groups, a slot is a group, and its position that of its first token.
        """
        raise NotImplementedError

    def rules(self) -> tuple[tuple[int, int], ...]:
        """(window, sinks) pairs: a query sees the last ``window`` positions and the first ``sinks``, and no other."""
        return ()

    def units(self, waiting: int, unit: int) -> int:
        """How many units of ``unit`` tokens stay in the blocks, when ``waiting`` more tokens lie in the tail."""
        return max(0, (self.budget - (not self.once) - waiting) // unit)

    def check(self, tail: int) -> None:
        """Raise ValueError if the budget cannot hold the ``tail`` tokens that a codec keeps exact."""
        if self.budget - 1 < tail:
            raise ValueError(f"the codec keeps up to {tail} tokens in its tail: {self} must have a budget above {tail}")


@dataclass(frozen=True, slots=True)
class SlidingWindow(Policy):
    """The last ``window`` tokens, and the first ``sinks``.

    A query sees its own position and the ``window`` - 1 before it, even where tokens that have yet to leave are still
    stored: so any chunking gives the same answer. Sources: windows, Mistral 7B, Jiang et al. 2023 (arXiv:2310.06825);
    sinks, StreamingLLM, Xiao et al. 2023 (arXiv:2309.17453). There positions are counted inside the cache, here they
    are those of the text.
    """

    window: int
    sinks: int = 0

    def __post_init__(self) -> None:
        _set_count(self, "window", 1)
        _set_count(self, "sinks", 0)

    @property
    def budget(self) -> int:
        return self.window + self.sinks

    def score(self, positions: np.ndarray, mass: np.ndarray, length: int) -> np.ndarray:
        return np.where(positions < self.sinks, np.inf, positions)

    def rules(self) -> tuple[tuple[int, int], ...]:
        return ((self.window, self.sinks),)

    def units(self, waiting: int, unit: int) -> int:
        return math.ceil(self.sinks / unit) + math.ceil(max(0, self.window - 1 - waiting) / unit)

    def check(self, tail: int) -> None:
        """A tail longer than the window does no harm: what the window hides is not seen."""


@dataclass(frozen=True, slots=True)
class HeavyHitter(Policy):
    """The last ``recent`` tokens, and of the others those that all queries together have attended to most.

    Source: H2O, Zhang et al. 2023 (arXiv:2306.14048), which halves the budget between the two: the default here.
    """

    budget: int
    recent: int | None = None
    observe: None = None

    def __post_init__(self) -> None:
        _set_count(self, "budget", 2)
        if self.recent is not None:
            _set_count(self, "recent", 1, most=self.budget)

    def score(self, positions: np.ndarray, mass: np.ndarray, length: int) -> np.ndarray:
        recent = self.budget // 2 if self.recent is None else self.recent
        return np.where(positions >= length - recent, np.inf, mass)


@dataclass(frozen=True, slots=True)
class SnapKV(Policy):
    """Of a prompt, its last ``window`` tokens, and those that their queries attend to most; of the answer, everything.

    Attention is smoothed by the maximum over ``kernel`` neighbours, so that a token keeps its context. Source: SnapKV,
    Li et al. 2024 (arXiv:2404.14469). The choice is made when the first token after the prompt is appended.
    """

    budget: int
    window: int = 32
    kernel: int = 7
    once: bool = True

    def __post_init__(self) -> None:
        _set_count(self, "budget", 2)
        _set_count(self, "window", 1, most=self.budget)
        _set_count(self, "kernel", 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"SnapKV.kernel must be odd, so that it has a middle; got {self.kernel}")

    @property
    def observe(self) -> int:
        return self.window

    def score(self, positions: np.ndarray, mass: np.ndarray, length: int) -> np.ndarray:
        reach = self.kernel // 2
        padded = np.pad(mass, ((0, 0), (reach, reach)))
        pooled = np.lib.stride_tricks.sliding_window_view(padded, self.kernel, axis=1).max(axis=-1)
        return np.where(positions >= length - self.window, np.inf, pooled)


class Recent(NamedTuple):
    """Queries to look back with: q (Hkv, group, n, D), scaled, the last n of ``length`` positions; what these see."""

    q: Array
    length: int
    rules: tuple[tuple[int, int], ...]
    sinks: Array | None


class Slots:
    """What eviction has to know of one sequence: every slot's position, and the attention that it got.

    A slot is one token, or one group of a codec that encodes tokens in groups. positions (L, Hkv, slots), -1 where
    nothing lives; mass (L, Hkv, slots) and of the tail (L, Hkv, tail), only if all queries are observed.
    """

    __slots__ = ("decided", "mass", "positions", "recent", "tail_mass")

    def __init__(self, policy: Policy, num_layers: int, num_kv_heads: int, slots: int, tail: int) -> None:
        lead = (num_layers, num_kv_heads)
        self.positions = np.full((*lead, slots), -1, np.int32)
        accumulate = policy.observe is None
        self.mass = np.zeros((*lead, slots if accumulate else 0), np.float32)
        self.tail_mass = np.zeros((*lead, tail if accumulate else 0), np.float32)
        self.decided = np.zeros(num_layers, bool)
        self.recent: list[Recent | None] = [None] * num_layers

    def by_token(self, layer: int, start: int, stop: int, unit: int) -> np.ndarray:
        """The position of each token in units start … stop-1 of ``unit`` tokens: (Hkv, tokens), -1 in holes."""
        units = self.positions[layer, :, start:stop, None]
        return np.where(units < 0, -1, units + np.arange(unit)).reshape(len(units), -1)

    def arrays(self) -> list[Array]:
        queries = [x for recent in self.recent if recent for x in (recent.q, recent.sinks) if x is not None]
        return [self.positions, self.mass, self.tail_mass, self.decided, *queries]

    def copy(self) -> "Slots":
        twin = object.__new__(Slots)
        for name in ("positions", "mass", "tail_mass", "decided"):
            setattr(twin, name, getattr(self, name).copy())
        twin.recent = list(self.recent)  # never written into, only replaced
        return twin


class Moves(NamedTuple):
    """Slot ``source[i]`` of head ``heads[i]`` goes to its slot ``target[i]``; then only the first ``kept`` are left."""

    kept: int
    heads: np.ndarray
    source: np.ndarray
    target: np.ndarray

    def apply(self, rows: np.ndarray, empty: float) -> None:
        """The same moves on rows (Hkv, slots) of what is known about the slots; what has left becomes ``empty``."""
        rows[self.heads, self.target] = rows[self.heads, self.source]
        rows[:, self.kept :] = empty


def choose(policy: Policy, positions: np.ndarray, mass: np.ndarray, length: int, keep: int) -> np.ndarray:
    """Which slots stay, (Hkv, S) of bool: in every head the ``keep`` best by the policy's score, ties to the newest."""
    scores = np.asarray(policy.score(positions.copy(), mass.copy(), length), np.float64)  # a reader's may write to them
    if scores.shape != positions.shape:
        raise ValueError(f"{policy}.score must return shape {positions.shape}, one number a slot; got {scores.shape}")
    live, keep = positions >= 0, min(keep, positions.shape[1])
    if np.isnan(scores[live]).any():
        raise ValueError(f"{policy}.score returned NaN, which is neither more nor less than another score")
    if not keep:
        return np.zeros_like(live)
    scores = np.where(live, scores, -np.inf)
    last = np.partition(scores, -keep, axis=1)[:, -keep, None]  # a decode step drops one slot: no need to sort them all
    stays = scores > last
    for row, ties, where in zip(stays, scores == last, positions, strict=True):
        tied = np.flatnonzero(ties)
        row[tied[np.argsort(-where[tied])[: keep - row.sum()]]] = True
    return stays & live


def pack(stays: np.ndarray) -> Moves:
    """The moves that bring all that stays, (Hkv, S), into the first slots: as few as possible, none within them."""
    kept = int(stays.sum(axis=1).max(initial=0))
    heads, source, target = [], [], []
    for head, row in enumerate(stays):
        late = np.flatnonzero(row[kept:]) + kept
        source.append(late)
        target.append(np.flatnonzero(~row[:kept])[: len(late)])
        heads.append(np.full(len(late), head))
    return Moves(kept, *(np.concatenate(x).astype(np.int64) for x in (heads, source, target)))


def _set_count(policy: Policy, name: str, least: int, most: int | None = None) -> None:
    """Make the policy's setting ``name`` an int. Raises ValueError unless it is a whole number in these limits."""
    value = getattr(policy, name)
    if not is_whole(value) or value < least or (most is not None and value > most):
        limit = f"of at least {least}" + ("" if most is None else f" and at most {most}")
        raise ValueError(f"{type(policy).__name__}.{name} must be an integer {limit}, got {value!r}")
    object.__setattr__(policy, name, int(value))
