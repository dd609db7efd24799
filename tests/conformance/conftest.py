"""One suite for every cache: each entry of the catalogue × each backend × each dtype."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import kvlib
from tests.conformance import bounds, reference
from tests.conformance.outside_codec import RowInt8

# What the catalogue names, and one codec that kvlib has never seen, on blocks whose size is no power of two.
ENTRIES: dict[str, dict[str, Any]] = {
    **kvlib.CATALOGUE,
    "outside-codec": {"block_size": 5, "codec": RowInt8()},
}

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here"
        ),
    ],
)


@dataclass(frozen=True)
class Setup:
    """One entry on one backend in one dtype, and how to get numbers into it and out of it."""

    entry: str
    place: str  # "numpy", "torch" (on the CPU) or "cuda"
    dtype: str

    @property
    def backend(self) -> str:
        return "numpy" if self.place == "numpy" else "torch"

    def spec(self, **settings: Any) -> kvlib.CacheSpec:
        settings = {"num_kv_heads": 2, "head_dim": 16, "num_layers": 1, "dtype": self.dtype} | settings
        return kvlib.CacheSpec(**settings)

    def cache(self, spec: kvlib.CacheSpec | None = None, **settings: Any) -> kvlib.KVCache:
        settings = {"max_tokens": 96, "backend": self.backend} | ENTRIES[self.entry] | settings
        if self.place == "cuda":
            settings["device"] = "cuda"
        return kvlib.KVCache(spec or self.spec(), **settings)

    def array(self, x: np.ndarray, dtype: str | None = None) -> Any:
        """``x`` as an array of this backend."""
        dtype = dtype or self.dtype
        if self.backend == "numpy":
            return x.astype(reference.NUMPY_DTYPE[dtype])
        device = "cuda" if self.place == "cuda" else "cpu"
        return torch.tensor(np.ascontiguousarray(x)).to(dtype=getattr(torch, dtype), device=device)

    def draw(self, rng: np.random.Generator, *shape: int, dtype: str | None = None) -> tuple[np.ndarray, Any]:
        """Normal numbers that ``dtype`` can hold: as float64, and as an array of this backend."""
        x = reference.rounded(rng.standard_normal(shape), dtype or self.dtype)
        return x, self.array(x, dtype)

    def host(self, x: Any) -> np.ndarray:
        """An array of this backend as float64 NumPy, without asking kvlib."""
        if isinstance(x, torch.Tensor):
            return x.detach().to(torch.float64).cpu().numpy()
        return x.astype(np.float64)

    def check(
        self, cache: kvlib.KVCache, out: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray, **settings: Any
    ) -> None:
        """Assert that ``out`` (Hq, T, Dv) is the attention of one sequence, as near as the bounds allow.

        ``settings``: in_dtype and out_dtype (both default to this dtype), and scale.
        """
        in_dtype = settings.get("in_dtype", self.dtype)
        out_dtype = settings.get("out_dtype", self.dtype)
        scale = settings.get("scale")
        expected = reference.attention(q, k, v, scale)
        errors = [bounds.stored_error(cache.codec, x, in_dtype) for x in (k, v)]
        bound = bounds.output_error(q, k, v, *errors, expected, out_dtype, scale)
        assert tuple(out.shape) == expected.shape
        assert str(out.dtype).removeprefix("torch.") == out_dtype
        error = np.abs(self.host(out) - expected)
        assert np.all(error <= bound), (
            f"{self}: S={k.shape[1]} T={q.shape[1]}: error {error.max():.3g}, "
            f"{np.max(error / bound):.3g} times the bound"
        )


@pytest.fixture(params=list(ENTRIES))
def entry(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["numpy", "torch", CUDA])
def place(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def setup(entry: str, place: str, dtype: str) -> Setup:
    """Every entry on every backend in every dtype."""
    return Setup(entry, place, dtype)


@pytest.fixture
def setup32(entry: str, place: str) -> Setup:
    """Every entry on every backend in float32, for what no dtype can change."""
    return Setup(entry, place, "float32")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240229)
