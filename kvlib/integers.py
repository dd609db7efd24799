"""Int: integers of 8, 4 or 2 bits with a scale for every group of numbers, packed into bytes.

Sources: per-token and per-channel groups after KIVI, Liu et al. 2024 (arXiv:2402.02750); affine and symmetric
quantization after Jacob et al. 2018 (arXiv:1712.05877).
"""

from dataclasses import dataclass

from kvlib.arrays import Array, Backend, backend_of
from kvlib.attention import mix, score
from kvlib.planes import Codec, Plane, Planes
from kvlib.spec import is_whole

# Scales and offsets are kept in float16. A scale is moved up before it is rounded, an offset down, by one unit of
# float16 (2^-10 of the number, 2^-24 next to zero): so rounding never shortens the range, and nothing is clipped.
UNIT, LEAST = 2.0**-10, 2.0**-24


@dataclass(frozen=True, slots=True)
class Int(Codec):
    """A number x is stored as the integer code round((x - offset) / scale), from 0 to 2^bits - 1.

    Args:
        bits: 8, 4 or 2. A byte holds 1, 2 or 4 codes: those of columns j, j + D/2, …, so that unpacking is slices.
        axis: "token": the numbers that share a scale lie in one row. "channel": in one column, of several tokens.
        group_size: how many numbers share a scale. Along a token None is the whole row; along a channel it is needed.
        symmetric: no offset is stored, zero stays exactly zero, and the range is ± the largest magnitude.

    Memory: ``bits + 32 / group_size`` bits for a number; ``16 / group_size`` instead of 32 if symmetric.
    Error: at most half a scale, that is (max - min) / (2^bits - 1) / 2 of the group, and what rounding scale and offset
    to float16 adds (see `max_error`).

    Raises:
        ValueError: a setting is none of these, or a group does not divide the row (`check`).
    """

    bits: int = 8
    axis: str = "token"
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not is_whole(self.bits) or self.bits not in (8, 4, 2):
            raise ValueError(f"Int.bits must be 8, 4 or 2, got {self.bits!r}")
        if self.axis not in ("token", "channel"):
            raise ValueError(f"Int.axis must be 'token' or 'channel', got {self.axis!r}")
        size = self.group_size
        if self.axis == "channel" and size is None:
            raise ValueError("Int with axis='channel' needs group_size, the tokens that share a scale; got None")
        if size is not None and (not is_whole(size) or size < 2):
            raise ValueError(f"Int.group_size must be an integer of at least 2, got {size!r}")
        for name, value in (("bits", self.bits), ("group_size", size)):
            object.__setattr__(self, name, value if value is None else int(value))  # 2**8 is 0 in NumPy's int8

    @property
    def name(self) -> str:
        size = "" if self.group_size is None else f"/{self.group_size}"
        return f"int{self.bits} per {self.axis}{size}{' symmetric' if self.symmetric else ''}"

    @property
    def group(self) -> int:
        return self.group_size if self.axis == "channel" else 1

    @property
    def _per_byte(self) -> int:
        return 8 // self.bits

    @property
    def _levels(self) -> int:
        """Steps between the smallest code and the largest. Symmetric codes are odd in number: one stands for zero."""
        return 2**self.bits - (2 if self.symmetric else 1)

    def check(self, width: int) -> None:
        if width % self._per_byte:
            raise ValueError(f"{self.name} packs {self._per_byte} codes into a byte, which must divide rows of {width}")
        if self.axis == "token" and width % (self.group_size or width):
            raise ValueError(f"group_size={self.group_size} must divide the row of {width} numbers")

    def planes(self, width: int) -> dict[str, Plane]:
        columns = width // (self.group_size or width) if self.axis == "token" else width
        metadata = Plane(columns, "float16", self.group)
        planes = {"payload": Plane(width // self._per_byte, "uint8"), "scale": metadata}
        return planes if self.symmetric else planes | {"offset": metadata}

    def encode(self, rows: Array) -> Planes:
        backend, xp = backend_of(rows), backend_of(rows).xp
        groups, axis = self._grouped(backend.astype(rows, "float32"))
        if self.symmetric:
            largest = xp.max(xp.abs(groups), axis=axis, keepdims=True)
            low, reach = -largest, 2 * largest
        else:
            low = xp.min(groups, axis=axis, keepdims=True)
            low = backend.astype(low - xp.abs(low) * UNIT - LEAST, "float16")
            reach = xp.max(groups, axis=axis, keepdims=True) - backend.astype(low, "float32")
        scale = backend.astype(reach / self._levels * (1 + UNIT) + LEAST, "float16")
        step = backend.astype(scale, "float32")
        start = -step * (self._levels // 2) if self.symmetric else backend.astype(low, "float32")
        codes = xp.clip(xp.round((groups - start) / step), 0, self._levels)  # NaN and inf leave a scale of NaN and inf
        planes = {"payload": self._pack(backend.astype(codes, "uint8").reshape(rows.shape)), "scale": scale}
        if not self.symmetric:
            planes["offset"] = low
        shape = (*rows.shape[:-2], rows.shape[-2] // self.group, -1)
        return {name: x if name == "payload" else x.reshape(shape) for name, x in planes.items()}

    def decode(self, planes: Planes, dtype: str) -> Array:
        backend = backend_of(planes["scale"])
        rows = self._scaled(backend, planes, "float64" if dtype == "float64" else "float32")
        groups, _ = self._grouped(rows)
        groups += self._expand(self._offset(planes, backend.dtype_name(rows)))
        return backend.xp.asarray(backend.astype(rows, dtype), copy=True)  # `rows` is scratch memory

    def scores(self, q: Array, planes: Planes, strip: int = 0) -> Array:
        """With one scale to a row, q k^T = (q codes^T) scale + sum(q) offset: the rows need no arithmetic at all.

        With groups, only the scale has to go into the rows. An offset is a row of one number to a group, and its
        product with q is as much smaller.
        """
        backend = backend_of(q)
        dtype = backend.dtype_name(q)
        offset = self._offset(planes, dtype)
        if self.axis == "channel":
            by_group = q @ offset.mT  # (..., R, groups): the same for every token of a group
            scores = score(q, self._scaled(backend, planes, dtype), strip)
            by_token = scores.reshape(*by_group.shape, self.group)
            by_token += by_group[..., None]
            return scores
        sums = backend.xp.sum(q.reshape(*q.shape[:-1], offset.shape[-1], -1), axis=-1)  # (..., R, groups)
        if offset.shape[-1] > 1:
            scores = score(q, self._scaled(backend, planes, dtype), strip)
        else:
            scores = score(q, self._codes(backend, planes["payload"], dtype), strip)
            scores *= backend.astype(planes["scale"], dtype).mT
        scores += sums @ offset.mT
        return scores

    def mix(self, weights: Array, planes: Planes, strip: int = 0) -> Array:
        """As `scores`: one scale to a row multiplies the weight, and the offsets are mixed as rows of their own."""
        backend = backend_of(weights)
        dtype = backend.dtype_name(weights)
        offset = self._offset(planes, dtype)
        if self.axis == "channel":
            by_group = backend.xp.sum(weights.reshape(*weights.shape[:-1], -1, self.group), axis=-1)
            return mix(weights, self._scaled(backend, planes, dtype), strip) + by_group @ offset
        if offset.shape[-1] == 1:
            scaled = weights * backend.astype(planes["scale"], dtype).mT
            return mix(scaled, self._codes(backend, planes["payload"], dtype), strip) + weights @ offset
        out = mix(weights, self._scaled(backend, planes, dtype), strip)
        by_group = out.reshape(*out.shape[:-1], offset.shape[-1], -1)
        by_group += (weights @ offset)[..., None]
        return out

    def max_error(self, rows: Array) -> Array:
        """Half a scale, where the scale is what `encode` rounds it up to; and float32's share (see the comments)."""
        xp = backend_of(rows).xp
        groups, axis = self._grouped(rows)
        largest = xp.max(xp.abs(groups), axis=axis, keepdims=True)
        if self.symmetric:
            reach = 2 * largest
        else:
            low = xp.min(groups, axis=axis, keepdims=True)
            # the offset lies at most two units of float16 under the smallest number
            reach = xp.max(groups, axis=axis, keepdims=True) - low + 2 * UNIT * xp.abs(low) + 2 * LEAST
        scale = (reach / self._levels + LEAST) * (1 + 2 * UNIT) + LEAST
        # codes up to 255 come out of three float32 roundings, rows back out of two, and the input out of one
        slack = scale * self._levels * 2.0**-22 + largest * 2.0**-22
        return xp.broadcast_to(scale / 2 + slack, groups.shape).reshape(rows.shape)

    # -- groups and packing -------------------------------------------------------------------------------------------

    def _grouped(self, rows: Array) -> tuple[Array, int]:
        """Rows (..., T, D) as a view in which the numbers of a group lie along one axis, and that axis."""
        if self.axis == "channel":
            return rows.reshape(*rows.shape[:-2], -1, self.group_size, rows.shape[-1]), -2
        return rows.reshape(*rows.shape[:-1], -1, self.group_size or rows.shape[-1]), -1

    def _expand(self, metadata: Array) -> Array:
        """A scale or offset, (..., T / tokens, columns), in the shape that multiplies `_grouped` rows."""
        return metadata[..., None, :] if self.axis == "channel" else metadata[..., None]

    def _offset(self, planes: Planes, dtype: str) -> Array:
        backend = backend_of(planes["scale"])
        if self.symmetric:
            return backend.astype(planes["scale"], dtype) * -(self._levels // 2)
        return backend.astype(planes["offset"], dtype)

    def _scaled(self, backend: Backend, planes: Planes, dtype: str) -> Array:
        """codes * scale, (..., T, D), in scratch memory."""
        rows = self._codes(backend, planes["payload"], dtype)
        groups, _ = self._grouped(rows)
        groups *= self._expand(backend.astype(planes["scale"], dtype))
        return rows

    def _pack(self, codes: Array) -> Array:
        if self.bits == 8:
            return codes
        columns = codes.shape[-1] // self._per_byte
        packed = codes[..., :columns]
        for part in range(1, self._per_byte):
            packed = packed | codes[..., part * columns : (part + 1) * columns] << part * self.bits
        return packed

    def _codes(self, backend: Backend, payload: Array, dtype: str) -> Array:
        """The codes as numbers of ``dtype``, (..., T, D), in scratch memory."""
        columns = payload.shape[-1]
        codes = backend.scratch("codes", (*payload.shape[:-1], columns * self._per_byte), dtype)
        if self.bits == 8:
            codes[...] = payload
        for part in range(0 if self.bits == 8 else self._per_byte):
            bits = payload >> part * self.bits if part else payload
            codes[..., part * columns : (part + 1) * columns] = bits & 2**self.bits - 1
        return codes
