"""Rotation: spread what stands out in a row over all of its columns, before a codec of few bits sees it."""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvlib.arrays import Array, Backend, backend_of
from kvlib.planes import Codec, Plane, Planes

UNIT_ROUNDOFF = 2.0**-24  # of float32


@dataclass(frozen=True, slots=True)
class Rotated(Codec):
    """Rows turned by a randomised Hadamard transform, then stored by ``inner``: as many bits as that.

    Signs are flipped at random, then every block of columns, as wide as the largest power of two that divides the
    width, goes through a Walsh-Hadamard transform: the whole row at 128, nine blocks of 64 at 576. That is one
    orthogonal matrix, so a query that is turned likewise scores the stored keys as they are, and a weighted sum of
    stored values is turned back once for each query instead of once for each token.

    Error: each number is off by at most the sum of ``inner``'s bounds over its block divided by the square root of the
    block's width. Independent errors add up to far less: their root mean square is that of ``inner``.

    Args:
        inner: the codec of the turned rows.
        seed: picks the signs, the same in every process and on either backend.

    Source: QuaRot, Ashkboos et al. 2024 (arXiv:2404.00456); the random signs, QuIP#, Tseng et al. 2024
    (arXiv:2402.04396).
    """

    inner: Codec
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Codec):
            raise TypeError(f"Rotated.inner must be a kvlib codec object for one side, got {self.inner!r}")

    @property
    def name(self) -> str:
        return f"rotated-{self.inner.name}"

    @property
    def group(self) -> int:
        return self.inner.group

    def check(self, width: int) -> None:
        if width % 2:
            fits = "the width of a row must be even"
            raise ValueError(f"{self.name} turns blocks of columns as wide as a power of two: {fits}, got {width}")
        self.inner.check(width)

    def planes(self, width: int) -> dict[str, Plane]:
        self.check(width)
        return self.inner.planes(width)

    def encode(self, rows: Array) -> Planes:
        self.check(rows.shape[-1])
        return self.inner.encode(self.turn(backend_of(rows).astype(rows, "float32")))

    def decode(self, planes: Planes, dtype: str) -> Array:
        wide = "float64" if dtype == "float64" else "float32"
        rows = self.turn_back(self.inner.decode(planes, wide))
        return backend_of(rows).astype(rows, dtype)

    def scores(self, q: Array, planes: Planes, strip: int = 0) -> Array:
        return self._at_least_float32(q, lambda q: self.inner.scores(self.turn(q), planes, strip))

    def mix(self, weights: Array, planes: Planes, strip: int = 0) -> Array:
        return self._at_least_float32(weights, lambda weights: self.turn_back(self.inner.mix(weights, planes, strip)))

    def max_error(self, rows: Array) -> Array:
        turned = self.turn(rows.astype(np.float32)).astype(np.float64)  # exactly what `inner` is given
        inner = self.inner.max_error(turned)
        # Each halving rounds by u of what it gives, and keeps norms up to a factor; so do the cast and the factor. A
        # number cannot be off by more than the norm of all errors. (2^-140: where float32 rounds to fixed steps.)
        rounding = (math.log2(_block(rows.shape[-1])) + 4) * UNIT_ROUNDOFF
        return _spread(inner) + rounding * (_norm(rows) + _norm(np.abs(turned) + inner)) + 2.0**-140

    def turn(self, rows: Array) -> Array:
        """Rows (..., D) times the orthogonal matrix, in their own dtype."""
        return _hadamard(rows * self._signs(rows))

    def turn_back(self, rows: Array) -> Array:
        """The inverse of `turn`: a Hadamard matrix is its own, and so is a sign."""
        return _hadamard(rows) * self._signs(rows)

    def _signs(self, rows: Array) -> Array:
        backend = backend_of(rows)
        return _signs(self.seed, rows.shape[-1], backend, backend.dtype_name(rows))

    @staticmethod
    def _at_least_float32(x: Array, function: Callable[[Array], Array]) -> Array:
        backend, dtype = backend_of(x), backend_of(x).dtype_name(x)
        out = function(x if dtype == "float64" else backend.astype(x, "float32"))
        return backend.astype(out, dtype)


@functools.lru_cache(maxsize=64)
def _signs(seed: int, width: int, backend: Backend, dtype: str) -> Array:
    """``width`` times 1 or -1, from a hash, for no random generator promises the same numbers for ever."""
    digest = hashlib.shake_256(f"kvlib {seed}".encode()).digest(math.ceil(width / 8))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8))[:width]
    return backend.astype(backend.asarray(1.0 - 2.0 * bits), dtype)


def _block(width: int) -> int:
    """The largest power of two that divides ``width``."""
    return width & -width


def _hadamard(rows: Array) -> Array:
    """The normalised Walsh-Hadamard transform of each block of the last axis.

    Sums of neighbours, then their differences, once for each halving of the block: the same additions in the same order
    on either backend, so the same bits, which a matrix product does not promise.
    """
    xp, block = backend_of(rows).xp, _block(rows.shape[-1])
    x = rows.reshape(*rows.shape[:-1], -1, block)
    for _ in range(int(math.log2(block))):
        a, b = x[..., 0::2], x[..., 1::2]
        x = xp.concat([a + b, a - b], axis=-1)
    return x.reshape(rows.shape) * (1 / math.sqrt(block))


def _spread(errors: Array) -> Array:
    """What errors of up to ``errors`` in the turned columns of a block may add up to in each column of it."""
    return _over_block(np.sum, errors) / math.sqrt(_block(errors.shape[-1]))


def _norm(rows: Array) -> Array:
    """For each number, the norm of the block of its row that it lies in."""
    return _over_block(np.linalg.norm, rows)


def _over_block(function: Callable[..., Array], rows: Array) -> Array:
    blocks = rows.reshape(*rows.shape[:-1], -1, _block(rows.shape[-1]))
    return np.broadcast_to(function(blocks, axis=-1, keepdims=True), blocks.shape).reshape(rows.shape)
