"""What a query may see: by causality, by windows, and by how far groups had closed when it was the newest."""

from dataclasses import dataclass

import numpy as np

from kvlib.storage import BlockStorage
from kvlib.tables import Table


@dataclass(frozen=True, slots=True)
class Sight:
    """What the last ``tokens`` positions of a sequence of ``length`` see: themselves, what came before, by the rules.

    ``rules`` are (window, sinks) pairs, as in `Policy.rules`; a position is seen if each of them lets it. ``exact``
    (tokens,), if groups have closed behind some of the queries: the first position that each of them sees in the tail,
    as it was when that query was the newest; what comes before it is seen as it is encoded.
    """

    length: int
    tokens: int
    rules: tuple[tuple[int, int], ...] = ()
    exact: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        storage: BlockStorage,
        layer: int,
        table: Table,
        tokens: int,
        rules: tuple[tuple[int, int], ...],
        length: int | None = None,
    ) -> "Sight":
        """The sight of ``tokens`` positions of one layer, the last of ``length``; None: of all that there are."""
        seen, codec = int(table.seen[layer]), storage.codec
        length = seen if length is None else length
        if table.tail is None or table.tail.runs[layer] is None:
            return cls(length, tokens, rules)
        closed = (np.arange(length - tokens, length) + 1 - codec.residual) // codec.group * codec.group
        encoded = seen - int(table.waiting[layer])
        if closed[0] >= encoded:  # no group has closed since: the tail is what all of them see
            return cls(length, tokens, rules)
        return cls(length, tokens, rules, np.clip(closed, table.tail.runs[layer].first, encoded))

    @property
    def first(self) -> int:
        """The position of the first query."""
        return self.length - self.tokens

    def start(self) -> int:
        """The first position that any query sees, where no rule lets sinks through."""
        return max([0, *(self.first - window + 1 for window, sinks in self.rules if not sinks)])

    def all_of(self, lo: int, hi: int) -> bool:
        """Whether every query sees all positions lo … hi-1."""
        near = all(self.length - window <= lo or hi <= sinks for window, sinks in self.rules)
        return hi - 1 <= self.first and near and (self.exact is None or hi <= self.exact[0])

    def visible(self, positions: np.ndarray, exact: bool = False) -> np.ndarray:
        """positions (..., S) -> (..., T, S): whether query t sees what has this position; -1 is seen by none.

        ``exact`` says whether it is the exact row of that position, or the encoded one.
        """
        queries = np.arange(self.first, self.length)[:, None]
        keys = positions[..., None, :]
        seen = (keys >= 0) & (keys <= queries)
        for window, sinks in self.rules:
            seen &= (queries - keys < window) | (keys < sinks)
        if self.exact is not None:
            seen &= (keys >= self.exact[:, None]) == exact
        return seen
