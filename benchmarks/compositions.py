"""What codec and eviction cost together: ``python benchmarks/compositions.py``.

Every codec of the list with every policy of the list, through the bundled model, on the same text and questions; the
block size is left out, for it changes no answer. Controls take apart what KIVI's groups and its tail do to a policy
that goes by attention. Writes benchmarks/results/compositions.json. Budgets are in tokens, as a server would set them,
and not shares as in quality.py: a question whose prompt fits loses nothing.
"""

import argparse
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: compositions run side by side, a process each

import itertools
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from quality import CHUNK, WINDOW, questions, text
from recording import print_table, save

import kvlib
from kvlib import evaluate
from kvlib.codecs import KIVI, Int, Plain, Split
from kvlib.eviction import HeavyHitter, SlidingWindow


class InGroups(Plain):
    """A control: numbers as they are, but 32 tokens come and go together, as KIVI's do."""

    __slots__ = ()
    group = 32


EXACT, GROUPED = Plain("float16"), InGroups("float16")
CODECS = {
    "fp16": EXACT,
    "int8": Int(8),
    "int4": Int(4, group_size=32),
    "KIVI-4": KIVI(4),
    "KIVI-2": KIVI(2),
    "int2": Int(2, group_size=32),
}
CONTROLS = {
    "fp16, last 128 apart": Split(EXACT, EXACT, 128),
    "fp16, groups of 32": Split(GROUPED, GROUPED),
    "fp16, groups of 32, last 128 apart": Split(GROUPED, GROUPED, 128),
}
POLICIES = {
    "all": None,
    "window 512": SlidingWindow(512),
    "window 256": SlidingWindow(256),
    "H2O 512": HeavyHitter(512),
    "H2O 256": HeavyHitter(256),
}


@cache
def model() -> kvlib.Transformer:
    return kvlib.tinylm()


def measure(codec: str, policy: str, windows: int, each: int) -> dict[str, Any]:
    settings = {"codec": (CODECS | CONTROLS)[codec], "eviction": POLICIES[policy]}
    return {
        "codec": codec,
        "policy": policy,
        "text": evaluate.text_bits(model(), text(windows), CHUNK, **settings).mean(axis=1).tolist(),
        "recall": evaluate.recall(model(), questions(each), **settings).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--each", type=int, default=20, help="questions of each distance")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    grid = [
        *itertools.product(CODECS, POLICIES),
        *itertools.product(CONTROLS, (policy for policy in POLICIES if policy.startswith("H2O"))),
    ]
    sizes = [options.windows] * len(grid), [options.each] * len(grid)
    rows = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for row in pool.map(measure, *zip(*grid, strict=True), *sizes):
            rows.append(row)
            print(f"\r{len(rows)} of {len(grid)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    exact = np.array(rows[0]["text"])
    print_table(
        ["codec", "policy", "bits/byte more", "±", "recall"],
        [
            [
                row["codec"],
                row["policy"],
                f"{np.mean(more := np.array(row['text']) - exact):+.4f}",
                f"{more.std(ddof=1) / np.sqrt(len(more)):.4f}",
                f"{100 * np.mean(row['recall']):.0f} %",
            ]
            for row in rows
        ],
    )
    distances = [question.distance for question in questions(options.each)]
    settings = {"windows": options.windows, "bytes_per_window": WINDOW, "chunk": CHUNK, "distances": distances}
    path = save("compositions.json", {"settings": settings, "rows": rows})
    print(f"wrote {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
