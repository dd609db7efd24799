"""A lossy codec that is not part of kvlib: it joins the suite by stating its own error bound, as any
codec may.
"""

from dataclasses import dataclass

import numpy as np

from kvlib.arrays import Array, backend_of
from kvlib.planes import Codec, Plane
from tests.conformance.reference import UNIT_ROUNDOFF


@dataclass(frozen=True, slots=True)
class RowInt8(Codec):
    """One token of one head in signed bytes, with one float32 scale: the largest element becomes ±127."""

    name: str = "row-int8"

    def planes(self, width: int) -> dict[str, Plane]:
        return {"payload": Plane(width, "int8"), "scale": Plane(1, "float32")}

    def encode(self, rows: Array) -> dict[str, Array]:
        backend, xp = backend_of(rows), backend_of(rows).xp
        rows = backend.astype(rows, "float32")
        scale = xp.max(xp.abs(rows), axis=-1, keepdims=True) / 127
        steps = xp.round(rows / xp.where(scale == 0, xp.ones_like(scale), scale))
        return {"payload": backend.astype(steps, "int8"), "scale": scale}

    def decode(self, planes: dict[str, Array], dtype: str) -> Array:
        backend = backend_of(planes["scale"])
        return backend.astype(backend.astype(planes["payload"], "float32") * planes["scale"], dtype)

    def max_error(self, rows: np.ndarray) -> np.ndarray:
        """Half a step, and four float32 roundings (of the input, the scale, the quotient and the product)."""
        largest = np.abs(rows).max(axis=-1, keepdims=True)
        return np.broadcast_to(largest / 254 + 4 * UNIT_ROUNDOFF["float32"] * largest, rows.shape)
