"""Ratios of the cache on this machine's CPU, each measured side by side in one run: ``python benchmarks/cpu.py``.

Absolute times depend on the machine and on what else it does. So every figure is a ratio of two medians whose
samples were taken in turn, and the table says which ratio the project promises. Writes benchmarks/results/cpu.json
with machine and versions.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from recording import save

import kvlib

HEADS, KV_HEADS, WIDTH = 8, 2, 128  # grouped-query attention 8:2
SHORT, MIDDLE, LONG = 1024, 16384, 32768


def interleave(runs: dict[str, Callable[[], Any]], rounds: int, calls: int = 1) -> dict[str, float]:
    """Median seconds per call of every run; the runs take turns, so that a slow moment of the machine hits them all.

    Before each sample the run is called once for nothing: the threads of the library that ran before it have to go to
    sleep, and its own to wake up. A decode loop does not pay that, for there one step follows the other.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 2):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            if round_number >= 2:  # the first two warm up
                samples[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(times) for name, times in samples.items()}


def rows(tokens: int, heads: int = KV_HEADS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, heads, tokens, WIDTH), dtype=np.float32)


def filled(tokens: int, room: int = 0, shuffle: bool = False, **options: Any) -> kvlib.KVCache:
    """A cache holding ``tokens`` tokens. ``shuffle`` hands blocks out in random order, as after hours of serving."""
    spec = kvlib.CacheSpec(num_kv_heads=KV_HEADS, head_dim=WIDTH, dtype="float32")
    cache = kvlib.KVCache(spec, max_tokens=tokens + room, **options)
    if shuffle:
        free = cache._tables.pool._free
        free[:] = np.random.default_rng(0).permutation(free)
    cache.append(rows(tokens), rows(tokens, seed=1))
    return cache


class Concatenating:
    """What a first cache looks like: every token makes a new array, one longer than the last."""

    def __init__(self, tokens: int) -> None:
        self.k, self.v = rows(tokens), rows(tokens, seed=1)

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        self.k = np.concatenate([self.k, k], axis=2)
        self.v = np.concatenate([self.v, v], axis=2)


def measure_append(rounds: int) -> list[tuple]:
    """One token into a cache that holds few or many; and into caches that copy."""
    import torch
    from transformers import DynamicCache

    calls = 20
    k, v = rows(1), rows(1, seed=1)
    torch_k, torch_v = torch.from_numpy(k), torch.from_numpy(v)
    room = (rounds + 2) * (calls + 1)
    cases = [(name, n) for name in ("contiguous", "paged") for n in (SHORT, LONG)]
    caches = {(name, n): filled(n, room, **kvlib.CATALOGUE[name]) for name, n in cases}
    runs = {key: (lambda cache=cache: cache.append(k, v)) for key, cache in caches.items()}
    ours = interleave(runs, rounds, calls)

    dynamic = DynamicCache()
    dynamic.update(torch.from_numpy(rows(LONG)), torch.from_numpy(rows(LONG, seed=1)), 0)
    concatenating, contiguous = Concatenating(LONG), filled(LONG, room, block_size=None)
    copying = interleave(
        {
            "contiguous": lambda: contiguous.append(k, v),
            "concatenate": lambda: concatenating.append(k, v),
            "DynamicCache": lambda: dynamic.update(torch_k, torch_v, 0),
        },
        rounds,
    )
    growth = [
        (f"append 1 token, {name}: at {LONG:,} / at {SHORT:,}", ours[name, LONG] / ours[name, SHORT], "<= 1.3")
        for name in ("contiguous", "paged")
    ]
    ratio = {name: copying[name] / copying["contiguous"] for name in ("concatenate", "DynamicCache")}
    return [
        *growth,
        (f"append 1 token at {LONG:,}: np.concatenate / kvlib", ratio["concatenate"], ">= 20"),
        (f"append 1 token at {LONG:,}: DynamicCache / kvlib", ratio["DynamicCache"], ""),
    ]


def measure_decode(rounds: int) -> list[tuple]:
    """One decode step over 32K tokens, against reading as many bytes, and against torch SDPA on the same shapes."""
    import torch

    torch.set_num_threads(kvlib.threads.num_threads())
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q = rows(1, HEADS, seed=2)
    contiguous = filled(LONG, block_size=None)
    paged = filled(LONG, shuffle=True, **kvlib.CATALOGUE["paged"])
    k, v, torch_q = (torch.from_numpy(x) for x in (rows(LONG), rows(LONG, seed=1), q))
    grouped_q = torch_q.reshape(1, KV_HEADS, HEADS // KV_HEADS, WIDTH)  # a group's heads as rows: SDPA's best case here
    memory = np.ones(k.nbytes * 2 // 4, np.float32)  # as many bytes as K and V
    halves = np.array_split(memory, kvlib.threads.num_threads())
    threads = kvlib.arrays.numpy_backend
    np.testing.assert_allclose(contiguous.attend(q), sdpa(torch_q, k, v, enable_gqa=True).numpy(), atol=1e-5)
    np.testing.assert_allclose(paged.attend(q), contiguous.attend(q), atol=1e-6)
    times = interleave(
        {
            "read, one thread": memory.max,
            "read, all threads": lambda: threads.map(np.max, halves),
            "contiguous": lambda: contiguous.attend(q),
            "paged": lambda: paged.attend(q),
            "sdpa, grouped": lambda: sdpa(grouped_q, k, v),
            "sdpa, enable_gqa": lambda: sdpa(torch_q, k, v, enable_gqa=True),
        },
        rounds,
    )
    read = min(times["read, one thread"], times["read, all threads"])
    fastest_sdpa = min(times["sdpa, grouped"], times["sdpa, enable_gqa"])
    enable_gqa = times["sdpa, enable_gqa"] / times["contiguous"]
    return [
        (f"decode at {LONG:,}, contiguous: share of the read bandwidth", read / times["contiguous"], ">= 0.70"),
        (f"decode at {LONG:,}, paged (16, shuffled): share of the read bandwidth", read / times["paged"], ">= 0.50"),
        (f"decode at {LONG:,}: torch SDPA (enable_gqa) / contiguous", enable_gqa, ">= 1"),
        (f"decode at {LONG:,}: torch SDPA (heads as rows) / contiguous", fastest_sdpa / times["contiguous"], ">= 1"),
        ("  contiguous: share of what one thread reads", times["read, one thread"] / times["contiguous"], ""),
        ("  paged: share of what one thread reads", times["read, one thread"] / times["paged"], ""),
        ("read bandwidth, GB/s, best of one and all threads (absolute)", memory.nbytes / read / 1e9, ""),
    ]


def measure_codecs(rounds: int) -> list[tuple]:
    """One decode step over 16K tokens through every named codec, against plain float32 in the same cache."""
    promised = {"int8": "<= 2.0", "float16": "<= 2.5", "bfloat16": "<= 2.5", "int4": "<= 3.5"}
    names = ["float32", "float16", "bfloat16", *kvlib.codecs.NAMES]
    q, table = rows(1, HEADS, seed=2), []
    for block_size in (None, 32):  # blocks of 32, for KIVI's groups are 32 tokens
        options = {"shuffle": block_size is not None, "block_size": block_size}
        caches = {name: filled(MIDDLE, codec=name, **options) for name in names}
        times = interleave({name: (lambda cache=cache: cache.attend(q)) for name, cache in caches.items()}, rounds)
        where = "contiguous" if block_size is None else f"paged ({block_size}, shuffled)"
        table += [
            (f"decode at {MIDDLE:,}, {where}: {name} / float32", times[name] / times["float32"], promised.get(name, ""))
            for name in names[1:]
        ]
    return table


def measure_import(rounds: int) -> list[tuple]:
    """A fresh interpreter that imports kvlib, against one that imports NumPy."""
    import subprocess
    import sys

    def fresh(statement: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", statement], check=True)

    times = interleave({"kvlib": fresh("import kvlib"), "numpy": fresh("import numpy"), "none": fresh("")}, rounds)
    ratio = (times["kvlib"] - times["none"]) / (times["numpy"] - times["none"])
    return [("import kvlib / import numpy, start of Python taken off", ratio, "<= 1.5")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31, help="samples per figure (default 31)")
    rounds = parser.parse_args().rounds
    table = [*measure_append(rounds), *measure_decode(rounds), *measure_codecs(rounds), *measure_import(rounds)]
    width = max(len(name) for name, _, _ in table)
    print(f"{'ratio of medians':{width}}  {'measured':>9}  promised")
    for name, value, promise in table:
        print(f"{name:{width}}  {value:9.2f}  {promise}")
    record = {
        "rounds": rounds,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "results": [{"what": name, "measured": round(value, 4), "promised": promise} for name, value, promise in table],
    }
    path = save("cpu.json", record, ("numpy", "torch", "transformers"))
    print(f"wrote {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
