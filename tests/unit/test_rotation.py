"""Rotated: an orthogonal matrix, undone exactly, whatever stores what it has turned."""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlib.arrays import backend_of
from kvlib.float4 import MXFP4, NVFP4
from kvlib.integers import Int
from kvlib.minifloat import Float8
from kvlib.planes import Codec, Plane
from kvlib.rotation import Rotated


@dataclass(frozen=True, slots=True)
class Float32(Codec):
    """Keeps what it is given, so that all of the error is the rotation's own."""

    name: str = "float32"

    def planes(self, width):
        return {"payload": Plane(width, "float32")}

    def encode(self, rows):
        return {"payload": backend_of(rows).astype(rows, "float32")}

    def decode(self, planes, dtype):
        return backend_of(planes["payload"]).astype(planes["payload"], dtype)

    def max_error(self, rows):
        return np.abs(rows) * 2.0**-24


INNER = [Float32(), Float8(), MXFP4(), NVFP4(), Int(8), Int(4, group_size=32), Int(2, "channel", 10)]
BACKENDS = {"numpy": np.array, "torch": torch.tensor}

every_inner = pytest.mark.parametrize("inner", INNER, ids=repr)


@pytest.fixture(params=list(BACKENDS))
def array(request):
    """A function that copies NumPy arrays to arrays of one backend."""
    return BACKENDS[request.param]


def host(x) -> np.ndarray:
    return np.asarray(x)


def gaussian(shape=(3, 20, 128), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def matrix(width: int, seed: int = 0) -> np.ndarray:
    """What `turn` multiplies a row with, column by column."""
    return Rotated(Float32(), seed).turn(np.eye(width))


def sylvester(order: int) -> np.ndarray:
    """The definition: H(2n) = [[H, H], [H, -H]]."""
    return np.array([[1.0]]) if order == 1 else np.kron([[1, 1], [1, -1]], sylvester(order // 2))


# -- the matrix --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, block", [(2, 2), (64, 64), (128, 128), (96, 32), (80, 16), (576, 64), (6, 2)])
def test_signs_then_a_walsh_hadamard_transform_of_each_block(array, width, block):
    turned = host(Rotated(Float32(), 3).turn(array(np.eye(width))))
    # the first column of each block is all ones, but for the signs
    signs = np.concatenate([np.sign(turned[b : b + block, b]) for b in range(0, width, block)])
    expected = signs[:, None] * np.kron(np.eye(width // block), sylvester(block)) / math.sqrt(block)
    assert np.allclose(turned, expected, rtol=0, atol=1e-15)
    assert np.allclose(turned @ turned.T, np.eye(width), rtol=0, atol=1e-14)


def test_it_is_undone(array):
    rows = gaussian((5, 576))
    codec = Rotated(Float32())
    assert np.allclose(host(codec.turn_back(codec.turn(array(rows)))), rows, rtol=0, atol=1e-14)
    assert np.abs(host(codec.turn(array(rows))) - rows).max() > 1


def test_signs_are_the_same_for_ever():
    """Rows that were stored yesterday, by another process, are still read."""
    signs = np.sign(matrix(16)[:, 0]).astype(int)
    assert signs.tolist() == [1, -1, 1, 1, 1, 1, -1, -1, -1, 1, -1, -1, 1, 1, 1, 1]
    assert not np.array_equal(np.sign(matrix(16, seed=1)[:, 0]), signs)
    wide = np.concatenate([np.sign(matrix(512, seed)[:, 0]) for seed in range(4)])
    assert abs(wide.mean()) < 0.05


def test_both_backends_turn_to_the_same_bits():
    rows = gaussian((50, 96)).astype(np.float32)
    codec = Rotated(Float32())
    assert np.array_equal(codec.turn(rows), host(codec.turn(torch.tensor(rows))))
    assert codec.turn(rows).dtype == np.float32


# -- a codec like any other --------------------------------------------------------------------------------------------


@every_inner
def test_planes_are_those_of_the_inner_codec(array, inner):
    codec = Rotated(inner)
    assert codec.planes(128) == inner.planes(128)
    assert codec.group == inner.group
    assert codec.name == f"rotated-{inner.name}"
    rows = array(gaussian().astype(np.float32))
    before = host(rows).copy()
    planes, alone = codec.encode(rows), inner.encode(codec.turn(rows))
    assert np.array_equal(host(rows), before)
    assert all(np.array_equal(host(planes[name]), host(alone[name])) for name in alone)


@every_inner
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_both_backends_store_the_same_bits(inner, dtype):
    rows = gaussian()
    a = Rotated(inner).encode(torch.tensor(rows).to(getattr(torch, dtype)))
    b = Rotated(inner).encode(rows.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))
    assert all(np.array_equal(host(a[name]), b[name]) for name in b)
    for out in ("float64", "float32", "float16", "bfloat16"):
        decoded = Rotated(inner).decode(a, out), Rotated(inner).decode(b, out)
        assert [backend_of(x).dtype_name(x) for x in decoded] == [out, out]


@every_inner
@pytest.mark.parametrize("dtype, unit", [("float64", 2.0**-52), ("float32", 2.0**-23), ("float16", 2.0**-10)])
@pytest.mark.parametrize("strip", [0, 8])
def test_scores_and_mixes_are_those_of_the_decoded_rows(array, inner, dtype, unit, strip):
    """Up to rounding, which is relative to what is added up: norms, since turning mixes the columns."""
    codec = Rotated(inner, seed=7)
    planes = codec.encode(array(gaussian((2, 30, 96))))
    decoded = host(codec.decode(planes, "float64"))
    q, weights = gaussian((2, 4, 96), 1).astype(dtype), np.abs(gaussian((2, 4, 30), 2)).astype(dtype)
    scores, mixed = codec.scores(array(q), planes, strip), codec.mix(array(weights), planes, strip)
    q, weights = q.astype(np.float64), weights.astype(np.float64)
    norms = np.linalg.norm(decoded, axis=-1)
    assert backend_of(scores).dtype_name(scores) == backend_of(mixed).dtype_name(mixed) == dtype
    room = 100 * unit * np.linalg.norm(q, axis=-1)[..., None] * norms[:, None]
    assert np.all(np.abs(host(scores) - q @ decoded.mT) <= room)
    assert np.all(np.abs(host(mixed) - weights @ decoded) <= 100 * unit * (weights * norms[:, None]).sum(-1)[..., None])


# -- what it is for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [Int(4, group_size=32), MXFP4()], ids=repr)
def test_an_outlier_channel_no_longer_costs_the_others_their_bits(inner):
    rows = gaussian((500, 128))
    rows[:, 5] *= 20

    def error(codec) -> float:
        out = codec.decode(codec.encode(rows), "float64") - rows
        return math.sqrt(np.square(out).mean())

    assert error(Rotated(inner)) < 0.8 * error(inner)


# -- bounds ------------------------------------------------------------------------------------------------------------


@every_inner
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(-4, 0), spread=st.floats(0, 4), outlier=st.floats(0, 2))
def test_errors_stay_within_the_bound(inner, seed, size, spread, outlier):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2, 10, 96)) * 2.0 ** rng.uniform(-spread, spread, (2, 10, 96)) * 10**size
    rows[..., rng.integers(96)] *= 10**outlier
    codec = Rotated(inner, seed % 5)
    bound = codec.max_error(rows)
    assert bound.shape == rows.shape
    for dtype in ("float64", "float32"):
        assert np.all(np.abs(codec.decode(codec.encode(rows), dtype) - rows) <= bound)


@pytest.mark.parametrize("size", [0, 1e-30, 1e30])
@pytest.mark.parametrize("inner", [Float8(), MXFP4(), Float32()], ids=repr)
def test_tiny_and_huge_rows(inner, size):
    codec = Rotated(inner)
    for rows in (gaussian() * size, np.ones((2, 64)) * size, np.eye(64) * size):
        assert np.all(np.abs(codec.decode(codec.encode(rows), "float64") - rows) <= codec.max_error(rows))


def test_the_bound_is_nearly_reached():
    """A row that, turned, lies just below the middle between two numbers in every column: all errors add up."""
    codec = Rotated(Float8())
    turned = np.full((1, 128), 271.9)  # between 256 and 288
    turned[0, 0] = 448  # so the scale is 1
    rows = codec.turn_back(turned)
    ratio = np.abs(codec.decode(codec.encode(rows), "float64") - rows) / codec.max_error(rows)
    assert 0.8 < ratio.max() <= 1


def test_the_rounding_part_of_the_bound_is_small():
    """Some thirty roundings, each relative to the norm of the row."""
    rows = gaussian()
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    assert np.all(Rotated(Float32()).max_error(rows) < 2.0**-24 * 34 * norms)


def test_the_bound_of_a_row_follows_from_the_row_alone():
    rows = np.random.default_rng(3).standard_normal((8, 6, 64))
    codec = Rotated(Float32())
    bound = codec.max_error(rows)
    for head, token in np.ndindex(8, 6):
        alone = codec.max_error(rows[head : head + 1, token : token + 1])
        np.testing.assert_allclose(bound[head, token], alone[0, 0], rtol=1e-9)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_widths_that_do_not_fit():
    for call in (Rotated(Int(8)).check, Rotated(Int(8)).planes, lambda n: Rotated(Int(8)).encode(np.ones((1, n)))):
        with pytest.raises(ValueError, match="width of a row must be even, got 65"):
            call(65)
    with pytest.raises(ValueError, match="mxfp4 has a scale for every 32 columns"):
        Rotated(MXFP4()).check(48)
    Rotated(MXFP4()).check(96)


@pytest.mark.parametrize("inner", ["int4", Int, None])
def test_what_is_not_a_codec(inner):
    with pytest.raises(TypeError, match=r"Rotated.inner must be a kvlib codec object for one side, got"):
        Rotated(inner)
