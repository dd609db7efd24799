"""Devices: the memory hierarchy of a GPU as numbers, and of this machine's CPU as measured."""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import NamedTuple

import numpy as np

from kvlib.threads import num_threads, share_out

KIB, MIB, GB = 2**10, 2**20, 1e9


class Level(NamedTuple):
    """One level of a memory hierarchy, over the whole device.

    ``bytes``: its size; ``bandwidth``: bytes per second that can be read from it, None where nobody has published it.
    ``basis``: where the bandwidth comes from ("published", "derived: …", "measured").
    """

    name: str
    bytes: float
    bandwidth: float | None
    basis: str = "published"


@dataclass(frozen=True, slots=True)
class Device:
    """What a roofline needs to know about a device.

    Attributes:
        levels: its memories, from the largest to the fastest.
        peaks: floating-point operations per second of dense matrix products, by the dtype of their operands.
        source: where the figures were published.
    """

    name: str
    levels: tuple[Level, ...]
    peaks: dict[str, float] = field(hash=False)
    source: str = ""

    @property
    def memory(self) -> Level:
        """Where weights and cache live."""
        return self.levels[0]

    def peak(self, dtype: str) -> float:
        """FLOP per second with operands of ``dtype``; ValueError if nobody has published it."""
        if dtype not in self.peaks:
            raise ValueError(f"{self.name} has no rate for {dtype!r}; there are: {', '.join(self.peaks)}")
        return self.peaks[dtype]

    def ridge(self, dtype: str = "bfloat16") -> float:
        """FLOP per byte of memory at which arithmetic takes as long as reading: below it, a kernel waits for memory."""
        return self.peak(dtype) / self.memory.bandwidth


@functools.cache
def devices() -> dict[str, Device]:
    """The devices that kvlib knows, by name: A100, H100, H200, B200, RTX 4090, MI300X."""
    entries = json.loads(resources.files("kvlib").joinpath("data/devices.json").read_text(encoding="utf-8"))
    return {name: _read(name, entry) for name, entry in entries.items()}


def _read(name: str, entry: dict) -> Device:
    processors, clock = entry["processors"], entry["clock_ghz"] * 1e9
    every_clock = processors * clock
    levels = [Level(entry["memory"], entry["memory_gb"] * GB, entry["memory_gbs"] * GB)]
    if "last_level_mib" in entry:
        levels.append(Level("last-level cache", entry["last_level_mib"] * MIB, entry["last_level_gbs"] * GB))
    wide = entry["l2_bytes_per_clock"]
    l2 = (wide * clock, f"derived: {wide:,} bytes per clock") if wide else (None, "not published")
    levels += [
        Level("L2", entry["l2_mib"] * MIB, *l2),
        Level(
            "shared memory",
            processors * entry["shared_kib"] * KIB,
            every_clock * 128,
            "derived: 128 bytes per clock and processor",
        ),
        Level(
            "registers",
            processors * entry["registers_kib"] * KIB,
            every_clock * entry["lanes"] * 12,
            "derived: three operands of 4 bytes per clock and lane",
        ),
    ]
    peaks = {dtype: tera * 1e12 for dtype, tera in entry["tflops"].items()}
    return Device(name, tuple(levels), peaks, entry["source"])


def find_device(device: str | Device) -> Device:
    """A `Device` by name (case and spaces do not matter); ValueError lists the known ones."""
    if isinstance(device, Device):
        return device
    known = {name.lower().replace(" ", ""): found for name, found in devices().items()}
    wanted = str(device).lower().replace(" ", "")
    if wanted not in known:
        raise ValueError(f"no device is called {device!r}; known: {', '.join(devices())}, or measure_cpu()")
    return known[wanted]


def measure_cpu(megabytes: int = 256, size: int = 1024, rounds: int = 5) -> Device:
    """This machine's CPU: reading ``megabytes`` of float32, and products of (size, size) matrices, the best of a few.

    Both on as many threads as `kvlib.threads` uses. Takes about a second. The numbers are this moment's: other
    programs on the machine lower them.
    """
    memory = np.ones(megabytes * 250_000, np.float32)
    pieces = np.array_split(memory, 4 * num_threads())
    a, b = np.random.default_rng(0).random((2, size, size), dtype=np.float32)
    reading = _best(lambda: share_out(np.max, pieces), rounds)
    multiplying = _best(lambda: a @ b, rounds)
    level = Level("memory", float("inf"), memory.nbytes / reading, "measured")
    return Device("this CPU", (level,), {"float32": 2 * size**3 / multiplying}, "measured by kvlib.devices.measure_cpu")


def _best(run: Callable[[], object], rounds: int) -> float:
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
