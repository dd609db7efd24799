"""The corners where NumPy and torch differ: dtypes, devices, gathers, threads, and what is missing."""

import os
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
import torch

from kvlib import threads
from kvlib.arrays import TorchBackend, backend_of, check_float, get_backend


@pytest.fixture(params=["numpy", "torch"])
def backend(request):
    return get_backend(request.param)


def test_backends_by_name():
    assert get_backend("numpy").xp is np
    assert get_backend("numpy", "cpu") is get_backend("numpy")
    assert get_backend("torch").device == torch.device("cpu")
    assert get_backend("torch", "cpu:0").owns(torch.zeros(1))  # the same device under another name


@pytest.mark.parametrize(
    "name, device, says",
    [
        ("jax", None, "'numpy' or 'torch', got 'jax'"),
        (None, None, "got None"),
        ("numpy", "cuda", "lives on the CPU, got device='cuda'"),
        ("torch", "gpu", "got 'gpu'"),
        ("torch", "", None),
    ],
)
def test_backends_that_are_not(name, device, says):
    if says is None:
        assert get_backend(name, device).device == torch.device("cpu")
        return
    with pytest.raises(ValueError, match=says):
        get_backend(name, device)


def test_torch_is_not_installed(monkeypatch):
    for module in ("torch", "array_api_compat.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs torch and array-api-compat: pip install 'kvlib\[torch\]'"):
        get_backend("torch")


def test_ml_dtypes_is_not_installed(monkeypatch):
    """NumPy has no bfloat16 of its own. Everything else works without the package that adds it."""
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    numpy = get_backend("numpy")
    assert numpy.zeros((2,), "float16").dtype == np.float16
    for call in (lambda: numpy.zeros((2,), "bfloat16"), lambda: numpy.astype(np.ones(2), "bfloat16")):
        with pytest.raises(
            ImportError, match="bfloat16 on NumPy needs the package ml_dtypes: pip install ml_dtypes"
        ):
            call()


def test_backend_of():
    assert backend_of(np.ones(1)).name == "numpy"
    assert backend_of(torch.ones(1)).name == "torch"
    assert isinstance(backend_of(torch.nn.Parameter(torch.ones(1))), TorchBackend)
    for other in ([1.0], 1.0, None):
        with pytest.raises(TypeError, match=f"NumPy array or a torch tensor, got {type(other).__name__}"):
            backend_of(other)


DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_dtypes_go_round(backend, dtype):
    """zeros, astype, dtype_name and to_numpy agree on every float dtype, and rounding is NumPy's on both
    backends.
    """
    x = np.linspace(-3, 3, 50)
    stored = backend.astype(backend.asarray(x), dtype)
    assert backend.dtype_name(stored) == backend.dtype_name(backend.zeros((1,), dtype)) == dtype
    assert backend.dtype_name(backend.empty((1,), dtype)) == dtype
    out = backend.to_numpy(stored)
    assert isinstance(out, np.ndarray)
    assert out.dtype == DTYPES[dtype]
    assert np.array_equal(out, x.astype(DTYPES[dtype]))
    check_float("x", stored, backend)


def test_check_float(backend):
    ours, theirs = (np.ones(2), torch.ones(2)) if backend.name == "numpy" else (torch.ones(2), np.ones(2))
    check_float("x", ours, backend)
    for bad, says in ((theirs, "got a"), ([1.0], "got a builtins list"), (None, "NoneType")):
        with pytest.raises(TypeError, match=rf"x must be a {backend.name} array.*{says}"):
            check_float("x", bad, backend)
    with pytest.raises(
        TypeError, match="x must have a dtype of float64, float32, float16, bfloat16, got int32"
    ):
        check_float("x", backend.astype(ours, "int32"), backend)


def test_take(backend):
    x = np.arange(24.0).reshape(6, 2, 2)
    rows = np.array([[5, 0, 0], [3, 3, 1]])
    out = backend.empty((2, 3, 2, 2), "float64")
    answer = backend.take(backend.asarray(x), rows, out=out)
    assert np.array_equal(backend.to_numpy(answer), x[rows])
    assert np.array_equal(backend.to_numpy(out), x[rows])


def test_exp_in_place(backend):
    x = backend.asarray(np.array([0.0, 1.0, -np.inf]))
    assert backend.exp_(x) is x
    assert np.allclose(backend.to_numpy(x), [1, np.e, 0], rtol=1e-15)


def test_a_tensor_leaves_its_graph_behind():
    torch_backend = get_backend("torch")
    x = torch.ones(3, requires_grad=True)
    assert not torch_backend.detach(x * 2).requires_grad
    assert np.array_equal(torch_backend.to_numpy(x), np.ones(3))


def test_storage_made_in_inference_mode_can_be_written_outside():
    with torch.inference_mode():
        x = get_backend("torch").zeros((3,), "float32")
    x[0] = 1.0
    assert x.tolist() == [1, 0, 0]


@pytest.mark.parametrize("count", [1, 2])
def test_map_keeps_the_order_and_the_error(backend, count, monkeypatch):
    monkeypatch.setattr(threads, "num_threads", lambda: count)
    assert backend.map(lambda x: x * x, range(50)) == [x * x for x in range(50)]
    assert backend.map(lambda x: x, iter([])) == []
    with pytest.raises(ZeroDivisionError):
        backend.map(lambda x: 1 // x, [1, 0, 1])


def test_map_uses_threads_when_there_are_some(monkeypatch):
    monkeypatch.setattr(threads, "num_threads", lambda: 2)
    monkeypatch.setattr(threads, "_thread_pool", threads._thread_pool.__wrapped__)  # a pool of our own
    both = threading.Barrier(2, timeout=30)  # passes only if two threads wait at once
    assert get_backend("numpy").map(lambda x: (both.wait(), x)[1], [1, 2]) == [1, 2]


def test_number_of_threads(monkeypatch):
    count = threads.num_threads.__wrapped__
    for value, expected in (("3", 3), ("1", 1), ("0", 1), ("-2", 1)):
        monkeypatch.setenv("KVLIB_NUM_THREADS", value)
        assert count() == expected
    monkeypatch.delenv("KVLIB_NUM_THREADS")
    assert count() >= 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_starts_threads_of_its_own():
    """Its parent's are not there: work handed to them would wait for ever."""
    code = """
import os, signal, threading
from kvlib.arrays import numpy_backend
def two_at_once():
    both = threading.Barrier(2, timeout=30)
    return numpy_backend.map(lambda x: (both.wait(), x)[1], [1, 2])
assert two_at_once() == [1, 2]
child = os.fork()
if child == 0:
    signal.alarm(60)
    try:
        os._exit(0 if two_at_once() == [1, 2] else 1)
    finally:
        os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {**os.environ, "KVLIB_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    assert done.stdout.strip() == b"0"


def test_float16_becomes_float32_bit_for_bit():
    """All 65,536 of them; and with infinity or NaN among them, where another way is taken."""
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    widen = get_backend("numpy").astype
    finite = numbers[np.isfinite(numbers)]
    assert np.array_equal(widen(finite, "float32").view(np.uint32), finite.astype(np.float32).view(np.uint32))
    for number in numbers[~np.isfinite(numbers)][::100]:
        mixed = np.array([1, number, -2], np.float16)
        assert np.array_equal(widen(mixed, "float32"), mixed.astype(np.float32), equal_nan=True)
    strided = numbers.reshape(256, 256)[10:20:3, ::-2]
    assert np.array_equal(widen(strided, "float32"), strided.astype(np.float32), equal_nan=True)
    assert widen(np.empty((0, 3), np.float16), "float32").shape == (0, 3)
