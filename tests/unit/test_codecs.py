"""What all codecs have in common, what `Plain` may be off by, and what a `Split` calls itself."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from kvlib.codecs import KIVI, MXFP4, NVFP4, Float8, Int, Plain, Rotated, Split

CODECS = [
    Plain("float16"),
    Int(8),
    Int(4, group_size=16),
    Int(2, "channel", 4),
    Float8("e5m2"),
    MXFP4(),
    NVFP4(),
    Rotated(Int(4, group_size=16)),
]


@pytest.fixture(params=CODECS, ids=lambda codec: codec.name)
def codec(request):
    return request.param


def test_settings_are_values(codec):
    """Equal ones are equal, can stand in a dictionary, and cannot be changed under a cache that has been built."""
    twin = dataclasses.replace(codec)
    assert twin == codec and hash(twin) == hash(codec)
    for field in dataclasses.fields(codec):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(codec, field.name, getattr(codec, field.name))


def test_scores_and_mix_need_no_strip(codec):
    rng = np.random.default_rng(0)
    planes = codec.encode(rng.standard_normal((2, 8, 32)))
    rows = codec.decode(planes, "float64")
    q, weights = rng.standard_normal((2, 3, 32)), rng.random((2, 3, 8))
    np.testing.assert_allclose(codec.scores(q, planes), q @ rows.swapaxes(1, 2), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(codec.mix(weights, planes), weights @ rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_plain_is_off_by_half_a_step_at_most(dtype):
    """Half the distance between 1 and the next number, for numbers of that size; half the least number near zero."""
    about = ml_dtypes.finfo(dtype)
    step, least = float(about.eps), float(about.smallest_subnormal)
    assert Plain(dtype).max_error(np.zeros(1)) == least / 2
    rows = np.array([1 + step / 2, -(1 + 1.5 * step), 0.0, 3 * least / 2])[:, None]
    error = np.abs(Plain(dtype).decode(Plain(dtype).encode(rows), "float64") - rows)
    bound = Plain(dtype).max_error(rows)
    assert np.all(error <= bound)
    np.testing.assert_allclose(error[[0, 1, 3]], bound[[0, 1, 3]], rtol=4 * step)


def test_a_split_is_named_after_its_codecs():
    name = Int(8).name
    assert Split(Int(8), Int(8)).name == name
    assert Split(Int(8), Int(8), residual=5).name == f"{name}, last 5 exact"
    assert Split(Int(8), Int(4)).name == f"K {name}, V {Int(4).name}"
    assert KIVI(4, group=16, residual=20).name == "kivi-4bit/16, last 20 exact"
    assert Int(4, "channel", 8).name == "int4 per channel/8"
    assert Int(8, symmetric=True).name == "int8 per token symmetric"
