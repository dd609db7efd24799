"""One suite for every cache: each entry of the catalogue × each backend × each dtype."""

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import kvlib
from kvlib.codecs import Int, Split, get_codec
from tests.conformance import bounds, compositions, reference
from tests.conformance.outside_codec import RowInt8

# What the catalogue names; one codec that kvlib has never seen, on blocks whose size is no power of two; and token
# groups that are small enough to close in a short test. Budgets of a thousand tokens never evict in one: what they do
# when they are small is for the grid (test_grid.py).
ENTRIES: dict[str, dict[str, Any]] = {
    **kvlib.CATALOGUE,
    "outside-codec": {"block_size": 5, "codec": RowInt8()},
    "token-groups": {"block_size": 12, "codec": Split(Int(8, "channel", 4), Int(4, "token", 8), residual=6)},
}
# The dtype of a codec's own planes is fixed, and eviction moves what is stored as it is: one dtype is enough there.
DTYPES = {
    name: ("bfloat16",) if {"codec", "eviction"} & settings.keys() else ("float32", "float16", "bfloat16")
    for name, settings in ENTRIES.items()
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
        settings = {"num_kv_heads": 2, "head_dim": 32, "num_layers": 1, "dtype": self.dtype} | settings
        return kvlib.CacheSpec(**settings)

    def cache(self, spec: kvlib.CacheSpec | None = None, **settings: Any) -> kvlib.KVCache:
        settings = {"max_tokens": 96, "backend": self.backend} | ENTRIES[self.entry] | settings
        if self.place == "cuda":
            settings["device"] = "cuda"
        return kvlib.KVCache(spec or self.spec(), **settings)

    @property
    def codec(self) -> Split:
        return get_codec(ENTRIES[self.entry].get("codec", "plain"), self.dtype)

    def width(self, least: int) -> int:
        """The narrowest row of at least ``least`` numbers that the codecs of K and V can store."""
        for width in itertools.count(least):
            with contextlib.suppress(ValueError):
                self.codec.k.check(width)
                self.codec.v.check(width)
                return width

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
        errors = bounds.stored_errors(cache, k, v, in_dtype)
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


@pytest.fixture(params=[(name, dtype) for name in ENTRIES for dtype in DTYPES[name]], ids="-".join)
def setup(request: pytest.FixtureRequest, place: str) -> Setup:
    """Every entry on every backend in every dtype that matters to it."""
    name, dtype = request.param
    return Setup(name, place, dtype)


@pytest.fixture
def setup32(entry: str, place: str) -> Setup:
    """Every entry on every backend in float32, for what no dtype can change."""
    return Setup(entry, place, "float32")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240229)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How large the grid is, and how much of it has run here and passed."""
    stories = "test_grid.py::test_every_composition["
    passed = [report for report in terminalreporter.stats.get("passed", []) if stories in report.nodeid]
    failed = [report for report in terminalreporter.stats.get("failed", []) if stories in report.nodeid]
    if passed or failed:
        here = f"{len(passed)} passed, {len(failed)} failed"
        terminalreporter.write_line(f"conformance grid: {compositions.size()}; {here}")
