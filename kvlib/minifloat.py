"""Codecs of very small floats: what they share, and `Float8`. Those of four bits are in `kvlib.float4`.

Division by a constant is written as the product with its inverse: torch on CUDA makes it that unasked, and the stored
bits are to be the same everywhere.
"""

from dataclasses import dataclass

import numpy as np

from kvlib.arrays import Array, backend_of
from kvlib.attention import mix, score
from kvlib.floatbits import E4M3, E5M2, Fields, from_bits, to_bits
from kvlib.planes import Codec, Plane, Planes

SMALLEST_SCALE = 2.0**-126  # the smallest normal float32


class MiniFloat(Codec):
    """What the codecs below share: attention over rows in scratch memory, and a row's scale kept out of them."""

    __slots__ = ()

    def decode(self, planes: Planes, dtype: str) -> Array:
        backend = backend_of(planes["payload"])
        rows, scale = self._read(planes, backend.empty(self._shape(planes), "float32"), _wide(dtype))
        if scale is not None:
            rows *= scale
        return backend.astype(rows, dtype)

    def scores(self, q: Array, planes: Planes, strip: int = 0) -> Array:
        backend, dtype = backend_of(q), backend_of(q).dtype_name(q)
        rows, scale = self._read(planes, self._scratch(planes), _wide(dtype))
        scores = score(backend.astype(q, _wide(dtype)), rows, strip)
        return backend.astype(scores if scale is None else scores * scale.mT, dtype)

    def mix(self, weights: Array, planes: Planes, strip: int = 0) -> Array:
        backend, dtype = backend_of(weights), backend_of(weights).dtype_name(weights)
        rows, scale = self._read(planes, self._scratch(planes), _wide(dtype))
        weights = backend.astype(weights, _wide(dtype))
        return backend.astype(mix(weights if scale is None else weights * scale.mT, rows, strip), dtype)

    def _read(self, planes: Planes, out: Array, dtype: str) -> tuple[Array, Array | None]:
        """The rows (..., T, D), by way of ``out`` (float32), and what to multiply them by, (..., T, 1), if anything."""
        raise NotImplementedError

    def _shape(self, planes: Planes) -> tuple[int, ...]:
        return tuple(planes["payload"].shape)

    def _scratch(self, planes: Planes) -> Array:
        return backend_of(planes["payload"]).scratch("minifloat", self._shape(planes), "float32")


@dataclass(frozen=True, slots=True)
class Float8(MiniFloat):
    """Eight-bit floats with one scale to a row (token and head): 8 + 16 / D bits per element, 8.125 at D = 128.

    The scale is the row's largest magnitude over the format's, rounded up to bfloat16, so that nothing saturates and
    rows of any size fit; its bits are kept as an int16, which needs no package beside NumPy. In attention it multiplies
    scores and weights instead of rows.

    Error: half a step, so abs(x) / 16 in e4m3 and abs(x) / 8 in e5m2; or, for the smallest numbers of a row, the half
    step that its scale leaves: max abs(row) / 448 / 2^10 or max abs(row) / 57344 / 2^17, times 1 + 2^-7 for the scale's
    rounding.

    Args:
        format: "e4m3" (4 bits of exponent, 3 of mantissa; largest 448) or "e5m2" (5 and 2; largest 57344).

    Source: Micikevicius et al. 2022, "FP8 formats for deep learning" (arXiv:2209.05433).
    """

    format: str = "e4m3"

    def __post_init__(self) -> None:
        if self.format not in ("e4m3", "e5m2"):
            raise ValueError(f"Float8.format must be 'e4m3' or 'e5m2', got {self.format!r}")

    @property
    def name(self) -> str:
        return "fp8" if self.format == "e4m3" else "fp8-e5m2"

    @property
    def fields(self) -> Fields:
        return E4M3 if self.format == "e4m3" else E5M2

    def planes(self, width: int) -> dict[str, Plane]:
        return {"payload": Plane(width, "uint8"), "scale": Plane(1, "int16")}

    def encode(self, rows: Array) -> Planes:
        backend, xp = backend_of(rows), backend_of(rows).xp
        rows = backend.astype(rows, "float32")
        magnitude = xp.abs(rows)
        largest = xp.max(magnitude, axis=-1, keepdims=True)
        enough = xp.clip(largest * (1 / self.fields.largest), SMALLEST_SCALE, None)
        # the upper half of a float32 is a bfloat16; a carry out of the lower half rounds it up
        stored = backend.astype(enough.view(backend.dtype("int32")) + 0xFFFF >> 16, "int16")
        magnitude /= _bfloat16(stored)
        codes = with_sign(to_bits(magnitude, self.fields), rows, 0x80)
        return {"payload": backend.astype(codes, "uint8"), "scale": stored}

    def max_error(self, rows: Array) -> Array:
        """For decoding to float32 or float64; a shorter dtype adds its own rounding."""
        magnitude = np.abs(rows)
        scale = np.maximum(magnitude.max(axis=-1, keepdims=True) / self.fields.largest, SMALLEST_SCALE)
        return self.fields.max_error(magnitude, scale * (1 + 2.0**-7))

    def _read(self, planes: Planes, out: Array, dtype: str) -> tuple[Array, Array | None]:
        backend = backend_of(out)
        rows = from_bits(planes["payload"], self.fields, out)
        return backend.astype(rows, dtype), backend.astype(_bfloat16(planes["scale"]), dtype)


def _wide(dtype: str) -> str:
    """The dtype to compute in for a result in ``dtype``."""
    return "float64" if dtype == "float64" else "float32"


def _bfloat16(stored: Array) -> Array:
    """The upper halves of positive float32 numbers, as int16 -> those numbers."""
    backend = backend_of(stored)
    return (backend.astype(stored, "int32") << 16).view(backend.dtype("float32"))


def with_sign(codes: Array, rows: Array, bit: int) -> Array:
    """int32 codes with ``bit`` set where the float32 rows are negative, -0 included; overwrites the codes."""
    sign = rows.view(backend_of(rows).dtype("int32")) >> 31
    sign &= bit
    codes |= sign
    return codes
