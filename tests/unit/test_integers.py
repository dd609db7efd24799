"""Int: packing, rounding and folding, against codes unpacked by hand and products in float64."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlib.codecs import KIVI, Int, Plain, Split, get_codec

SETTINGS = [
    Int(bits, axis, group_size, symmetric)
    for bits, (axis, group_size), symmetric in itertools.product(
        (8, 4, 2), (("token", None), ("token", 8), ("channel", 4)), (False, True)
    )
]
TOKENS, WIDTH = 24, 32


@pytest.fixture(params=SETTINGS, ids=lambda codec: codec.name)
def codec(request) -> Int:
    return request.param


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_hand(codec: Int, planes: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows that the planes stand for, in float64, and the scale of each of their numbers: loops, no library."""
    payload = planes["payload"]
    per_byte = 8 // codec.bits
    heads, tokens, columns = payload.shape
    width = columns * per_byte
    rows, scales = np.empty((2, heads, tokens, width))
    for h, t, j in itertools.product(range(heads), range(tokens), range(width)):
        code = (int(payload[h, t, j % columns]) >> codec.bits * (j // columns)) & (1 << codec.bits) - 1
        at = (h, t // codec.group_size, j) if codec.axis == "channel" else (h, t, j // (codec.group_size or width))
        scale = float(planes["scale"][at])
        middle = (1 << codec.bits - 1) - 1  # of an odd number of symmetric codes
        rows[h, t, j] = scale * (code - middle) if codec.symmetric else scale * code + float(planes["offset"][at])
        scales[h, t, j] = scale
    return rows, scales


def test_decode_is_what_the_bytes_say(codec):
    rows = normal(2, TOKENS, WIDTH)
    planes = codec.encode(rows)
    expected, scales = by_hand(codec, planes)
    np.testing.assert_allclose(codec.decode(planes, "float64"), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(codec.decode(planes, "float32"), expected, rtol=1e-6, atol=1e-6)
    # the nearest of all levels: no rounding down, no clipping, no wrap-around
    assert np.all(np.abs(expected - rows) <= scales * 0.50001)


def test_every_level_is_used(codec):
    """A group that spans its range has both ends of it among its codes: the scale is not wider than it has to be."""
    planes = codec.encode(normal(1, 2048, WIDTH))
    per_byte, mask = 8 // codec.bits, (1 << codec.bits) - 1
    codes = {int(byte) >> codec.bits * part & mask for byte in np.unique(planes["payload"]) for part in range(per_byte)}
    assert max(codes) == mask - codec.symmetric
    assert min(codes) == 0
    assert codec.bits == 8 or codes == set(range(mask + 1 - codec.symmetric))


def test_planes_have_the_shapes_and_bits_that_they_say(codec):
    planes = codec.encode(normal(3, 2, TOKENS, WIDTH))
    layout = codec.planes(WIDTH)
    assert planes.keys() == layout.keys()
    for name, (columns, dtype, tokens) in layout.items():
        assert planes[name].shape == (3, 2, TOKENS // tokens, columns)
        assert planes[name].dtype == dtype
    bits = 8 * sum(plane.nbytes for plane in planes.values()) / (3 * 2 * TOKENS * WIDTH)
    size = codec.group_size or WIDTH
    assert bits == codec.bits + (16 if codec.symmetric else 32) / size


@pytest.mark.parametrize(
    ("codec", "bits"),
    [(Int(8), 8.25), (Int(8, symmetric=True), 8.125), (Int(4, group_size=32), 5), (Int(2, "channel", 32), 3)],
    ids=str,
)
def test_bits_at_head_dim_128(codec, bits):
    planes = codec.encode(normal(1, 64, 128))
    assert 8 * sum(plane.nbytes for plane in planes.values()) == bits * 64 * 128


@pytest.mark.parametrize("strip", [0, 4, 5, 64])
def test_scores_and_mix_are_products_with_the_decoded_rows(codec, strip):
    planes = codec.encode(normal(2, TOKENS, WIDTH) + 3)  # an offset that a wrong sum would not hide
    rows, _ = by_hand(codec, planes)
    q, weights = normal(2, 5, WIDTH, seed=1), np.abs(normal(2, 5, TOKENS, seed=2))
    np.testing.assert_allclose(codec.scores(q, planes, strip), q @ rows.swapaxes(1, 2), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(codec.mix(weights, planes, strip), weights @ rows, rtol=1e-5, atol=1e-4)
    exact = codec.scores(q.astype(np.float64), planes, strip)
    assert exact.dtype == np.float64
    np.testing.assert_allclose(exact, q.astype(np.float64) @ rows.swapaxes(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_the_least_that_can_be_scored_and_mixed(codec, rows):
    """One group of tokens, which may be a single token; as many query rows as a token has groups, and others."""
    planes = codec.encode(normal(2, codec.group, WIDTH) + 3)
    decoded, _ = by_hand(codec, planes)
    q, weights = normal(2, rows, WIDTH, seed=1), np.abs(normal(2, rows, codec.group, seed=2))
    np.testing.assert_allclose(codec.scores(q, planes), q @ decoded.swapaxes(1, 2), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(codec.mix(weights, planes), weights @ decoded, rtol=1e-5, atol=1e-4)


def test_torch_stores_the_same_bytes_and_answers_the_same(codec):
    torch = pytest.importorskip("torch")
    rows, q = normal(2, TOKENS, WIDTH), normal(2, 5, WIDTH, seed=1)
    ours, theirs = codec.encode(rows), codec.encode(torch.from_numpy(rows))
    for name in ours:
        assert np.array_equal(ours[name], theirs[name].numpy()), name
    scores = codec.scores(torch.from_numpy(q), theirs)
    np.testing.assert_allclose(scores.numpy(), codec.scores(q, ours), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(codec.decode(theirs, "float16").numpy(), codec.decode(ours, "float16"))


def test_decoded_rows_are_not_scratch_memory(codec):
    first = codec.decode(codec.encode(normal(2, TOKENS, WIDTH)), "float32")
    before = first.copy()
    codec.decode(codec.encode(normal(2, TOKENS, WIDTH, seed=9)), "float32")
    assert np.array_equal(first, before)


@given(
    codec=st.sampled_from(SETTINGS),
    exponent=st.integers(-12, 15),
    shift=st.sampled_from([0, 1, -30]),
    spread=st.floats(0, 3),
    seed=st.integers(0, 2**16),
)
def test_the_bound_holds_and_is_not_idle(codec, exponent, shift, spread, seed):
    rng = np.random.default_rng(seed)
    scale = 2.0**exponent * np.exp(spread * rng.standard_normal((1, 8, 1)))
    rows = np.clip((rng.standard_normal((1, 8, WIDTH)) + shift) * scale, -6e4, 6e4).astype(np.float32)
    error = np.abs(codec.decode(codec.encode(rows), "float64") - rows)
    bound = codec.max_error(rows.astype(np.float64))
    assert np.all(error <= bound)
    assert error.max() >= bound.max() / 8


def test_the_bound_is_half_a_step():
    rows = np.linspace(-1, 1, 64)[None, None]
    for bits in (8, 4, 2):
        assert Int(bits).max_error(rows).max() == pytest.approx(2 / (2**bits - 1) / 2, rel=5e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-9, 6e4])
def test_a_row_of_one_value(codec, value):
    rows = np.full((1, 8, WIDTH), value, np.float32)
    error = np.abs(codec.decode(codec.encode(rows), "float64") - rows)
    assert error.max() <= abs(value) * 2e-3 + 2**-23
    if value == 0:
        assert error.max() == 0


def test_symmetric_keeps_zero_and_sign():
    rows = np.array([[[0, 1, -1, 0.5, -0.5, 0, 0.25, -0.25]]], np.float32)
    out = Int(4, symmetric=True).decode(Int(4, symmetric=True).encode(rows), "float64")
    assert np.all(out[rows == 0] == 0)
    np.testing.assert_array_equal(out[..., [1, 3, 6]], -out[..., [2, 4, 7]])


def test_what_a_group_holds_is_its_own_affair():
    """An outlier costs its own group, and no other."""
    rows = normal(1, 8, WIDTH)
    loud = rows.copy()
    loud[0, 5, 3] = 1000
    for codec, touched in ((Int(4, "token", 8), np.s_[0, 5, 0:8]), (Int(4, "channel", 4), np.s_[0, 4:8, 3])):
        quiet, shouting = (codec.decode(codec.encode(x), "float32") for x in (rows, loud))
        changed = np.zeros(rows.shape, bool)
        changed[touched] = True
        assert np.array_equal(quiet[~changed], shouting[~changed])
        assert not np.array_equal(quiet[changed], shouting[changed])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "8, 4 or 2"),
        ({"axis": "row"}, "'token' or 'channel'"),
        ({"axis": "channel"}, "needs group_size"),
        ({"group_size": 1}, "at least 2"),
        ({"group_size": True}, "at least 2"),
        ({"group_size": 2.0}, "at least 2"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        Int(**settings)


def test_numbers_may_come_from_numpy():
    """2**8 is 0 in NumPy's int8, and so would be the levels."""
    codec, rows = Int(np.int8(8), group_size=np.int16(8)), normal(2, TOKENS, WIDTH)
    for name, plane in Int(8, group_size=8).encode(rows).items():
        assert np.array_equal(codec.encode(rows)[name], plane)


def test_rows_that_do_not_divide():
    with pytest.raises(ValueError, match=r"group_size=24 must divide the row of 32"):
        Int(4, group_size=24).check(32)
    with pytest.raises(ValueError, match="4 codes into a byte"):
        Int(2).check(30)
    Int(2).check(32)
    Int(2, "channel", 24).check(32)


def test_kivi_is_keys_by_channel_and_values_by_token():
    codec = KIVI(bits=4, group=16, residual=20)
    assert (codec.k, codec.v, codec.residual) == (Int(4, "channel", 16), Int(4, "token", 16), 20)
    assert (codec.group, codec.tail) == (16, 35)
    assert KIVI() == get_codec("kivi-2bit", "float16")


def test_split_wants_groups_that_fit_each_other():
    assert Split(Int(4, "channel", 8), Int(4, "channel", 4)).group == 8
    with pytest.raises(ValueError, match=r"\(8\) and V \(6\)"):
        Split(Int(4, "channel", 8), Int(4, "channel", 6))
    with pytest.raises(ValueError, match="0 or more, got -1"):
        Split(Int(), Int(), -1)
    with pytest.raises(TypeError, match="the class Int"):
        Split(Int, Int())


def test_codecs_by_name():
    assert get_codec("plain", "bfloat16").k == Plain("bfloat16")
    assert get_codec("float16", "float32").v == Plain("float16")
    assert get_codec(Int(8), "float32") == Split(Int(8), Int(8))
    assert get_codec("int4", "float32").name == "int4"
    with pytest.raises(ValueError, match=r"plain, .*kivi-2bit; got 'int3'"):
        get_codec("int3", "float32")
    with pytest.raises(TypeError, match="lacks them"):
        get_codec(3, "float32")


@pytest.mark.parametrize(
    ("dtype", "bits", "least"),
    [("float64", 53, -1074), ("float32", 24, -149), ("float16", 11, -24), ("bfloat16", 8, -133)],
)
def test_plain_is_off_by_half_a_unit_or_half_the_least_number(dtype, bits, least):
    """IEEE 754's numbers, and bfloat16's: float32 with 16 bits fewer."""
    bound = Plain(dtype).max_error(np.array([0.0, 1.0, -4.0]))
    assert bound[0] == 2.0**least / 2
    assert bound[1:] == pytest.approx([2.0**-bits, 4 * 2.0**-bits], rel=1e-3)


def test_names_say_what_is_stored():
    assert Split(Int(8), Int(8)).name == "int8 per token"
    assert Split(Int(4, "channel", 8), Int(4, group_size=16), 5).name == (
        "K int4 per channel/8, V int4 per token/16, last 5 exact"
    )
    assert Int(2, symmetric=True).name == "int2 per token symmetric"
