"""Float8, MXFP4 and NVFP4 against the casts of ml_dtypes and torch, bit for bit, and against their own bounds."""

import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kvlib.arrays import backend_of
from kvlib.float4 import MXFP4, NVFP4
from kvlib.floatbits import E2M1, E4M3, E5M2, from_bits, to_bits
from kvlib.minifloat import Float8

CODECS = [Float8(), Float8("e5m2"), MXFP4(), NVFP4(), NVFP4(tensor_scale=0.01)]
FORMATS = {
    "e4m3": (E4M3, ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
    "e5m2": (E5M2, ml_dtypes.float8_e5m2, torch.float8_e5m2),
    "e2m1": (E2M1, ml_dtypes.float4_e2m1fn, None),
}
BACKENDS = {"numpy": np.array, "torch": torch.tensor}

every_codec = pytest.mark.parametrize("codec", CODECS, ids=repr)
every_format = pytest.mark.parametrize("name", list(FORMATS))


@pytest.fixture(params=list(BACKENDS))
def array(request):
    """A function that copies NumPy arrays to arrays of one backend."""
    return BACKENDS[request.param]


def host(x) -> np.ndarray:
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)


def round_trip(codec, rows) -> np.ndarray:
    return host(codec.decode(codec.encode(rows), "float64"))


def gaussian(shape=(3, 5, 128), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# -- bits ------------------------------------------------------------------------------------------------------------


@every_format
def test_rounding_is_that_of_the_reference_casts(array, name):
    """Every float32 whose lower half is 0, next to 0, next to a half, or next to 1: all ties and their neighbours."""
    fields, reference, torch_dtype = FORMATS[name]
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = (np.arange(0x8000, dtype=np.uint32)[:, None] << 16 | lower).ravel()
    numbers = bits.view(np.float32)
    numbers = numbers[numbers <= fields.largest]
    assert len(numbers) > 90_000
    codes = host(to_bits(array(numbers), fields))
    assert np.array_equal(codes, numbers.astype(reference).view(np.uint8))
    assert len(np.unique(codes)) == np.unique(codes).max() + 1 == fields_codes(fields)
    if torch_dtype is not None:
        assert np.array_equal(codes, torch.tensor(numbers).to(torch_dtype).view(torch.uint8).numpy())


def fields_codes(fields) -> int:
    """How many non-negative numbers the format has, infinities left out."""
    return int(to_bits(np.array([fields.largest], np.float32), fields)[0]) + 1


def test_the_number_of_codes():
    assert [fields_codes(fields) for fields in (E2M1, E4M3, E5M2)] == [8, 127, 124]


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_every_code_is_read_as_the_reference_reads_it(array, name):
    fields, reference, torch_dtype = FORMATS[name]
    codes = np.arange(256, dtype=np.uint8)
    finite = np.isfinite(codes.view(reference).astype(np.float32))
    codes = codes[finite]
    given_codes = array(codes)
    out = host(from_bits(given_codes, fields, backend_of(given_codes).empty(codes.shape, "float32")))
    expected = codes.view(reference).astype(np.float32)
    assert np.array_equal(out, expected)
    assert np.array_equal(np.signbit(out), np.signbit(expected))
    assert np.array_equal(out, torch.tensor(codes).view(torch_dtype).float().numpy())


def test_every_byte_of_four_bit_floats(array):
    """Column j in the low half, column j + D/2 in the high half, behind the scale of each block."""
    payload = np.arange(256, dtype=np.uint8).reshape(4, 64)
    columns = np.concatenate([payload & 15, payload >> 4], axis=-1)
    numbers = columns.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scale = np.array([[1, 127, 130, 251]], np.uint8).repeat(4, axis=0)
    out = MXFP4().decode({"payload": array(payload), "scale": array(scale)}, "float32")
    expected = numbers * scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float32).repeat(32, axis=-1)
    assert np.array_equal(host(out), expected)
    scale = np.arange(1, 126, dtype=np.uint8)[:32].reshape(4, 8) * 3
    out = NVFP4(tensor_scale=0.5).decode({"payload": array(payload), "scale": array(scale)}, "float32")
    expected = numbers * scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32).repeat(16, axis=-1) / 2
    assert np.array_equal(host(out), expected)


# -- whole rows, against the formats' definitions ----------------------------------------------------------------------


def pack(elements: np.ndarray) -> np.ndarray:
    codes = elements.view(np.uint8)
    half = codes.shape[-1] // 2
    return codes[..., :half] | codes[..., half:] << 4


def many_rows() -> np.ndarray:
    """(200, 64) float32: Gaussian, with row sizes from 1e-44 to 1e37 and an outlier in every third row."""
    rows = gaussian((200, 64)) * 10.0 ** np.linspace(-44, 37, 200)[:, None]
    rows[::3, 7] *= 8
    return rows.astype(np.float32)


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_float8_by_the_book(array, format):
    rows = many_rows()
    fields, reference, _ = FORMATS[format]
    wanted = np.maximum(np.abs(rows).max(-1, keepdims=True) * np.float32(1 / fields.largest), np.float32(2.0**-126))
    scale = wanted.astype(ml_dtypes.bfloat16)
    scale = np.where(scale.astype(np.float32) < wanted, np.nextafter(scale, scale.dtype.type(np.inf)), scale)
    planes = Float8(format).encode(array(rows))
    assert np.array_equal(host(planes["scale"]), scale.view(np.int16))
    elements = (rows / scale.astype(np.float32)).astype(reference)
    assert np.isfinite(elements.astype(np.float32)).all()
    assert np.array_equal(host(planes["payload"]), elements.view(np.uint8))


def test_mxfp4_by_the_book(array):
    """Section 6.3 of the specification: shared exponent floor(log2(largest)) - 2, elements saturate."""
    rows = many_rows()
    blocks = rows.reshape(200, 2, 32).astype(np.float64)
    exponent = np.maximum(np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 2, -126)
    elements = np.clip(blocks / 2**exponent, -6, 6).astype(ml_dtypes.float4_e2m1fn).reshape(rows.shape)
    planes = MXFP4().encode(array(rows))
    assert np.array_equal(host(planes["scale"]), (exponent + 127).astype(np.uint8)[..., 0])
    assert np.array_equal(host(planes["payload"]), pack(elements))


@pytest.mark.parametrize("unit", [1.0, 2.0**-10, 2.0**60])
def test_nvfp4_by_the_book(array, unit):
    rows = many_rows()
    blocks = rows.reshape(200, 4, 16).astype(np.float64)
    wanted = np.abs(blocks).max(-1, keepdims=True) / (6 * unit)
    scale = np.clip(wanted, 2.0**-9, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    elements = np.clip(blocks / (scale.astype(np.float64) * unit), -6, 6)
    planes = NVFP4(unit).encode(array(rows))
    assert np.array_equal(host(planes["scale"]), scale.view(np.uint8)[..., 0])
    nearest = elements.astype(np.float32).astype(ml_dtypes.float4_e2m1fn).reshape(rows.shape)
    assert np.array_equal(host(planes["payload"]), pack(nearest))


def test_clipping_costs_no_more_than_doubling_the_scale():
    """The two figures in the docstring of MXFP4."""
    rows = gaussian((8192, 128)).astype(np.float32)
    blocks = rows.reshape(8192, 4, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(largest / 6))
    unclipped = (blocks / scale).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale

    def error(out) -> float:
        return np.sqrt(np.square(out.reshape(rows.shape) - rows).sum() / np.square(rows).sum())

    assert round(100 * error(round_trip(MXFP4(), rows)), 2) == 11.50
    assert round(100 * error(unclipped), 2) == 11.54


# -- bits per element, dtypes, backends --------------------------------------------------------------------------------


@pytest.mark.parametrize("codec, bits", [(Float8(), 8.125), (Float8("e5m2"), 8.125), (MXFP4(), 4.25), (NVFP4(), 4.5)])
def test_bits_per_element(array, codec, bits):
    planes = codec.encode(array(gaussian((2, 7, 128))))
    stated = codec.planes(128)
    assert 8 * sum(plane.nbytes for plane in planes.values()) == bits * 2 * 7 * 128
    assert list(stated) == list(planes)
    for name, plane in planes.items():
        assert tuple(plane.shape) == (2, 7, stated[name].columns)
        assert backend_of(plane).dtype_name(plane) == stated[name].dtype
        assert stated[name].tokens == 1
    assert codec.group == 1


def test_names():
    assert [codec.name for codec in CODECS[:4]] == ["fp8", "fp8-e5m2", "mxfp4", "nvfp4"]


@every_codec
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_both_backends_store_the_same_bits(codec, dtype):
    rows = many_rows() if dtype in ("float32", "float64") else gaussian((50, 64))
    ours = torch.tensor(rows).to(getattr(torch, dtype))
    theirs = rows.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    a, b = codec.encode(ours), codec.encode(theirs)
    for name in b:
        assert np.array_equal(host(a[name]), b[name]), name
    assert np.array_equal(host(codec.decode(a, "float32")), codec.decode(b, "float32"))


@every_codec
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_rows_are_decoded_to_any_dtype(array, codec, dtype):
    planes = codec.encode(array(gaussian()))
    out = codec.decode(planes, dtype)
    backend = backend_of(out)
    assert backend.dtype_name(out) == dtype
    expected = backend.astype(codec.decode(planes, "float64"), dtype)
    assert np.array_equal(host(backend.astype(out, "float64")), host(backend.astype(expected, "float64")))


@every_codec
def test_rows_are_encoded_alone_and_left_as_they_are(array, codec):
    rows = array(gaussian((2, 6, 64)).astype(np.float32))
    before = host(rows).copy()
    whole = codec.encode(rows)
    assert np.array_equal(host(rows), before)
    for part in (slice(0, 1), slice(1, 6, 2)):
        alone = codec.encode(rows[:, part])
        assert all(np.array_equal(host(alone[name]), host(whole[name][:, part])) for name in whole)


@every_codec
def test_planes_may_be_slices_of_larger_ones(array, codec):
    """Tokens inside a block: every other row here, so that no plane is contiguous."""
    planes = codec.encode(array(gaussian((2, 8, 64))))
    some = {name: plane[:, 1::2] for name, plane in planes.items()}
    stored = {name: host(plane).copy() for name, plane in planes.items()}
    q, weights = array(gaussian((2, 3, 64))), array(gaussian((2, 3, 4)))
    assert np.array_equal(host(codec.decode(some, "float32")), host(codec.decode(planes, "float32"))[:, 1::2])
    assert codec.scores(q, some).shape == (2, 3, 4)
    assert codec.mix(weights, some).shape == (2, 3, 64)
    assert all(np.array_equal(host(plane), stored[name]) for name, plane in planes.items())


@every_codec
def test_numpy_alone_is_enough(monkeypatch, codec):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    rows = gaussian((4, 64)).astype(np.float32)
    assert np.abs(round_trip(codec, rows) - rows).max() < 3


# -- bounds ------------------------------------------------------------------------------------------------------------

LARGEST = 1e38  # rows up to here decode to float32 numbers


@st.composite
def rows_of_all_sizes(draw):
    """(8, 64) float64: each row with a size and a shape of its own."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in range(8):
        kind = draw(st.sampled_from(["gaussian", "spread", "constant", "outlier", "zeros", "one"]))
        row = rng.standard_normal(64)
        if kind == "spread":
            row *= 2.0 ** rng.uniform(-40, 0, 64)
        elif kind == "constant":
            row[:] = row[0]
        elif kind == "outlier":
            row[rng.integers(64)] *= 10.0 ** rng.uniform(0, 6)
        elif kind == "zeros":
            row[:] = 0
        elif kind == "one":
            row[np.arange(64) != rng.integers(64)] = 0
        size = draw(st.sampled_from([0, -2, 2, -4, 4]) | st.floats(-50, 37.5))
        rows.append(np.clip(row * 10.0**size, -LARGEST, LARGEST))
    return np.stack(rows)


def special(number: float) -> np.ndarray:
    return np.stack([np.full(64, number), np.where(np.arange(64) == 9, number, 0), number * np.arange(64) / 64])


@every_codec
@given(rows=rows_of_all_sizes())
@example(rows=special(1e30))
@example(rows=special(-1e30))
@example(rows=special(1e-30))
@example(rows=special(1e-45))
@example(rows=special(5.9))
@example(rows=special(7.999999999))
@example(rows=special(2.0**-9 * 6 * 1.4999))  # NVFP4: the scale is rounded down, to two thirds
@example(rows=special(2.0**-10 * 6))
@example(rows=special(2.0**-12 * 6))  # NVFP4: the smallest scale is four times what would do
@example(rows=special(2689.0))
@example(rows=special(0.0))
def test_errors_stay_within_the_bound(codec, rows):
    bound = codec.max_error(rows)
    assert bound.shape == rows.shape
    assert np.all(np.abs(round_trip(codec, rows) - rows) <= bound)
    in_float32 = np.float64(codec.decode(codec.encode(rows), "float32"))
    assert np.all(np.abs(in_float32 - rows) <= bound)


@pytest.mark.parametrize(
    "codec, rows",
    [
        (Float8(), gaussian()),
        (Float8("e5m2"), gaussian()),
        (MXFP4(), gaussian()),
        (NVFP4(), gaussian()),
        (Float8(), np.where(np.arange(64) == 3, 448, np.linspace(0, 2.0**-6, 64))),  # subnormal elements
        (Float8("e5m2"), np.where(np.arange(64) == 3, 57344, np.linspace(0, 2.0**-14, 64))),
        (MXFP4(), np.where(np.arange(64) % 32 == 3, 4.0, np.linspace(0, 1, 64))),
        (NVFP4(), np.where(np.arange(64) % 16 == 3, 6.0, np.linspace(0, 1, 64))),
        (NVFP4(), gaussian() * 0.002),  # subnormal scales
        (NVFP4(), gaussian() * 0.0005),  # the smallest scale
        (NVFP4(), gaussian() * 1e5),  # clipped
        (NVFP4(tensor_scale=100.0), gaussian() * 1e5),
    ],
    ids=lambda x: repr(x) if not isinstance(x, np.ndarray) else f"largest {np.abs(x).max():.3g}",
)
def test_bounds_are_nearly_reached(codec, rows):
    rows = np.atleast_2d(rows)
    ratio = np.abs(round_trip(codec, rows) - rows) / codec.max_error(rows)
    assert 0.8 < ratio.max() <= 1


@pytest.mark.parametrize("codec", CODECS[:2], ids=repr)
def test_the_bound_covers_a_scale_that_was_rounded_up(codec):
    """By almost 2^-7, with numbers in the middle between the smallest steps that this leaves."""
    fields = codec.fields
    step = fields.smallest_normal * 2.0**-fields.mantissa * (1 + 2.0**-7)
    rows = np.append(step * (np.arange(3) + 0.4999), fields.largest * (1 + 1e-6))[None]
    error, bound = np.abs(round_trip(codec, rows) - rows), codec.max_error(rows)
    assert np.all(error <= bound)
    assert np.all(error[:, :3] > 0.99 * bound[:, :3])


@every_codec
def test_the_bound_is_never_more_than_the_number_itself(codec):
    """0 can always be stored, so zeros and whatever is too small for a row's scale come back no worse than as 0."""
    rows = many_rows().astype(np.float64)
    rows[5] = 0
    in_reach = np.abs(rows) < 26  # of either NVFP4
    assert np.all((codec.max_error(rows) <= np.abs(rows) * (1 + 2.0**-17) + 2.0**-148)[in_reach])
    assert np.all(codec.max_error(rows)[5] < 1e-44)


def test_the_smallest_scale_of_nvfp4_still_resolves_something():
    rows = np.full((1, 16), 2.0**-9)  # a third of what the smallest scale is made for
    assert np.allclose(NVFP4().max_error(rows), 2.0**-11, rtol=1e-5)


@every_codec
def test_bounds_scale_with_the_rows(codec):
    """No constant hides in them: half of each row's relative bound is small in rows of any ordinary size."""
    rows = gaussian((40, 128))
    relative = np.linalg.norm(codec.max_error(rows), axis=-1) / np.linalg.norm(rows, axis=-1)
    assert relative.max() < {8: 0.15, 4: 0.4}[4 if codec.planes(128)["payload"].columns == 64 else 8]


@every_codec
def test_zeros_stay_zeros(array, codec):
    rows = array(np.array([[0.0] * 64, [-0.0] * 64, [3.0] * 64], np.float32))
    out = host(codec.decode(codec.encode(rows), "float32"))
    assert np.all(out[:2] == 0)
    assert np.all(out[2] != 0)


# -- attention ---------------------------------------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("dtype, unit", [("float64", 2.0**-52), ("float32", 2.0**-23), ("float16", 2.0**-10)])
@pytest.mark.parametrize("strip", [0, 16])
def test_scores_and_mixes_are_those_of_the_decoded_rows(array, codec, dtype, unit, strip):
    rows = gaussian((2, 50, 64)) * np.linspace(0.1, 3, 50)[:, None]
    planes = codec.encode(array(rows))
    decoded = host(codec.decode(planes, "float64"))
    q, weights = gaussian((2, 3, 64), 1).astype(dtype), np.abs(gaussian((2, 3, 50), 2)).astype(dtype)
    scores, mixed = codec.scores(array(q), planes, strip), codec.mix(array(weights), planes, strip)
    q, weights = q.astype(np.float64), weights.astype(np.float64)
    for out, left, right in ((scores, q, decoded.mT), (mixed, weights, decoded)):
        assert backend_of(out).dtype_name(out) == dtype
        assert np.all(np.abs(host(out) - left @ right) <= 200 * unit * (np.abs(left) @ np.abs(right)))


@every_codec
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scores_neither_overflow_nor_vanish(array, codec, size):
    """The scale, the power of two between two biases and the query never meet where float32 ends."""
    rows = gaussian((1, 9, 64)) * size
    planes = codec.encode(array(rows))
    decoded = host(codec.decode(planes, "float64"))
    q = np.ones((1, 2, 64), np.float32)
    expected = np.float64(q) @ decoded.mT
    scores, mixed = host(codec.scores(array(q), planes)), host(codec.mix(array(np.ones((1, 2, 9), np.float32)), planes))
    assert np.allclose(scores, expected, rtol=0, atol=1e-5 * np.abs(decoded).max())
    assert np.allclose(mixed, decoded.sum(1, keepdims=True), rtol=0, atol=1e-5 * np.abs(decoded).max())


@every_codec
def test_answers_do_not_share_memory(array, codec):
    """Scratch memory is used over and over; nothing that is handed out may lie in it, or in a plane."""
    q = array(gaussian((2, 3, 64), 1))
    first, second = (codec.encode(array(gaussian((2, 20, 64), seed))) for seed in (5, 6))
    for read in (lambda planes: codec.decode(planes, "float32"), lambda planes: codec.scores(q, planes)):
        out = read(first)
        kept = host(out).copy()
        codec.scores(q, second), codec.mix(codec.scores(q, second), second), codec.decode(second, "float32")
        assert np.array_equal(host(out), kept)
        out[...] = 0
        assert np.array_equal(host(read(first)), kept)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["e3m4", "E4M3", "", None])
def test_unknown_formats(format):
    with pytest.raises(ValueError, match=r"Float8.format must be 'e4m3' or 'e5m2', got"):
        Float8(format)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-31, 1e31, float("inf"), float("nan")])
def test_tensor_scales_that_float32_cannot_carry(scale):
    with pytest.raises(ValueError, match=r"NVFP4.tensor_scale must lie between 1e-30 and 1e30, got"):
        NVFP4(tensor_scale=scale)


@pytest.mark.parametrize("codec, width, block", [(MXFP4(), 48, 32), (NVFP4(), 40, 16)])
def test_widths_that_do_not_fit(codec, width, block):
    codec.check(3 * block)
    says = f"{codec.name} has a scale for every {block} columns.*multiple of {block}, got {width}"
    for call in (codec.check, codec.planes, lambda width: codec.encode(np.zeros((1, width)))):
        with pytest.raises(ValueError, match=says):
            call(width)


def test_odd_numbers_of_blocks():
    """96 columns are three blocks of MXFP4: the one in the middle lies in both halves of the bytes."""
    rows = gaussian((4, 96)) * np.repeat([1, 100, 0.01], 32)
    out = round_trip(MXFP4(), rows)
    for block in range(3):
        columns = slice(32 * block, 32 * block + 32)
        assert np.array_equal(out[:, columns], round_trip(MXFP4(), rows[:, columns]))
