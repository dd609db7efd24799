"""Why the tables of quality.py look as they do: what the bundled model's keys, values and attention are like.

``python benchmarks/structure.py`` prints it and writes benchmarks/results/structure.json.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import Any

import numpy as np
from recording import print_table, save

import kvlib
from kvlib import evaluate
from kvlib.codecs import KIVI, Int, Plain, Split
from kvlib.eviction import HeavyHitter, SlidingWindow

FIRST_QUERY = 256  # earlier queries have little to choose from


def spread(x: np.ndarray, axis: int) -> float:
    """How far the largest magnitude stands out: over channels (-1) or tokens (-2), against the median one."""
    other = -3 - axis
    largest = np.abs(x).max(axis=other)
    return float((largest.max(axis=-1) / np.median(largest, axis=-1)).mean())


def step(x: np.ndarray, axis: str, size: int = 32) -> float:
    """Root mean square range of the groups that share a scale, relative to that of the numbers.

    The error of an integer codec is in proportion to it.
    """
    batch, heads, tokens, width = x.shape
    if axis == "channel":
        groups = x.reshape(batch, heads, tokens // size, size, width).swapaxes(-1, -2)
    else:
        groups = x.reshape(batch, heads, tokens, width // size, size)
    ranges = groups.max(axis=-1) - groups.min(axis=-1)
    return float(np.sqrt(np.mean(np.square(ranges)) / np.mean(np.square(x))))


def weights(heads: evaluate.Heads, first: int) -> np.ndarray:
    """Attention weights (Hq, T - first, T) of the queries from ``first`` on, of the first sequence."""
    q, k = heads.q[0], np.repeat(heads.k[0], heads.q.shape[1] // heads.k.shape[1], axis=0)
    scores = q[:, first:] @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    hidden = np.arange(k.shape[1]) > np.arange(first, k.shape[1])[:, None]
    scores[:, hidden] = -np.inf
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def outliers(layers: list[evaluate.Heads]) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "side": side,
            "largest_channel": spread(x, -1),
            "largest_token": spread(x, -2),
            "range_per_token": step(x, "token"),
            "range_per_channel": step(x, "channel"),
        }
        for side in "kv"
        for layer, x in enumerate(getattr(heads, side) for heads in layers)
    ]


def attention(layers: list[evaluate.Heads]) -> list[dict[str, Any]]:
    """Shares of the attention mass, in %; budgets are 10 % of the text."""
    rows = []
    for layer, heads in enumerate(layers):
        w = weights(heads, FIRST_QUERY)
        length = w.shape[-1]
        ages = np.arange(FIRST_QUERY, length)[:, None] - np.arange(length)
        recent = np.where((ages >= 0) & (ages < length // 10), w, 0).sum(axis=-1)
        best = np.sort(w, axis=-1)[..., -(length // 10) :].sum(axis=-1)
        rows.append(
            {
                "layer": layer,
                "first_token": 100 * float(w[..., 0].mean()),
                "first_token_worst_head": 100 * float(w[..., 0].mean(axis=1).max()),
                "first_four": 100 * float(w[..., :4].sum(axis=-1).mean()),
                "even_four": 100 * float((4 / np.arange(FIRST_QUERY + 1, length + 1)).mean()),
                "recent_tenth": 100 * float(recent.mean()),
                "best_tenth": 100 * float(best.mean()),
            }
        )
    return rows


def answers(model: kvlib.Transformer, questions: list[evaluate.Question]) -> dict[str, float]:
    """Where the queries that choose an answer's bytes look, in layer 1, which reads them: shares of the mass in %.

    And of the 30 rows that carry the answer, how many are among those that H2O keeps at a budget of 50 % (a quarter of
    the prompt by attention), against how many chance would keep.
    """
    found: dict[str, list[float]] = {}
    for question in questions:
        ids = np.array([list((question.prompt + question.answer[:-1]).encode())])
        key = question.prompt[question.prompt.rindex("\n") + 1 : -1]
        line, length = question.prompt.index(f"{key}={question.answer}"), len(question.prompt)
        w = weights(evaluate.record(model, ids)[1], 0)
        asked = w[:, -4:].mean(axis=(0, 1))
        recent = length // 4
        mass = w[:, :length, : length - recent].sum(axis=1).reshape(2, -1, length - recent).sum(axis=1)
        kept = np.argsort(np.argsort(-mass, axis=-1), axis=-1)[:, max(0, line - 2) : line + 28] < recent
        for name, value in {
            "older than 64 bytes": asked[:-64].sum(),
            "the answer's line": asked[line : line + 11].sum(),
            "the 16 bytes behind it": asked[line + 11 : line + 27].sum(),
            "rows kept by H2O": kept.mean(),
            "by chance": recent / (length - recent),
        }.items():
            found.setdefault(name, []).append(100 * float(value))
    return {name: float(np.mean(values)) for name, values in found.items()}


def values_with_outliers(layers: list[evaluate.Heads]) -> list[dict[str, Any]]:
    """Errors in % of 2-bit values by axis, keys exact: as they are, and the least attended 5 % made 20 times larger.

    That is the case that KIVI's argument for values per token is about: few tokens with large values, little attended.
    """
    axes = {"token": Int(2, group_size=32), "channel": Int(2, "channel", 32)}
    rows = []
    for name, factor in (("as they are", 1), ("5 % of tokens x 20", 20)):
        errors: dict[str, list[float]] = {f"{what} per {axis}": [] for what in ("V", "output") for axis in axes}
        for heads in layers:
            first = evaluate.Heads(*(x[:1] for x in heads))
            attended = weights(first, 0).sum(axis=1).reshape(len(first.k[0]), -1, first.k.shape[2]).sum(axis=1)
            least = attended <= np.quantile(attended, 0.05, axis=-1, keepdims=True)
            first = first._replace(v=np.where(least[None, ..., None], factor, 1).astype(np.float32) * first.v)
            for axis, codec in axes.items():
                split = Split(Plain("float32"), codec)
                errors[f"V per {axis}"] += [100 * evaluate.rounding_error(codec, first.v).mean()]
                errors[f"output per {axis}"] += [100 * evaluate.output_error(first, chunk=64, codec=split).mean()]
        rows.append({"values": name} | {what: float(np.mean(found)) for what, found in errors.items()})
    return rows


def chunks(model: kvlib.Transformer, ids: np.ndarray, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Bits per byte, by how many tokens are appended at once; the last size is the whole window."""
    cases = {
        "float16": {"codec": "float16"},
        "int4, 32": {"codec": Int(4, group_size=32)},
        "KIVI-2, last 128 exact": {"codec": KIVI(2)},
        "KIVI-2, last 32 exact": {"codec": KIVI(2, residual=32)},
        "KIVI-2, none exact": {"codec": KIVI(2, residual=0)},
        "window of 102": {"eviction": SlidingWindow(102)},
        "H2O, 102": {"eviction": HeavyHitter(102)},
    }
    return [
        {"cache": name} | {str(size): float(evaluate.text_bits(model, ids, size, **case).mean()) for size in sizes}
        for name, case in cases.items()
    ]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    print_table(list(rows[0]), [[f"{x:.3f}" if isinstance(x, float) else x for x in row.values()] for row in rows])


def main() -> None:
    model, windows = kvlib.tinylm(), evaluate.windows(evaluate.heldout_text())
    layers = evaluate.record(model, windows[[3, 12, 20, 28]])
    questions = evaluate.recall_questions()[::4]
    by_distance = {d: [q for q in questions if q.distance == d] for d in sorted({q.distance for q in questions})}
    sections = {
        "outliers": outliers(layers),
        "values": values_with_outliers(layers),
        "attention": attention(layers),
        "answers": [{"distance": distance} | answers(model, these) for distance, these in by_distance.items()],
        "chunks": chunks(model, windows[[3, 12, 20, 28]], (1, 4, 16, 64, 1023)),
    }
    for name, rows in sections.items():
        show(name, rows)
    path = save("structure.json", sections)
    print(f"\nwrote {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
