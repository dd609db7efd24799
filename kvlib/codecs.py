"""Codecs: how a token's key or value is stored.

A codec names the planes it needs (payload, and for the lossy ones scales and zero points), writes rows into them and
reads them back. `BlockStorage` owns the arrays; a codec owns their meaning.
"""

from dataclasses import dataclass
from typing import Protocol

from kvlib.arrays import Array, backend_of


class Codec(Protocol):
    """What `BlockStorage` asks of a codec. Rows are (..., D); every plane keeps one row per token."""

    name: str

    def planes(self, width: int) -> dict[str, tuple[int, str]]:
        """Plane name -> (columns per token, dtype) for rows of ``width`` numbers."""
        ...

    def encode(self, rows: Array) -> dict[str, Array]:
        """Rows (..., D) in any float dtype -> one array (..., columns) per plane."""
        ...

    def decode(self, planes: dict[str, Array], dtype: str) -> Array:
        """The planes' rows back as (..., D) in ``dtype``. May return a view when nothing has to change."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """Store the numbers as they are, rounded to ``dtype``: exact when that is the dtype that comes in."""

    dtype: str
    name: str = "plain"

    def planes(self, width: int) -> dict[str, tuple[int, str]]:
        return {"payload": (width, self.dtype)}

    def encode(self, rows: Array) -> dict[str, Array]:
        return {"payload": backend_of(rows).astype(rows, self.dtype)}

    def decode(self, planes: dict[str, Array], dtype: str) -> Array:
        payload = planes["payload"]
        return backend_of(payload).astype(payload, dtype)


def get_codec(codec: str | Codec, dtype: str) -> Codec:
    """A codec by name, for a cache whose spec says ``dtype``; an object is handed back as it is.

    Raises:
        ValueError: no codec has that name; TypeError: an object that is not a codec.
    """
    if codec == "plain":
        return Plain(dtype)
    if isinstance(codec, str):
        raise ValueError(f"codec must be one of 'plain' or a codec object, got {codec!r}")
    missing = [name for name in ("planes", "encode", "decode") if not callable(getattr(codec, name, None))]
    if missing:
        raise TypeError(f"a codec needs the methods planes, encode and decode; {codec!r} lacks {', '.join(missing)}")
    return codec
