"""Traffic: which bytes a kernel asks memory for, counted while Triton's interpreter runs it.

>>> with counted() as traffic:                     # doctest: +SKIP
...     kernel[grid](keys, out, ...)
>>> traffic.lanes, traffic.distinct(keys)          # doctest: +SKIP

What lanes ask for may be more than what memory has to send: several lanes may want the same byte, which the caches of
a GPU answer. What is counted as distinct is what memory must send at least once.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from kvlib.kernels import interpreted


class Traffic:
    """Loads so far. ``lanes``: bytes that all lanes asked for together; masked ones ask for nothing."""

    def __init__(self) -> None:
        self.lanes = 0
        self._asked: dict[int, list[np.ndarray]] = {}  # addresses, by the size of what was loaded

    def add(self, addresses: np.ndarray, size: int) -> None:
        self.lanes += addresses.size * size
        self._asked.setdefault(size, []).append(np.unique(addresses))

    def distinct(self, tensor: torch.Tensor) -> int:
        """Bytes of ``tensor`` that were asked for at least once."""
        first = tensor.data_ptr()
        inside = np.zeros(tensor.nbytes, bool)
        for size, asked in self._asked.items():
            starts = np.concatenate(asked).astype(np.int64) - first
            starts = starts[(starts >= 0) & (starts < tensor.nbytes)]
            inside[(starts[:, None] + np.arange(size)).ravel()] = True
        return int(inside.sum())


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count the loads of every kernel inside. Raises RuntimeError unless Triton's interpreter is at work."""
    if not interpreted():
        raise RuntimeError(
            "loads are counted in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
        )
    from triton.runtime.interpreter import interpreter_builder as builder

    traffic, load = Traffic(), builder.create_masked_load

    def noted(pointers, mask, *rest):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        traffic.add(pointers.data[mask.data.astype(bool)].ravel(), size)
        return load(pointers, mask, *rest)

    builder.create_masked_load = noted
    try:
        yield traffic
    finally:
        builder.create_masked_load = load
