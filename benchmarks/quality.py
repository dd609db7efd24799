"""What every codec and every eviction budget costs the bundled model: ``python benchmarks/quality.py``.

Prints two tables and writes benchmarks/results/quality.json; benchmarks/README.md says how to read them. Text and
questions are the model's frozen ones, and everything is seeded: another run gives the same figures.
"""

import argparse
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: rows of the tables run side by side, a process each

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from candidates import CODECS, EVICTIONS, Told
from recording import print_table, save

import kvlib
from kvlib import evaluate
from kvlib.codecs import Split
from kvlib.footprint import footprint

WINDOW, PROMPT, CONTINUATION = 1024, 896, 128  # bytes
CHUNK = 16  # bytes read at once, which changes nothing where nothing is evicted
BASELINE = "float32"
SHARES = (1.0, 0.5, 0.2, 0.1)


class Sizes(NamedTuple):
    """How much is read: windows of text, and questions of each distance."""

    windows: int
    questions: int


@cache
def model() -> kvlib.Transformer:
    return kvlib.tinylm()


@cache
def recorded() -> list[evaluate.Heads]:
    return evaluate.record(model(), text(2))


def text(count: int) -> np.ndarray:
    """``count`` windows, evenly spread over the held-out text."""
    windows = evaluate.windows(evaluate.heldout_text(), WINDOW)
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)]


def questions(each: int) -> list[evaluate.Question]:
    """``each`` questions of every distance, evenly spread over those that there are."""
    everything = evaluate.recall_questions()
    chosen = []
    for distance in sorted({question.distance for question in everything}):
        these = [question for question in everything if question.distance == distance]
        chosen += [these[i] for i in np.linspace(0, len(these) - 1, min(each, len(these))).round().astype(int)]
    return chosen


# -- one row -----------------------------------------------------------------------------------------------------------


def measure_codec(name: str, sizes: Sizes) -> dict[str, Any]:
    codec = CODECS[name]
    heads = recorded()
    k, v = (
        np.mean([evaluate.rounding_error(side, getattr(layer, which)) for layer in heads])
        for which, side in (("k", codec.k), ("v", codec.v))
    )
    return {
        "bits_counted": counted_bits(codec),
        "bits_32k_128": footprint(kvlib.CacheSpec(8, 128), 32768, codec=codec).bits,
        "text": evaluate.text_bits(model(), text(sizes.windows), CHUNK, codec=codec).mean(axis=1),
        "recall": evaluate.recall(model(), questions(sizes.questions), codec=codec),
        "k_error": k,
        "v_error": v,
        "output_error": np.mean([evaluate.output_error(layer, CHUNK, codec=codec) for layer in heads]),
    }


def counted_bits(codec: Split) -> float:
    """Bits per element that the arrays of a cache with one window of tokens hold for them, scales and tail included.

    That is every plane's share of taken slots, and the tail's rows that wait. `footprint` says it by arithmetic.
    """
    spec = replace(model().spec, dtype="float16")
    one = kvlib.KVCache(spec, max_tokens=WINDOW, block_size=32, codec=codec)
    layers = [[x[:1] for x in layer] for layer in recorded()]
    for layer, (_, k, v) in enumerate(layers):
        for here in (np.s_[:, :, :-1], np.s_[:, :, -1:]):  # alone, the last lets go of exact rows
            one.append(k[here], v[here], layer=layer)
    (table,) = one._tables.open_tables.values()
    taken = table.stored.mean() / (one.num_blocks * one.block_size)
    held = taken * sum(array.nbytes for array in one._storage.arrays())
    if table.tail:
        held += table.waiting.mean() / codec.tail * sum(array.nbytes for array in table.tail.arrays())
    bits = 8 * held / (WINDOW * spec.num_layers * spec.num_kv_heads * 2 * spec.head_dim)
    expected = footprint(spec, WINDOW, block_size=32, codec=codec).bits
    if abs(bits - expected) > 1e-9:
        raise AssertionError(f"{codec.name}: {bits} bits in the arrays, {expected} by arithmetic")
    return bits


def measure_eviction(name: str, share: float, sizes: Sizes) -> dict[str, Any]:
    policy, ids, heads = EVICTIONS[name], text(sizes.windows), recorded()
    told = policy is Told
    # SnapKV acts once, behind a prompt; whoever is told the answer has none in a text
    streams = not told and not getattr(policy(WINDOW), "once", False)
    streamed, prompted = {"eviction": policy(budget(share, WINDOW))}, {"eviction": policy(budget(share, PROMPT))}
    row: dict[str, Any] = dict.fromkeys(("text", "continuation", "output_error"))
    if streams:
        row["text"] = evaluate.text_bits(model(), ids, 4, **streamed).mean(axis=1)
        row["output_error"] = np.mean([evaluate.output_error(layer, 4, **streamed) for layer in heads])
    if not told:
        short = ids[:, : PROMPT + CONTINUATION]
        row["continuation"] = evaluate.text_bits(model(), short, 4, PROMPT, **prompted).mean(axis=1)
    for column, apart in (("recall", False), ("recall_apart", True)):
        row[column] = np.array([answers(policy, share, question, apart) for question in questions(sizes.questions)])
    return row


def answers(policy: Callable, share: float, question: evaluate.Question, apart: bool) -> bool:
    kept = budget(share, len(question.prompt))
    eviction = policy.about(question, kept) if policy is Told else policy(kept)
    return bool(evaluate.recall(model(), [question], apart=apart, eviction=eviction)[0])


def budget(share: float, tokens: int) -> int:
    return max(2, round(share * tokens))


def run(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return {column: x.tolist() if isinstance(x, np.ndarray | np.generic) else x for column, x in job().items()}


# -- tables ------------------------------------------------------------------------------------------------------------


def mean(values: list[float] | None, digits: int, percent: bool = False) -> str | None:
    return None if values is None else f"{np.mean(values) * (100 if percent else 1):.{digits}f}"


def cost(values: list[float] | None, exact: list[float]) -> str | None:
    """How many bits more than exact, with the standard error over windows."""
    if values is None:
        return None
    more = np.subtract(values, exact)
    return f"{more.mean():+.4f} ± {more.std(ddof=1) / np.sqrt(len(more)) if len(more) > 1 else 0:.4f}"


def percent(error: float | None) -> str | None:
    return None if error is None else f"{100 * error:.2f}"


def print_codecs(rows: dict[str, dict[str, Any]]) -> None:
    exact = rows[BASELINE]["text"]
    header = ["codec (K and V)", "bits: here", "32K, 128", "bits/byte", "more than float32", "recall %"]
    print_table(
        [*header, "K error %", "V error %", "output %"],
        [
            [name, f"{row['bits_counted']:.2f}", f"{row['bits_32k_128']:.2f}", mean(row["text"], 4)]
            + [cost(row["text"], exact), mean(row["recall"], 1, percent=True)]
            + [percent(row[column]) for column in ("k_error", "v_error", "output_error")]
            for name, row in rows.items()
        ],
    )


def print_evictions(rows: list[dict[str, Any]], distances: list[int]) -> None:
    exact = next(row for row in rows if row["policy"] == "all")
    header = ["policy", "budget %", "bits/byte, streamed", "output %", "continuation", "recall %", "asked later %"]
    table = []
    for row in rows:
        line = [row["policy"], f"{100 * row['share']:.0f}", cost(row["text"], exact["text"])]
        line += [percent(row["output_error"]), cost(row["continuation"], exact["continuation"])]
        line += [mean(row[column], 1, percent=True) for column in ("recall", "recall_apart")]
        hits = np.array(row["recall_apart"])
        by_distance = [100 * hits[np.equal(distances, distance)].mean() for distance in sorted(set(distances))]
        table.append([*line, " ".join(f"{hit:3.0f}" for hit in by_distance)])
    print_table([*header, "by distance"], table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=16, help="windows of 1,024 bytes (default 16; there are 31)")
    parser.add_argument("--questions", type=int, default=20, help="of each of 5 distances (default 20; there are 40)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    options = parser.parse_args()
    sizes = Sizes(options.windows, options.questions)
    grid = [("all", 1.0), *((name, share) for name in EVICTIONS if name != "all" for share in SHARES)]
    jobs = [partial(measure_codec, name, sizes) for name in CODECS]
    jobs += [partial(measure_eviction, name, share, sizes) for name, share in grid]
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = []
        for row in pool.map(run, jobs):
            rows.append(row)
            print(f"\rrow {len(rows)} of {len(jobs)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    codecs = dict(zip(CODECS, rows, strict=False))
    evictions = [
        {"policy": name, "share": share, **row} for (name, share), row in zip(grid, rows[len(CODECS) :], strict=True)
    ]
    distances = [question.distance for question in questions(sizes.questions)]
    print(f"{len(text(sizes.windows))} windows of {WINDOW} bytes, {len(distances)} questions\n")
    print_codecs(codecs)
    print()
    print_evictions(evictions, distances)
    settings = {"windows": len(text(sizes.windows)), "bytes_per_window": WINDOW, "distances": distances}
    settings |= {"prompt": PROMPT, "continuation": CONTINUATION}
    path = save("quality.json", {"settings": settings, "codecs": codecs, "evictions": evictions})
    print(f"wrote {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
