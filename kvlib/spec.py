"""CacheSpec: what one token costs a cache, in shapes and bytes."""

from dataclasses import dataclass
from numbers import Integral

FLOAT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def is_whole(value: object) -> bool:
    """Whether ``value`` is an integer, one of NumPy's too; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The shape of what a model asks its cache to remember.

    Args:
        num_kv_heads: heads of K and V per layer (Hkv). Query heads may be any multiple of it.
        head_dim: width of one key (D).
        num_layers: layers that share one block table.
        dtype: the number format of the uncompressed cache, one of float64, float32, float16, bfloat16.
        v_head_dim: width of one value (Dv); None means the same as ``head_dim``.
        latent: for multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): V is not stored, it is the
            first ``latent`` columns of K. None means that K and V are two arrays.

    Raises:
        ValueError: a size is not a positive integer, the dtype is unknown, or ``latent`` and ``v_head_dim`` disagree.
    """

    num_kv_heads: int
    head_dim: int
    num_layers: int = 1
    dtype: str = "float16"
    v_head_dim: int | None = None
    latent: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_kv_heads", "head_dim", "num_layers", "v_head_dim", "latent"):
            value = getattr(self, name)
            if value is None and name in ("v_head_dim", "latent"):
                continue
            if not is_whole(value) or value < 1:
                raise ValueError(f"CacheSpec.{name} must be a positive integer, got {value!r}")
            object.__setattr__(self, name, int(value))  # NumPy's small integers overflow in the products to come
        if self.dtype not in FLOAT_BYTES:
            raise ValueError(f"CacheSpec.dtype must be one of {', '.join(FLOAT_BYTES)}, got {self.dtype!r}")
        if self.latent is not None and not (self.latent <= self.head_dim and self.v_head_dim in (None, self.latent)):
            raise ValueError(
                f"CacheSpec.latent={self.latent} makes V the first {self.latent} columns of K: it must not exceed "
                f"head_dim={self.head_dim}, and v_head_dim must be left out, got v_head_dim={self.v_head_dim}"
            )

    @property
    def value_dim(self) -> int:
        """Width of one value vector, stored or not (Dv)."""
        return self.latent or self.v_head_dim or self.head_dim

    @property
    def stored_value_dim(self) -> int:
        """Columns of V that take memory of their own: 0 when V is a view of K."""
        return 0 if self.latent else self.value_dim

    @property
    def elements_per_token(self) -> int:
        """Numbers stored for one token over all layers."""
        return self.num_layers * self.num_kv_heads * (self.head_dim + self.stored_value_dim)

    @property
    def bytes_per_token(self) -> int:
        """Bytes for one token over all layers, stored in ``dtype`` without compression."""
        return self.elements_per_token * FLOAT_BYTES[self.dtype]
