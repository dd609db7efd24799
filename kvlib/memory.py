"""What a computation allocates at its worst moment, measured.

>>> import numpy as np
>>> from kvlib.memory import measure
>>> round(measure(lambda: np.ones(250_000).sum()).nbytes / 1e6)
2
"""

import threading
import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple


class Measured(NamedTuple):
    """What a function returned, and the most bytes that were allocated while it ran, beyond those before it."""

    result: Any
    nbytes: int


def measure(function: Callable[[], Any], device: Any = None) -> Measured:
    """Run ``function`` and measure: on NumPy (device None) with tracemalloc, on CUDA with the counters of torch.

    NumPy's run has a thread of its own: the scratch memory that kvlib keeps for a thread is counted with it. On CUDA
    the first matrix product of a process allocates a workspace; run it once before.

    Raises ValueError: torch on the CPU, whose memory nobody counts. Otherwise what ``function`` raises.
    """
    if device is not None:
        return _measure_cuda(function, device)
    found: list[Any] = []

    def work() -> None:
        try:
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            result = function()
            found.extend([result, tracemalloc.get_traced_memory()[1] - before])
        except BaseException as error:
            found.append(error)

    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        if ours:
            tracemalloc.stop()
    if isinstance(found[0], BaseException):
        raise found[0]
    return Measured(*found)


def _measure_cuda(function: Callable[[], Any], device: Any) -> Measured:
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"torch counts the memory of CUDA devices, not of {device}; use the NumPy backend")
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = function()
    torch.cuda.synchronize(device)
    return Measured(result, torch.cuda.max_memory_allocated(device) - before)
