"""Rooflines against counts made another way: brute force, torch's counter, a published worked example."""

import itertools
import json
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvlib
from kvlib import roofline
from kvlib.devices import Device, Level, devices, find_device, measure_cpu
from kvlib.registry import LayerGroup, Model

LLAMA = "Llama-3.1-8B"
ENTRIES = json.loads(resources.files("kvlib").joinpath("data/devices.json").read_text())


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENTRIES)
def test_published_rates_follow_from_processors_and_clock(name):
    """Two published figures that must agree: FLOP per clock and processor, and TFLOP per second."""
    entry = ENTRIES[name]
    for dtype, each in entry["flop_per_clock"].items():
        computed = entry["processors"] * entry["clock_ghz"] * each / 1e3
        assert computed == pytest.approx(entry["tflops"][dtype], rel=5e-3)


@pytest.mark.parametrize("name", ENTRIES)
def test_each_level_is_smaller_than_the_one_before_or_private_and_faster(name):
    device = devices()[name]
    known = [level for level in device.levels if level.bandwidth]
    assert device.source and device.memory is device.levels[0]
    assert [level.name for level in device.levels][-2:] == ["shared memory", "registers"]
    assert all(slow.bandwidth < fast.bandwidth for slow, fast in itertools.pairwise(known))
    assert all(level.bytes < 1e9 for level in device.levels[1:])


def test_ridges():
    assert find_device("H200").ridge() == pytest.approx(989.5e12 / 4.8e12)
    assert find_device("rtx4090").name == "RTX 4090"
    with pytest.raises(ValueError, match=r"no device is called 'H300'; known: A100, H100"):
        find_device("H300")
    with pytest.raises(ValueError, match="A100 has no rate for 'float8'; there are: bfloat16, int8"):
        find_device("A100").ridge("float8")


def test_this_cpu_can_be_measured():
    cpu = measure_cpu(megabytes=8, size=128, rounds=1)
    assert cpu.memory.bandwidth > 0 and cpu.ridge("float32") > 0
    assert roofline.seconds(roofline.Work(1.0, 1.0), cpu) > 0  # with the one rate that it has


# -- work --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 40), st.none() | st.integers(1, 50))
def test_pairs_are_those_of_the_mask(new, before, window):
    context = before + new
    query, key = np.arange(before, context)[:, None], np.arange(context)
    sees = (key <= query) & (key > query - (context if window is None else window))
    assert roofline.pairs(new, context, window) == sees.sum()


@pytest.mark.parametrize(("new", "context"), [(1, 64), (16, 64), (64, 64)])
def test_attention_counts_what_torch_counts(new, context):
    """torch counts the products that it runs: all pairs, those that the mask hides too."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from kvlib.attention import dense

    heads, width = 8, 32
    q, k, v = torch.zeros(heads, new, width), *torch.zeros(2, heads, context, width)
    with FlopCounterMode(display=False) as counter:
        dense(q, k, v)
    model = Model("one layer", (LayerGroup(kvlib.CacheSpec(2, width)),), num_heads=heads)
    ours = roofline.attention(model, new, context).flops
    assert ours * new * context / roofline.pairs(new, context) == counter.get_total_flops()


def test_bytes_of_a_decode_step_are_those_of_the_cache_that_it_reads():
    spec = kvlib.CacheSpec(num_kv_heads=2, head_dim=64, num_layers=3, dtype="float16")
    cache = kvlib.KVCache(spec, batch=4, max_tokens=96, codec="int8")
    held = sum(array.nbytes for array in cache._storage.arrays())
    work = roofline.attention(Model("m", (LayerGroup(spec),), num_heads=8), 1, 96, 4, codec="int8")
    queries = 4 * 3 * 8 * 2 * 64 * 2
    assert work.bytes == pytest.approx(held + held / 96 + queries)


def test_attention_of_a_decode_step_does_as_many_flop_per_byte_as_heads_share_a_key():
    for kv_heads, intensity in ((32, 1), (8, 4), (1, 32)):
        work = roofline.attention(roofline.grouped(LLAMA, kv_heads), 1, 100_000)
        assert work.intensity == pytest.approx(intensity, rel=2e-3)
    batch = [roofline.attention(LLAMA, 1, 8192, batch).intensity for batch in (1, 64)]
    assert batch[0] == pytest.approx(batch[1])  # a batch does not help attention


def test_a_window_bounds_what_is_read_and_computed():
    short, long = (roofline.attention("Mistral-7B-v0.1", 1, n) for n in (4096, 65_536))
    assert long == short
    assert roofline.attention("gpt-oss-20b", 1, 65_536).flops < roofline.attention("gpt-oss-20b", 1, 131_072).flops


def test_the_worked_example_of_the_scaling_book():
    """Llama-2-13B on 8 chips of 0.82 TB/s, 8,192 tokens, batch 240: 249.09 ms and 963.53 tokens per second. The book
    rounds weights to 26 GB and a sequence's cache to 6.7 GB, which is where the 0.2 % comes from.
    """
    chips = Device("8 chips", (Level("HBM", 8 * 16e9, 8 * 0.82e12),), {"bfloat16": 8 * 197e12})
    took = roofline.seconds(roofline.step("Llama-2-13B", 1, 8192, 240), chips)
    assert 1e3 * took == pytest.approx(249.09, rel=3e-3)
    assert 240 / took == pytest.approx(963.53, rel=3e-3)


def test_decode_reads_and_prefill_computes():
    decode, prefill = (roofline.step(LLAMA, new, 4096) for new in (1, 4096))
    ridge = find_device("H100").ridge()
    assert decode.total.intensity < ridge < prefill.total.intensity
    assert roofline.seconds(decode, "H100") == pytest.approx(decode.total.bytes / 3.35e12)
    assert roofline.seconds(prefill, "H100") == pytest.approx(prefill.total.flops / 989.5e12)


def test_prefill_computes_two_flop_per_weight_and_token():
    work = roofline.step(LLAMA, 512, 512, batch=2).linear
    assert work.flops == 2 * 8030261248 * 1024 and work.bytes == 2 * 8030261248


def test_a_mixture_multiplies_with_fewer_weights_than_it_reads():
    work = roofline.step("gpt-oss-20b", 1, 1024, active=3.6e9).linear
    assert work == roofline.Work(2 * 3.6e9, 2 * 20914757184)


@pytest.mark.parametrize("context", [1, 16, 100])
@pytest.mark.parametrize("model", [LLAMA, "Llama-2-13B"])
def test_the_critical_batch_is_the_first_that_is_bound_by_arithmetic(model, context):
    device = find_device("H200")

    def reads_longer(batch):
        work = roofline.step(model, 1, context, batch).total
        return work.bytes / device.memory.bandwidth > work.flops / device.peak("bfloat16")

    found = roofline.critical_batch(model, context, device)
    assert found is not None and reads_longer(found - 1) and not reads_longer(found)


def test_with_a_long_context_no_batch_is_large_enough():
    assert roofline.critical_batch(LLAMA, 8192, "H200") is None
    work = roofline.step(LLAMA, 1, 8192, 100_000).total
    assert work.intensity < find_device("H200").ridge()
    assert roofline.critical_batch(LLAMA, 8192, "H200", whole=False) == 207  # the ridge, 206.1, of 2-byte weights


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: roofline.attention(LLAMA, 9, 8), "the 9 new tokens are part of the context, which has 8"),
        (lambda: roofline.attention(LLAMA, 0, 8), "new must be a positive integer, got 0"),
        (lambda: roofline.attention(kvlib.CacheSpec(2, 8), 1, 8), "query heads of 1 layers of 2 KV heads is not known"),
        (lambda: roofline.grouped(LLAMA, 5), "32 query heads cannot share 5 KV heads evenly"),
        (lambda: roofline.grouped("DeepSeek-V3", 8), "DeepSeek-V3 keeps a latent"),
        (
            lambda: roofline.step(Model("m", (LayerGroup(kvlib.CacheSpec(2, 8)),), 2), 1, 8),
            "the number of weights of m is not known: pass parameters=",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
