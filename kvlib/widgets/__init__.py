"""Explorables: small interactive figures that need no kernel.

Each is an anywidget whose data is computed by Python when the notebook runs, and whose JavaScript does the rest, in a
notebook and in the built book alike. A new explorable is a subclass, a ``name.js`` beside this file that defines
``explore``, and nothing else; `common.js` gives it controls, SVG and the theme.
"""

from pathlib import Path
from typing import Any

import anywidget
import traitlets

_HERE = Path(__file__).parent


class Explorable(anywidget.AnyWidget):
    """Base class. ``data`` is what the JavaScript computes from: plain numbers, lists and strings only."""

    data = traitlets.Dict().tag(sync=True)
    _css = (_HERE / "common.css").read_text(encoding="utf-8")

    def __init_subclass__(cls, script: str = "", **kwargs: Any) -> None:
        if script:  # traitlets derives a class from each explorable when one is made; that one inherits its script
            cls._esm = "\n".join((_HERE / part).read_text(encoding="utf-8") for part in ("common.js", script))
        super().__init_subclass__(**kwargs)

    def __repr__(self) -> str:
        """Stable between runs, so that strict nbval can compare a cell that shows one."""
        return f"{type(self).__name__}(…)"


# Explorables are added below, one class each:


class AxisOrder(Explorable, script="axis_order.js"):
    """Chapter 2: put the axes of a cache in any order and see which bytes an operation touches."""


class TokenByToken(Explorable, script="token_by_token.js"):
    """Chapter 1: generate a text step by step and see which rows of K and V are computed, which remembered.

    ``data``: ``tokens`` (what to show for each), ``prompt`` (how many of them are given), the multiply-adds
    ``perRow``, ``perPair`` (of a query and a key) and ``perStep``, the replacement of each byte in ``edits``, and in
    ``change[layer][edited][row]`` how far, in percent, the edit moves that row's key.
    """


class Reservation(Explorable, script="reservation.js"):
    """Chapter 4: scrub over time through an arena of slots, under a policy of how much to reserve and where.

    ``data``: ``slots``; ``row``, the slots to a row of the map; ``horizon`` and ``unit``, both in steps;
    ``requests``, the prompt and the output of each; ``rooms[policy]``, what it reserves for each;
    ``traces["policy|fit"]``, where each request lies and in which step it came, in order of admission; and
    ``expected["policy|fit|step"]``, the fields of a `Moment`.
    """


class OutlierMap(Explorable, script="outlier_map.js"):
    """Chapter 9: group the keys or values of a head by token or by channel and see where the error lands.

    ``data``: the sizes ``tokens``, ``channels``, ``layers``, ``heads``; ``k`` and ``v``, for each layer and head the
    base64 of its numbers as int8, token by token; ``groups`` as [name, label, axis, size]; ``bits``; ``plants`` as
    dictionaries with ``name``, ``label``, ``channels``, ``tokens`` and ``factor``; and in ``expected``, for
    "side|layer|head|plant|group|bits", the relative error of all numbers and of those not planted.
    """


class Quantizer(Explorable, script="quantizer.js"):
    """Chapter 8: put real keys on a grid of levels and see the error of each number, and how far attention moves.

    ``data``: ``tile[token][channel]``, the keys; ``query``, one that attends to them; ``tokens``, what to show for
    each; ``group``, the numbers of a token that may share a scale; ``start``, the token shown first; and
    ``expected["bits|shared|grid|fault|clip"]``, the root mean square of the error and the share of attention that
    moved.
    """


class Capacity(Explorable, script="capacity.js"):
    """Chapter 3: any model of the registry on any card: what its weights and its cache take, and what fits.

    ``data``: ``models`` (name, number of weights, the context each was ``made`` for, whether it has a ``latent``),
    ``codecs`` and ``cards`` to choose from, the ``contexts`` and ``batches`` of the map, the ``start`` of every
    control. ``parts["model|codec"]`` holds, for each kind of layer, the bytes of a group of tokens, what a sequence
    costs besides, the most groups it keeps (0: all) and the tokens of a group; ``expected`` and ``fits`` (at
    ``fitsAt``) are what kvlib computes, for the script to compare with.
    """


class PrefixSharing(Explorable, script="prefix_sharing.js"):
    """Chapter 6: scrub through the requests of eight chats and see which blocks of their tree are found and evicted.

    ``data``: ``sizes`` of the cache in blocks, ``trunk`` (blocks of the system prompt), ``block`` (tokens in one),
    and in ``runs[order][size]`` for each request [chat, blocks found, tokens of the prompt, blocks of the text,
    blocks cached behind the trunk per chat, [[chat, blocks lost], …]]; ``expected[order][size]``: tokens found in
    all.
    """


class BlockMap(Explorable, script="block_map.js"):
    """Chapter 5: replay the events of a real cache, as a pool of blocks and as the tables that point into it.

    ``data``: ``slots`` of the pool and the ``limit`` of a sequence, in tokens; the ``names`` of the sequences; in
    ``labels``, [block size, label] of each way to cut the pool; for each size, as a string, ``moments``: what one
    event did, as a dictionary of ``text``, ``bad`` (somebody was refused), ``copied`` (blocks), ``tables``,
    ``lengths`` and ``refs``; ``most``, the largest number of tables at once; ``start``, ``size`` and ``follow``, what
    is shown first; and in ``expected``, for each size and event, the slots held, the slots written and the blocks
    shared.
    """


class Compositions(Explorable, script="compositions.js"):
    """Chapter 10: choose blocks, codec and eviction; see a real model's memory, tinylm's cost, and the frontier.

    ``data``: ``blocks`` and ``policies`` as [name, label], ``codecs``; compositions are numbered in this order, the
    last one fastest. ``limits`` (tokens) and ``counts`` (conversations) to choose from; ``parts["limit|count"]``: for
    each composition the codes, exact tail, scales, unused places and tables, in units of 0.1 MB; ``bits`` and
    ``recall``: what each loses; ``expected["limit|count|bits"]`` (or recall): those that no other beats in both;
    ``start`` of the selects.
    """


class OnlineSoftmax(Explorable, script="online_softmax.js"):
    """Chapter 14: read the scores of a real head tile by tile, and watch the running maximum and the sum.

    ``data``: ``heads[name]`` with ``scores`` of the newest keys and ``m`` and ``l`` over all of them, ``letters``
    (what byte each key belongs to) and ``sizes`` of tiles to choose from.
    """


class Roofline(Explorable, script="roofline.js"):
    """Chapter 16: put a step of a model on the roof of a device, and see what moves its two points.

    ``data``: ``models`` (parameters, heads, KV heads, width, layers and bits per number of each codec), ``devices``
    (bytes and FLOP per second, bytes of memory), the choices of ``contexts``, ``batches`` and ``news`` (new tokens),
    and ``expected`` intensities and milliseconds on an H200, for what Python has computed too.
    """


class KernelWalk(Explorable, script="kernel_walk.js"):
    """Chapter 17: the programs of a paged decode kernel, round by round, and the blocks that they read.

    ``data``: ``tables`` and ``lengths`` of the sequences, tokens to a ``block``, ``blocks`` in the pool, ``heads`` of
    K and V, query heads to a ``group``, the choices of ``tiles`` and ``splits``, and for each pair of them the
    ``tokens`` of K that the real kernel asked for.
    """


class ChunkSize(Explorable, script="chunk_size.js"):
    """Chapter 15: choose how a long prompt is cut, and see memory, time to first token and the longest gap of the
    others.

    ``data``: ``device`` (FLOP and bytes per second), ``model`` (parameters, heads, KV heads, width, layers), the
    choices of ``prompts``, ``crowds`` (sequences that decode) and ``chunks``, keys of a ``tile``, the ``start`` of
    each, and in ``expected["prompt|crowd|chunk"]`` what kvlib's engine simulates: tokens that the crowd holds when
    the prompt's first step begins, and milliseconds to the first token and of the longest gap.
    """


class Timeline(Explorable, script="timeline.js"):
    """Chapter 7: scrub through the steps of a serving engine and see who runs, who waits, who is preempted.

    ``data``: the choices of ``doors`` (rules of batching), ``pools`` (blocks) and ``ways`` (of preemption),
    ``guests`` as
    [prompt, output], the ``places`` in a batch, the ``start`` of each control. ``runs["door|pool|way"]`` has a text of
    numbers, one per step, for ``free`` blocks, ``tokens`` computed, ``ms`` and output tokens ``made``; [step, tokens]
    for those ``moved``, [step, ids] for those sent ``out``; in ``rows`` a text for each request, of letters with the
    number of steps that each lasts. ``expected``: steps, preemptions, output and computed tokens of kvlib's summary.
    """
