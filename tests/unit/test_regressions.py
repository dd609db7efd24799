"""Defects that were found once: each test fails on the code as it was before."""

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import kvlib
from kvlib import threads
from kvlib.arrays import NumpyBackend
from kvlib.config import ModelConfig
from kvlib.model import Transformer
from kvlib.tiling import Cut
from tests.conformance.reference import attention

SPEC = kvlib.CacheSpec(2, 4, 2, "float32")
STEP = np.arange(16, dtype=np.float32).reshape(2, 2, 1, 4)


def cache(**settings) -> kvlib.KVCache:
    return kvlib.KVCache(SPEC, **({"batch": 2, "max_tokens": 8, "block_size": 4} | settings))


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; one that hangs is killed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# A decode step long enough to be shared among threads, and nothing but that.
DECODE = """
import threading, time, numpy as np, kvlib
from kvlib.arrays import numpy_backend
cache = kvlib.KVCache(kvlib.CacheSpec(2, 64, 1, "float32"), 1, 40000)
x = np.ones((1, 2, 40000, 64), np.float32)
cache.append(x, x)
decode = lambda *_: cache.attend(np.ones((1, 8, 1, 64), np.float32)).sum()
"""


def test_threads_of_the_pool_may_attend():
    """A task of the pool that shares out work of its own waited for a thread: the one that it ran on."""
    code = DECODE + "print([float(x) for x in numpy_backend.map(decode, range(4))])"
    assert python(code, KVLIB_NUM_THREADS="2").strip() == str([512.0] * 4)


def test_a_thread_may_attend_after_the_main_one_has_ended():
    """Python starts no pool then: "can't register atexit after shutdown"."""
    code = DECODE + """
main = threading.current_thread()
threading.Thread(target=lambda: (main.join(), time.sleep(0.2), print(decode()))).start()
"""
    assert python(code, KVLIB_NUM_THREADS="2").strip() == "512.0"


def test_bad_number_of_threads(monkeypatch):
    count = threads.num_threads.__wrapped__
    for value in ("many", "2.5"):
        monkeypatch.setenv("KVLIB_NUM_THREADS", value)
        with pytest.raises(ValueError, match=f"KVLIB_NUM_THREADS must be an integer, got '{value}'"):
            count()
    monkeypatch.setenv("KVLIB_NUM_THREADS", "")  # how a shell unsets a variable for one command
    assert count() >= 1


def test_more_rows_than_int32_counts():
    """Block id times heads passed 2^31, and the gather read the wrong rows without a word.

    The storage is 8 GiB of zeros that nobody touches but for a few pages: the last two of 2,049 blocks are used.
    """
    heads = 1 << 20
    try:
        big = kvlib.KVCache(kvlib.CacheSpec(heads, 1, 1, "float16"), 1, 2050, block_size=1)
    except MemoryError:
        pytest.skip("this system does not promise 8 GiB of untouched memory")
    free = big._tables.pool._free
    free[:] = free[::-1].copy()
    x = np.ones((1, heads, 2, 1), np.float16) * np.array([3, 5], np.float16)[:, None]
    big.append(x, x)
    assert big.block_table(0) == [2049, 2048]
    assert np.array_equal(big.read(0)[0], x[0])


@pytest.mark.parametrize("block_size", [16, 17, 129, 300, 1000])
@pytest.mark.parametrize("tokens", [1, 64])
def test_every_byte_is_gathered_at_most_once(block_size, tokens, monkeypatch):
    """Tiles that ended inside a block gathered the whole block, and the next tile did again: up to 1.95 times."""
    spec = kvlib.CacheSpec(2, 128, 1, "float32")
    paged = kvlib.KVCache(spec, 1, 2000, block_size=block_size)
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 2, 2000, 128), dtype=np.float32)
    paged.append(k, v)
    gathered, take = [], NumpyBackend.take

    def counting(self, x, rows, out):
        gathered.append(out.nbytes)
        return take(self, x, rows, out)

    monkeypatch.setattr(NumpyBackend, "take", counting)
    q = rng.standard_normal((1, 8, tokens, 128), dtype=np.float32)
    out = paged.attend(q)
    slots = len(paged.block_table(0)) * block_size
    assert sum(gathered) <= slots * spec.bytes_per_token
    assert np.abs(out[0] - attention(q[0], k[0], v[0])).max() <= 2e-6


def test_strips_are_for_threads():
    """A chunk of 64 queries went through strips of 8 keys on one thread, three times slower than one product."""
    storage = kvlib.KVCache(kvlib.CacheSpec(2, 128), 1, 40000)._storage
    for rows in (1, 2, 4, 8, 64, 256, 4096):
        cut = Cut.plan(storage, 1, rows, storage.spec.dtype)
        assert (cut.strip >= 64 and cut.pieces >= 1) or (cut.strip, cut.pieces) == (0, 0)


@pytest.mark.parametrize("seqs", [[True, False], np.array([True, False]), [0.0, 1.0]], ids=repr)
def test_a_mask_is_not_a_list_of_ids(seqs):
    """True == 1: [True, False] stored the first row in sequence 1 and the second in sequence 0."""
    with pytest.raises(KeyError, match="is not open"):
        cache().append(STEP, STEP, seqs=seqs)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_is_a_cache_of_its_own(backend, copied):
    original = cache(backend=backend, num_blocks=9)
    k = STEP if backend == "numpy" else torch.from_numpy(STEP)
    original.append(k, k)
    twin = copied(original)
    assert twin.open() == original.open() == 2
    twin.append(k, k, seqs=[0, 1])
    assert original.lengths == {0: 1, 1: 1, 2: 0}
    assert twin.lengths == {0: 2, 1: 2, 2: 0}
    assert np.array_equal(np.asarray(twin.read(1)[0][:, 1:]), STEP[1])


def test_cache_full_leaves_a_worker_process():
    """It could be pickled, not unpickled: a multiprocessing pool that met one waited for ever."""
    error = pickle.loads(pickle.dumps(kvlib.CacheFull(3, 1, 8)))
    assert (error.needed, error.free, error.total) == (3, 1, 8)
    assert str(error) == str(kvlib.CacheFull(3, 1, 8))


def test_sizes_may_be_small_numpy_integers():
    """100 sequences of 15 blocks overflowed int8."""
    assert cache(batch=np.int8(100), max_tokens=np.int8(100), block_size=np.int8(7)).num_blocks == 1500


def test_repr_says_what_it_is():
    used = cache()
    used.append(STEP, STEP)
    for part in ("KVCache(", "num_kv_heads=2", "plain", "numpy", "2 sequences", "2 of 4 blocks of 4 tokens"):
        assert part in repr(used)
    assert "torch on cpu" in repr(cache(backend="torch"))


def test_no_open_sequence_says_what_to_do():
    with pytest.raises(ValueError, match=r"no open sequence.*open\(\)"):
        cache(batch=0).append(STEP, STEP)


def test_a_class_derived_from_tensor_is_a_tensor():
    class Named(torch.Tensor):
        pass

    ours = cache(backend="torch")
    k = torch.from_numpy(STEP).as_subclass(Named)
    ours.append(k, k)
    assert np.array_equal(ours.attend(k).numpy(), STEP)


# -- the model ---------------------------------------------------------------------------------------

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


def tiny_model() -> Transformer:
    config = ModelConfig.from_dict(TINY)
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(s, dtype=np.float32) for n, s in config.tensor_shapes().items()}
    return Transformer(config, weights, kvlib.arrays.numpy_backend, "float32")


def test_an_interrupted_step_is_taken_back(monkeypatch):
    """Stopped between two layers (Ctrl-C in a notebook), the next call put its keys at positions of the last one."""
    model = tiny_model()
    ours = kvlib.KVCache(model.spec, 1, 32, block_size=4)
    model([[1, 2, 3]], ours)
    attend = kvlib.KVCache.attend

    def interrupted(self, q, layer=0, **settings):
        if layer == 1:
            raise KeyboardInterrupt
        return attend(self, q, layer=layer, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(kvlib.KVCache, "attend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model([[4, 5]], ours)
    assert ours.lengths == {0: 3}
    assert all(len(ours.read(0, layer)[2]) == 3 for layer in range(3))
    assert np.allclose(model([[6, 7]], ours), model([[1, 2, 3, 6, 7]])[:, -2:], atol=1e-4)


@pytest.mark.parametrize(
    "field, value",
    [
        ("architectures", "LlamaForCausalLM"),
        ("architectures", 5),
        ("architectures", [["x"]]),
        ("quantization_config", "awq"),
        ("rope_scaling", "yarn"),
        ("rope_scaling", {"rope_type": ["yarn"]}),
        ("rope_parameters", 3),
        ("rope_theta", float("inf")),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", [1e-5]),
        ("max_window_layers", "all"),
        ("sliding_window", "4096"),
    ],
    ids=repr,
)
def test_a_malformed_config_is_a_value_error(field, value):
    """Some were a TypeError or AttributeError from deep inside, which named no field."""
    says = {"architectures": "architecture", "rope_scaling": "rope_"}.get(field, field)
    with pytest.raises(ValueError, match=says):
        ModelConfig.from_dict({**TINY, field: value})


def test_temperature_may_be_a_numpy_float():
    model = tiny_model()
    cold = list(kvlib.generate(model, [1, 2], 4, temperature=np.float32(0.5)))
    assert cold == list(kvlib.generate(model, [1, 2], 4, temperature=0.5))


def test_a_masked_array_is_refused():
    """Its mask was dropped in silence."""
    filled = cache()
    with pytest.raises(TypeError, match="k must be a numpy array, got a numpy MaskedArray"):
        filled.append(np.ma.masked_array(STEP), STEP)
    assert filled.lengths == {0: 0, 1: 0}


def test_a_sparse_tensor_is_refused_before_a_block_is_taken():
    filled = cache(backend="torch")
    step = torch.from_numpy(STEP)
    with pytest.raises(TypeError, match=r"torch.strided, got a torch Tensor on cpu, torch.sparse_coo"):
        filled.append(step.to_sparse(), step)
    assert filled.num_free_blocks == filled.num_blocks


def test_eviction_is_a_policy_or_an_error():
    """A misspelt policy was taken for none."""
    assert cache(eviction=None).lengths == {0: 0, 1: 0}
    with pytest.raises(TypeError, match=r"eviction must be None or a kvlib\.eviction\.Policy.*got 'h2o'"):
        cache(eviction="h2o")
