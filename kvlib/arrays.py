"""NumPy or torch behind one namespace: every corner where the two differ lives here.

The rest of kvlib writes array-API code (``xp.exp``, ``x.mT``, ``keepdims=True``) and asks a `Backend` for the few
things that standard leaves out: gathers into a buffer, in-place exponentials, bfloat16, threads.
"""

import contextlib
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from kvlib.spec import FLOAT_BYTES
from kvlib.threads import share_out

Array = Any  # numpy.ndarray or torch.Tensor

_local = threading.local()
SCRATCH_BYTES = 1 << 22  # the largest buffer that a thread keeps: a tile fits, a whole sequence does not


class NumpyBackend:
    """NumPy arrays in host memory. ``xp`` is NumPy itself, which speaks the array API since version 2."""

    name = "numpy"
    device = None
    xp = np
    serial_product = 1 << 18  # multiply-adds up to which OpenBLAS runs a matrix product on the calling thread

    exact = contextlib.nullcontext  # see TorchBackend

    def owns(self, x: object) -> bool:
        return isinstance(x, np.ndarray) and not hasattr(x, "mask")  # a masked array would lose its mask in silence

    def dtype(self, name: str) -> np.dtype:
        if name == "bfloat16":
            try:
                import ml_dtypes
            except ImportError as error:
                raise ImportError("bfloat16 on NumPy needs the package ml_dtypes: pip install ml_dtypes") from error
            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(name)

    def dtype_name(self, x: np.ndarray) -> str:
        return _dtype_name(x.dtype)

    def empty(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.empty(shape, self.dtype(dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.zeros(shape, self.dtype(dtype))

    def asarray(self, x: object) -> np.ndarray:
        return np.asarray(x)

    def detach(self, x: np.ndarray) -> np.ndarray:
        return x

    def astype(self, x: np.ndarray, dtype: str) -> np.ndarray:
        if dtype == "float32" and x.dtype == np.float16:
            return _widen_float16(x)
        return x.astype(self.dtype(dtype), copy=False)

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        return x

    def take(self, x: np.ndarray, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """``x[rows]`` along the first axis, written to ``out``; ``rows`` may have any shape."""
        # mode="clip" because "raise" makes NumPy fill a copy of `out` first; block ids are valid by construction
        return np.take(x, rows, axis=0, mode="clip", out=out)

    def scratch(self, key: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """An uninitialised array, good until this thread next asks for the same ``key``.

        A decode step gathers megabytes into it: fresh pages from the operating system would cost as much as the gather.
        """
        buffers = _local.__dict__.setdefault("buffers", {})
        size = math.prod(shape) * self.dtype(dtype).itemsize
        if size > SCRATCH_BYTES:
            return self.empty(shape, dtype)
        if key not in buffers or buffers[key].nbytes < size:
            buffers[key] = np.empty(size, np.uint8)
        return buffers[key][:size].view(self.dtype(dtype)).reshape(shape)

    def exp_(self, x: np.ndarray) -> np.ndarray:
        return np.exp(x, out=x)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Apply ``function`` to every item, on as many threads as there are cores: NumPy releases the interpreter."""
        return share_out(function, items)


class TorchBackend:
    """torch tensors on one device. torch runs its own threads, so ``map`` is a plain loop."""

    name = "torch"
    serial_product = 0  # whatever the size, torch decides how many threads it takes

    def __init__(self, device: str | None = None) -> None:
        try:
            import array_api_compat.torch as xp
            import torch
        except ImportError as error:
            raise ImportError("backend='torch' needs torch and array-api-compat: pip install 'kvlib[torch]'") from error
        self.torch, self.xp = torch, xp
        try:
            kind = torch.device(device or "cpu").type
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be one that torch knows, 'cpu' or 'cuda', got {device!r}") from error
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={device!r} was asked for, but torch sees no CUDA device; use device='cpu'")
        self.device = torch.empty(0, device=device or "cpu").device  # "cuda" becomes "cuda:0", "cpu:0" becomes "cpu"

    def __reduce__(self) -> tuple:
        return TorchBackend, (str(self.device),)  # copied and pickled by name: modules cannot be

    def owns(self, x: object) -> bool:
        return isinstance(x, self.torch.Tensor) and x.device == self.device and x.layout is self.torch.strided

    def exact(self) -> Any:
        """A context in which products keep the dtype of their arguments, even inside the caller's `torch.autocast`."""
        return self.torch.autocast(self.device.type, enabled=False)

    def dtype(self, name: str) -> Any:
        return getattr(self.torch, name)

    def dtype_name(self, x: Array) -> str:
        return str(x.dtype).removeprefix("torch.")

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        return self.torch.empty(shape, dtype=self.dtype(dtype), device=self.device)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        # a tensor born in inference mode can only be written in inference mode, and a cache outlives its caller's
        with self.torch.inference_mode(False):
            return self.torch.zeros(shape, dtype=self.dtype(dtype), device=self.device)

    def asarray(self, x: object) -> Array:
        return self.torch.as_tensor(x, device=self.device)

    def detach(self, x: Array) -> Array:
        """``x`` without its autograd history: a cache is not trained through."""
        return x.detach()

    def astype(self, x: Array, dtype: str) -> Array:
        return x.to(self.dtype(dtype))

    def to_numpy(self, x: Array) -> np.ndarray:
        x = x.detach().cpu()
        if x.dtype == self.torch.bfloat16:  # NumPy has no bfloat16 of its own: hand the bits over
            return x.view(self.torch.uint16).numpy().view(numpy_backend.dtype("bfloat16"))
        return x.numpy()

    def take(self, x: Array, rows: np.ndarray, out: Array) -> Array:
        """``x[rows]`` along the first axis, written to ``out``; ``rows`` is a NumPy array of any shape."""
        self.torch.index_select(x, 0, self.asarray(rows.reshape(-1)), out=out.view(-1, *x.shape[1:]))
        return out

    def scratch(self, key: Any, shape: tuple[int, ...], dtype: str) -> Array:
        """An uninitialised tensor; torch's own allocator does the reusing."""
        return self.empty(shape, dtype)

    def exp_(self, x: Array) -> Array:
        return x.exp_()

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return [function(item) for item in items]


Backend = NumpyBackend | TorchBackend
numpy_backend = NumpyBackend()


def get_backend(name: str, device: str | None = None) -> Backend:
    """The backend called ``name`` ("numpy" or "torch") on ``device`` (torch only; None is the CPU).

    Raises:
        ValueError: an unknown name, a device for NumPy, or a CUDA device that is not there.
        ImportError: torch is asked for and not installed.
    """
    if name == "numpy":
        if device not in (None, "cpu"):
            raise ValueError(f"backend='numpy' lives on the CPU, got device={device!r}; use backend='torch'")
        return numpy_backend
    if name == "torch":
        return TorchBackend(device)
    raise ValueError(f"backend must be 'numpy' or 'torch', got {name!r}")


def backend_of(x: Array) -> Backend:
    """The backend that ``x`` belongs to; raises TypeError for anything but a NumPy array or a torch tensor."""
    if isinstance(x, np.ndarray):
        return numpy_backend
    torch = sys.modules.get("torch")  # where nobody has imported it, nothing is a tensor
    if torch is not None and isinstance(x, torch.Tensor):
        return _torch_backend(str(x.device))
    raise TypeError(f"expected a NumPy array or a torch tensor, got {type(x).__name__}")


def check_float(name: str, x: Array, backend: Backend) -> None:
    """Raise TypeError unless ``x`` is a floating-point array of ``backend``; the message says what came instead."""
    if not backend.owns(x):
        where = f"{backend.name} array" + (f" on {backend.device}, torch.strided" if backend.device else "")
        came = f"{type(x).__module__.partition('.')[0]} {type(x).__name__}"
        if getattr(x, "device", None) is not None and not isinstance(x, np.ndarray):
            came += f" on {x.device}, {getattr(x, 'layout', 'dense')}"
        raise TypeError(f"{name} must be a {where}, got a {came}; convert it or build the cache for that backend")
    if backend.dtype_name(x) not in FLOAT_BYTES:
        raise TypeError(f"{name} must have a dtype of {', '.join(FLOAT_BYTES)}, got {backend.dtype_name(x)}")


def _widen_float16(x: np.ndarray) -> np.ndarray:
    """``x.astype(float32)``, some five times faster: the bits move to where float32 has them, all numbers at once.

    That leaves the exponent 112 too small, which one multiplication mends, subnormal numbers included. Infinity and NaN
    come out as finite numbers beyond float16's largest; where one is seen, NumPy's own conversion takes over.
    """
    bits = np.empty(x.shape, np.int32)
    bits[...] = x.view(np.int16)  # the sign fills the upper half
    bits <<= 13
    bits &= 0x0FFFFFFF - 2**31  # of the copies of the sign bit only the first stays
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    beyond = wide.size and max(wide.max(), -wide.min()) >= 2.0**16
    return x.astype(np.float32) if beyond else wide


@functools.cache
def _dtype_name(dtype: np.dtype) -> str:
    return dtype.name  # NumPy composes the name anew at every call, which a decode step would notice


@functools.cache
def _torch_backend(device: str) -> TorchBackend:
    return TorchBackend(device)
