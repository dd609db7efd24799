"""Codecs by name: how a token's key and its value are stored.

`Plain` stores numbers as they are. The lossy codecs live in `kvlib.integers`, `kvlib.minifloat`, `kvlib.float4` and
`kvlib.rotation`; `Split` gives keys and values codecs of their own, and keeps the newest tokens exact.
"""

from dataclasses import dataclass

from kvlib.arrays import Array, backend_of
from kvlib.float4 import MXFP4, NVFP4
from kvlib.integers import Int
from kvlib.minifloat import Float8
from kvlib.planes import Codec, Plane, Planes
from kvlib.rotation import Rotated
from kvlib.spec import FLOAT_BYTES, is_whole

__all__ = [
    "KIVI",
    "MXFP4",
    "NAMES",
    "NVFP4",
    "Codec",
    "Float8",
    "Int",
    "Plain",
    "Plane",
    "Rotated",
    "Split",
    "get_codec",
]

# bits of the mantissa, the hidden one included, and the exponent of the least number
PRECISION = {"float64": (53, -1074), "float32": (24, -149), "float16": (11, -24), "bfloat16": (8, -133)}
NEEDED = ("planes", "encode", "decode", "scores", "mix")


@dataclass(frozen=True, slots=True)
class Plain(Codec):
    """Store the numbers as they are, rounded to ``dtype``: exact when that is the dtype that comes in."""

    dtype: str
    name: str = "plain"

    def planes(self, width: int) -> dict[str, Plane]:
        return {"payload": Plane(width, self.dtype)}

    def encode(self, rows: Array) -> Planes:
        return {"payload": backend_of(rows).astype(rows, self.dtype)}

    def decode(self, planes: Planes, dtype: str) -> Array:
        payload = planes["payload"]
        return backend_of(payload).astype(payload, dtype)

    def max_error(self, rows: Array) -> Array:
        """Half a unit in the last place of ``dtype``, or half its least number."""
        mantissa, least = PRECISION[self.dtype]
        return abs(rows) * 2.0**-mantissa + 2.0 ** (least - 1)


def _check_codec(codec: object) -> None:
    if isinstance(codec, type):
        raise TypeError(f"a codec must be an object, got the class {codec.__name__}: write {codec.__name__}(...)")
    missing = [name for name in NEEDED if not callable(getattr(codec, name, None))]
    if missing:
        raise TypeError(f"a codec needs {', '.join(missing)}, and {codec!r} lacks them: derive it from Codec")


@dataclass(frozen=True, slots=True)
class Split:
    """A codec for keys and one for values; and how many of a sequence's newest tokens stay exact.

    Tokens are encoded in groups of `group`, oldest first, as soon as ``residual`` newer ones stand behind the group.
    Until then they lie in the cache's open tail in the spec's dtype. So what is stored depends on the tokens alone,
    not on the pieces in which they were appended.
    """

    k: Codec
    v: Codec
    residual: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        for side in (self.k, self.v):
            _check_codec(side)
        if not is_whole(self.residual) or self.residual < 0:
            raise ValueError(f"residual must be a number of tokens, 0 or more, got {self.residual!r}")
        object.__setattr__(self, "residual", int(self.residual))
        if self.k.group % self.v.group and self.v.group % self.k.group:
            raise ValueError(f"token groups of K ({self.k.group}) and V ({self.v.group}): one must divide the other")
        if not self.name:
            name = self.k.name if self.k == self.v else f"K {self.k.name}, V {self.v.name}"
            object.__setattr__(self, "name", name + (f", last {self.residual} exact" if self.residual else ""))

    @property
    def group(self) -> int:
        """Tokens that are encoded together."""
        return max(self.k.group, self.v.group)

    @property
    def tail(self) -> int:
        """The most tokens of a sequence that can be waiting, exact, for their group to close."""
        return self.residual + self.group - 1


def KIVI(bits: int = 2, group: int = 32, residual: int = 128) -> Split:
    """Keys per channel in groups of ``group`` tokens, values per token in groups of ``group`` channels, an exact tail.

    Source: KIVI, Liu et al. 2024 (arXiv:2402.02750). There K and V leave the tail in different rhythms (K all at once
    when ``residual`` tokens are full, V one token at a time); here both leave it by groups, as soon as at least
    ``residual`` tokens stand behind them.
    """
    keys, values = Int(bits, "channel", group), Int(bits, "token", group)
    return Split(keys, values, residual, f"kivi-{bits}bit/{group}, last {residual} exact")


NAMES: dict[str, Codec | Split] = {
    "int8": Int(8),
    "int4": Int(4, group_size=32),
    "int2": Int(2, group_size=32),
    "fp8": Float8("e4m3"),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
    "kivi-4bit": KIVI(4),
    "kivi-2bit": KIVI(2),
}


def get_codec(codec: str | Codec | Split, dtype: str) -> Split:
    """The codecs of K and V, for a cache whose spec says ``dtype``: by name, one for both, or a `Split`.

    Raises:
        ValueError: no codec has that name; TypeError: an object that is not a codec.
    """
    if isinstance(codec, Split):
        return codec
    if isinstance(codec, str):
        names = {"plain": Plain(dtype), **{name: Plain(name) for name in FLOAT_BYTES}, **NAMES}
        if codec not in names:
            raise ValueError(f"codec must be a codec object or one of {', '.join(names)}; got {codec!r}")
        named = names[codec]
        return named if isinstance(named, Split) else Split(named, named, name=codec)
    return Split(codec, codec)
