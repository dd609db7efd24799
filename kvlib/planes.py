"""What every codec is: planes of stored numbers, and the way from rows to planes and back."""

from typing import NamedTuple

from kvlib.arrays import Array, backend_of
from kvlib.attention import mix, score

Planes = dict[str, Array]


class Plane(NamedTuple):
    """One array behind a codec: ``columns`` numbers of ``dtype`` for every ``tokens`` tokens of one head."""

    columns: int
    dtype: str
    tokens: int = 1


class Codec:
    """How the keys, or the values, of one head are stored: rows (..., T, D) to planes and back.

    A codec gives `planes`, `encode`, `decode` and `max_error`. It may give `scores` and `mix` too, where attention can
    do with less than the decoded rows: a scale per token, for one, multiplies a score instead of a whole row.

    Attributes: ``group``, the tokens that are encoded together (1: each for itself). ``name``, for tables.
    """

    __slots__ = ()
    group: int = 1
    name: str

    def check(self, width: int) -> None:
        """Raise ValueError, saying what would fit, if rows of ``width`` numbers cannot be stored."""

    def planes(self, width: int) -> dict[str, Plane]:
        """The planes that rows of ``width`` numbers need, by name."""
        raise NotImplementedError

    def encode(self, rows: Array) -> Planes:
        """Rows (..., T, D) of any float dtype, T a multiple of ``group`` -> (..., T / tokens, columns) per plane."""
        raise NotImplementedError

    def decode(self, planes: Planes, dtype: str) -> Array:
        """The rows (..., T, D) in ``dtype``. May be a view of a plane when nothing has to change."""
        raise NotImplementedError

    def scores(self, q: Array, planes: Planes, strip: int = 0) -> Array:
        """q (..., R, D) against the rows as keys -> (..., R, T), in q's dtype; ``strip`` as in `attention.score`."""
        return score(q, self.decode(planes, backend_of(q).dtype_name(q)), strip)

    def mix(self, weights: Array, planes: Planes, strip: int = 0) -> Array:
        """The rows as values, weighted by (..., R, T) -> (..., R, D), in the dtype of the weights."""
        return mix(weights, self.decode(planes, backend_of(weights).dtype_name(weights)), strip)

    def max_error(self, rows: Array) -> Array:
        """For rows (..., T, D) in float64 NumPy: how far each number may be off after `encode` and `decode`."""
        raise NotImplementedError
