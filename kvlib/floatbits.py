"""Small floats on float32's own bits, whatever their fields: `to_bits` and `from_bits`.

On a CPU the float8 casts of ml_dtypes and of torch take ten times as long as the matrix product that waits for them;
shifts and masks do not.
"""

from typing import NamedTuple

import numpy as np

from kvlib.arrays import Array, backend_of

# Part of every error bound:
SLACK = 1 + 2.0**-18  # float32 rounds x, x / scale and the product: 3 · 2^-24 |x|, and no half step is below |x| / 16
TINY = 2.0**-149  # float32 has nothing smaller


class Fields(NamedTuple):
    """The fields of a small float behind its sign bit."""

    mantissa: int  # bits
    bias: int  # of the exponent
    largest: float

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    def max_error(self, magnitude: Array, scale: Array) -> Array:
        """How far a magnitude in range may be from the nearest number times ``scale``.

        Half a step of its mantissa, or half a step of the subnormal numbers, and never more than the way to 0.
        """
        relative = 2.0 ** -(self.mantissa + 1)
        nearest = np.maximum(magnitude * relative, scale * (self.smallest_normal * relative))
        return np.minimum(magnitude, nearest) * SLACK + TINY


E2M1 = Fields(mantissa=1, bias=1, largest=6.0)
E4M3 = Fields(mantissa=3, bias=7, largest=448.0)  # "fn", finite: the exponents that mean infinity elsewhere are numbers
E5M2 = Fields(mantissa=2, bias=15, largest=57344.0)


def to_bits(magnitude: Array, fields: Fields) -> Array:
    """Float32 from 0 to ``fields.largest`` -> int32 codes of the nearest numbers, ties to even, in the same memory."""
    backend, xp = backend_of(magnitude), backend_of(magnitude).xp
    dropped = 23 - fields.mantissa
    bits = magnitude.view(backend.dtype("int32"))
    power = (bits & 0x7F800000).view(backend.dtype("float32"))  # of two, the largest that is not above the magnitude
    # next to a number 2^23 steps away float32 can hold nothing finer than steps, so the sum rounds as we want it
    anchor = xp.clip(power, fields.smallest_normal, None)
    anchor *= 2.0**dropped
    magnitude += anchor
    magnitude -= anchor
    magnitude *= 2.0 ** (fields.bias - 127)  # exact, even where float32 is subnormal: there the smaller format is too
    bits >>= dropped
    return bits


def from_bits(codes: Array, fields: Fields, out: Array) -> Array:
    """uint8 codes with the sign on top -> their numbers, written to ``out`` (float32, same shape).

    The code's fields are shifted to where float32 has its own, which leaves only the two biases to make up for.
    """
    backend = backend_of(codes)
    shift = 23 - fields.mantissa
    bits = out.view(backend.dtype("int32"))
    bits[...] = codes.view(backend.dtype("int8"))  # carries the sign to the top
    bits <<= shift
    bits &= (0x7F << shift) - (1 << 31)
    out *= 2.0 ** (127 - fields.bias)
    return out
