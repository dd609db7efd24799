"""Comparison: what one model's cache takes under every strategy, as a table that prints."""

import html
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from kvlib.eviction import SlidingWindow
from kvlib.footprint import Footprint, model_footprint
from kvlib.registry import LayerGroup, Model, ModelLike, find
from kvlib.spec import CacheSpec

LATENT, ROPE = 512, 64  # widths of DeepSeek-V2's latent (arXiv:2405.04434, section 3.1.2)
STREAMING = SlidingWindow(1020, sinks=4)  # 4 sinks and 1,024 tokens in all (Xiao et al. 2023, table 2)

# name: arguments of KVCache. Blocks of 32 tokens where KIVI's groups of 32 have to fit into them.
STRATEGIES: dict[str, dict[str, Any]] = {
    "contiguous fp32": {"codec": "float32"},
    "contiguous fp16": {"codec": "float16"},
    "contiguous int8": {"codec": "int8"},
    "contiguous int4": {"codec": "int4"},
    "contiguous KIVI-4": {"codec": "kivi-4bit"},
    "contiguous KIVI-2": {"codec": "kivi-2bit"},
    "paged fp16": {"codec": "float16", "block_size": 16},
    "paged int8": {"codec": "int8", "block_size": 16},
    "paged int4": {"codec": "int4", "block_size": 16},
    "paged KIVI-2": {"codec": "kivi-2bit", "block_size": 32},
    "window 1,024 fp16": {"codec": "float16", "block_size": 16, "eviction": STREAMING},
    "window 1,024 int4": {"codec": "int4", "block_size": 16, "eviction": STREAMING},
}
BASELINE = "contiguous fp16"


class Strategy(NamedTuple):
    """One row of a `Comparison`. ``footprint`` is None where the strategy does not fit the model; ``note`` says why."""

    name: str
    footprint: Footprint | None
    times_smaller: float | None  # than the contiguous cache in float16, everything counted
    note: str = ""


HEADER = ("strategy", "everything", "× smaller", "payload", "metadata", "unused + tables", "bits/number", "")


@dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """Rows of `Strategy`, by number or by name: ``table[0]``, ``table["paged int8"]``. It prints, in a notebook too."""

    title: str
    rows: tuple[Strategy, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Strategy]:
        return iter(self.rows)

    def __getitem__(self, row: int | str) -> Strategy:
        named = {strategy.name: strategy for strategy in self.rows}
        if isinstance(row, str) and row not in named:
            raise KeyError(f"no strategy {row!r}; there are: {', '.join(named)}")
        return named[row] if isinstance(row, str) else self.rows[row]

    def cells(self) -> list[tuple[str, ...]]:
        """The rows as text, under the titles of `HEADER`."""
        return [(row.name, *_figures(row), row.note) for row in self.rows]

    def __repr__(self) -> str:
        rows = [HEADER, *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        sides = [str.ljust, *[str.rjust] * 6, str.ljust]  # name and note to the left, figures to the right
        lines = [
            "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)) for row in rows
        ]
        return "\n".join([self.title, *(line.rstrip() for line in lines)])

    def _repr_html_(self) -> str:
        def line(cells: SequenceOf[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line(cells, "td") for cells in self.cells())
        head = f"<caption>{html.escape(self.title)}</caption><thead>{line(HEADER, 'th')}</thead>"
        return f"<table>{head}<tbody>{body}</tbody></table>"


def _figures(row: Strategy) -> tuple[str, ...]:
    part = row.footprint
    if part is None:
        return ("–",) * 6
    total, payload, metadata, rest = (
        human_bytes(n) for n in (part.total, part.payload, part.metadata, part.unused + part.tables)
    )
    return total, f"{row.times_smaller:.2f}", payload, metadata, rest, f"{part.bits:.2f}"


def human_bytes(count: float) -> str:
    """12345678 -> "11.77 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.2f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"


def compare_strategies(model: ModelLike, tokens: int, batch: int = 1, max_tokens: int | None = None) -> Comparison:
    """What ``batch`` sequences of ``tokens`` tokens take under each of `STRATEGIES`, and with or without MLA.

    ``max_tokens``: how long a sequence may become (None: it is as long as it gets). A contiguous cache holds so many
    places from the start, a paged one takes blocks for ``tokens``, and one that evicts has room for what it keeps.

    The last row is a what-if. For a model with multi-head latent attention: the same heads with K and V of their own.
    For any other: its layers with one latent of 512 + 64 numbers: what they would store, not what they can compute.
    """
    model = find(model)
    what_if = "without MLA fp16" if model.expanded else "MLA 512 + 64 fp16"
    models = dict.fromkeys(STRATEGIES, model) | {what_if: _what_if(model)}
    strategies = STRATEGIES | {what_if: {"codec": "float16"}}
    parts: dict[str, Footprint | str] = {}
    for name, settings in strategies.items():
        lengths = [tokens] * batch if settings.get("block_size") else tokens
        try:
            room = None if "eviction" in settings else max_tokens
            parts[name] = model_footprint(models[name], lengths, batch, room, **settings)
        except ValueError as error:
            if name == BASELINE:
                raise
            parts[name] = str(error)
    whole = parts[BASELINE].total
    rows = tuple(
        Strategy(name, part, whole / part.total) if isinstance(part, Footprint) else Strategy(name, None, None, part)
        for name, part in parts.items()
    )
    each = f"{model.num_layers} layers, {model.elements_per_token:,} numbers for a token"
    return Comparison(f"{model.name}, {tokens:,} tokens, batch {batch}: {each}", rows)


def _what_if(model: Model) -> Model:
    if model.expanded:
        return replace(model, groups=(LayerGroup(model.expanded),))
    return replace(
        model,
        groups=tuple(
            LayerGroup(CacheSpec(1, LATENT + ROPE, spec.num_layers, spec.dtype, latent=LATENT), window)
            for spec, window in model.groups
        ),
    )
