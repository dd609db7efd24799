"""Four-bit floats with a scale for each block of a row: `MXFP4` and `NVFP4`."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvlib.arrays import Array, backend_of
from kvlib.floatbits import E2M1, E4M3, SLACK, from_bits, to_bits
from kvlib.minifloat import SMALLEST_SCALE, MiniFloat, with_sign
from kvlib.planes import Plane, Planes


class BlockFloat4(MiniFloat):
    """Four-bit floats e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6), two to a byte, with a scale byte for each block of a row.

    Column j and column j + D/2 share a byte, low half and high half. The kinds differ in their scales alone.
    """

    __slots__ = ()
    block: ClassVar[int]  # columns that share a scale; even

    def check(self, width: int) -> None:
        if width % self.block:
            fits = f"the width of a row must be a multiple of {self.block}"
            raise ValueError(f"{self.name} has a scale for every {self.block} columns: {fits}, got {width}")

    def planes(self, width: int) -> dict[str, Plane]:
        self.check(width)
        return {"payload": Plane(width // 2, "uint8"), "scale": Plane(width // self.block, "uint8")}

    def encode(self, rows: Array) -> Planes:
        self.check(rows.shape[-1])
        backend, xp = backend_of(rows), backend_of(rows).xp
        rows = backend.astype(rows, "float32")
        blocks = rows.reshape(*rows.shape[:-1], -1, self.block)
        magnitude = xp.abs(blocks)
        stored = self._store_scale(xp.max(magnitude, axis=-1))
        scale = self._load_scale(stored)[..., None]
        magnitude = xp.minimum(magnitude, scale * E2M1.largest)  # before the division, which might overflow
        magnitude /= scale
        codes = with_sign(to_bits(magnitude, E2M1), blocks, 8).reshape(rows.shape)
        half = rows.shape[-1] // 2
        return {"payload": backend.astype(codes[..., :half] | codes[..., half:] << 4, "uint8"), "scale": stored}

    def max_error(self, rows: Array) -> Array:
        """For decoding to float32 or float64; a shorter dtype adds its own rounding."""
        magnitude = np.abs(rows).reshape(*rows.shape[:-1], -1, self.block)
        least, most = self._scale_range(magnitude.max(axis=-1, keepdims=True))
        clipped = (magnitude - E2M1.largest * least) * SLACK
        return np.maximum(E2M1.max_error(magnitude, most), clipped).reshape(rows.shape)

    def _store_scale(self, largest: Array) -> Array:
        """Each block's largest magnitude, float32 -> its scale byte."""
        raise NotImplementedError

    def _load_scale(self, stored: Array) -> Array:
        """Scale bytes -> the numbers they stand for, float32; no stored one is 0."""
        raise NotImplementedError

    def _scale_range(self, largest: Array) -> tuple[Array, Array]:
        """Between what the scale of a block lies, given its largest magnitude in float64."""
        raise NotImplementedError

    def _shape(self, planes: Planes) -> tuple[int, ...]:
        *lead, columns = planes["payload"].shape
        return *lead, 2 * columns

    def _read(self, planes: Planes, out: Array, dtype: str) -> tuple[Array, Array | None]:
        backend, packed = backend_of(out), planes["payload"]
        int8, half = backend.dtype("int8"), packed.shape[-1]
        # Twice the number is an integer: the three bits m = 0 … 7 stand for 0 1 2 3 4 6 8 12. Both halves at once:
        upper = (packed >> 2 & 0x11) * 3  # binary 11 where m >= 4, and there
        twice = (packed & 0x77) + (packed & upper)  # … m + (m - 4) is it, but for m = 7:
        twice = twice + (twice & twice >> 2 & 0x22)  # 10 is the only sum with bits 3 and 1, and takes 2 more
        # As uint8, 1 - 2 is 255, and a product with that has the bits of a negative int8
        out[..., :half] = ((twice & 15) * (1 - (packed >> 2 & 2))).view(int8)
        out[..., half:] = ((twice >> 4) * (1 - (packed >> 6 & 2))).view(int8)
        blocks = out.reshape(*out.shape[:-1], -1, self.block)
        blocks *= self._load_scale(planes["scale"])[..., None] * 0.5
        return backend.astype(out, dtype), None


@dataclass(frozen=True, slots=True)
class MXFP4(BlockFloat4):
    """Four-bit floats, 32 columns to a power-of-two scale (e8m0, one byte): 4.25 bits per element.

    The conversion is the specification's: the scale is 2^(floor(log2 largest) - 2), so the largest magnitude comes to
    between 4 and 8, and what lies above 6 becomes 6. Doubling the scale of such blocks would clip nothing, but coarsen
    every step: Gaussian rows come back 11.50 % off as it is (root mean square), and 11.54 % if nothing is clipped.
    The smallest scale written is 2^-126, though e8m0 has 2^-127 too.

    Error: abs(x) / 4, for half a step is at most that and so is the way from below 8 to 6; or, for the smallest numbers
    of a block, a quarter of its scale, which is at most max abs(block) / 4.

    Source: OCP Microscaling Formats (MX) Specification v1.0, 2023; Rouhani et al. 2023 (arXiv:2310.10537).
    """

    block: ClassVar[int] = 32
    name: ClassVar[str] = "mxfp4"

    def _store_scale(self, largest: Array) -> Array:
        backend, xp = backend_of(largest), backend_of(largest).xp
        exponent = largest.view(backend.dtype("int32")) >> 23  # e8m0 has the bias of float32
        return backend.astype(xp.clip(exponent - 2, 1, None), "uint8")

    def _load_scale(self, stored: Array) -> Array:
        backend = backend_of(stored)
        return (backend.astype(stored, "int32") << 23).view(backend.dtype("float32"))

    def _scale_range(self, largest: Array) -> tuple[Array, Array]:
        return np.maximum(largest / 8, SMALLEST_SCALE), np.maximum(largest / 4, SMALLEST_SCALE)


@dataclass(frozen=True, slots=True)
class NVFP4(BlockFloat4):
    """Four-bit floats, 16 columns to a scale in e4m3, and one scale for the whole cache: 4.5 bits per element.

    A block's scale is max abs(block) / 6 in units of ``tensor_scale``, rounded to e4m3. With the default of 1 it keeps
    its precision while max abs(block) lies between 0.1 and 2688; beyond that numbers are clipped, below it steps are
    coarse (the smallest scale is 2^-9). For other data set ``tensor_scale`` to max abs(data) / 2688, as NVIDIA does.

    Error: abs(x) / 4 or a quarter of the block's scale, which is (1 ± 1/16) max abs(block) / 6, or off by
    tensor_scale / 2^10 where e4m3 is subnormal; and where that comes out so small that 6 does not reach x,
    abs(x) - 6 scale.

    Raises:
        ValueError: ``tensor_scale`` is not between 1e-30 and 1e30.

    Source: NVIDIA 2025, "Pretraining large language models with NVFP4" (arXiv:2509.25149).
    """

    tensor_scale: float = 1.0

    block: ClassVar[int] = 16
    name: ClassVar[str] = "nvfp4"

    def __post_init__(self) -> None:
        if not 1e-30 <= self.tensor_scale <= 1e30:
            raise ValueError(f"NVFP4.tensor_scale must lie between 1e-30 and 1e30, got {self.tensor_scale!r}")

    def _store_scale(self, largest: Array) -> Array:
        backend, xp = backend_of(largest), backend_of(largest).xp
        unit = E2M1.largest * self.tensor_scale
        scale = xp.clip(xp.clip(largest, None, E4M3.largest * unit) * (1 / unit), None, E4M3.largest)
        return backend.astype(xp.clip(to_bits(scale, E4M3), 1, None), "uint8")

    def _load_scale(self, stored: Array) -> Array:
        backend = backend_of(stored)
        return from_bits(stored, E4M3, backend.empty(tuple(stored.shape), "float32")) * self.tensor_scale

    def _scale_range(self, largest: Array) -> tuple[Array, Array]:
        scale = largest / (E2M1.largest * self.tensor_scale)
        off = np.maximum(scale / 16, 2.0**-10)
        return tuple(np.clip(bound, 2.0**-9, E4M3.largest) * self.tensor_scale for bound in (scale - off, scale + off))
