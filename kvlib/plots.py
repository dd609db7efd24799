"""One look for every figure of the book.

``plots.setup()`` at the top of a chapter: vector figures, one colour-blind-safe palette (Okabe & Ito 2008), K and V the
same two colours everywhere, no boxes, labels on the lines rather than in legends.
"""

import matplotlib as mpl
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes

K = "#0072b2"  # keys: blue
V = "#d55e00"  # values: vermilion
Q = "#009e73"  # queries: green
ACCENT = "#cc79a7"  # whatever the figure is about
AMBER = "#e69f00"
SKY = "#56b4e9"
INK = "#222222"
MUTED = "#767676"
FAINT = "#d9d9d9"
CYCLE = (K, V, Q, ACCENT, AMBER, SKY)
# one colour for each request or sequence, apart from those of K, V and Q (Tol's "muted")
REQUESTS = ("#332288", "#88ccee", "#117733", "#ddcc77", "#cc6677", "#882255", "#44aa99", "#999933")


def setup() -> None:
    """Set matplotlib up for a chapter: SVG output that is the same on every run, and the book's style."""
    mpl.rcParams.update(
        {
            "figure.figsize": (7.2, 3.2),
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "axes.prop_cycle": cycler(color=CYCLE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.grid": False,
            "grid.color": FAINT,
            "lines.linewidth": 2.0,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "text.color": INK,
            "font.size": 10,
            "legend.frameon": False,
            "svg.fonttype": "none",  # text stays text: searchable, and sharp at any zoom
            "svg.hashsalt": "kvlib",  # element ids do not change from run to run
        }
    )
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:  # a plain Python session: nothing is displayed inline
        return
    set_matplotlib_formats("svg", metadata={"Date": None})


def figure(rows: int = 1, columns: int = 1, height: float = 3.2, **kwargs):
    """``plt.subplots`` at the width of the book's column; ``height`` in inches."""
    return plt.subplots(rows, columns, figsize=(7.2, height), **kwargs)


def label_line(axes: Axes, x: float, y: float, text: str, colour: str, **kwargs) -> None:
    """Write ``text`` beside a line, in the line's colour: what a legend would make the reader look up."""
    axes.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", color=colour, va="center", **kwargs)


def cells(axes: Axes, colours, labels=None, gap: float = 0.12, edge: str = "none", size: float = 8) -> None:
    """A matrix of coloured squares, row 0 on top: a memory map, a mask, a block table.

    ``colours`` (rows, columns): a colour for each square, None for none. ``labels``, of the same shape: text inside,
    white or dark, whichever reads better. Square (r, c) spans x from c to c + 1 - gap and y from -r up.
    """
    for r, row in enumerate(colours):
        for c, colour in enumerate(row):
            if colour is None:
                continue
            axes.add_patch(plt.Rectangle((c, -r), 1 - gap, 1 - gap, facecolor=colour, edgecolor=edge, linewidth=0.6))
            if labels is not None and labels[r][c] not in (None, ""):
                axes.text(
                    c + (1 - gap) / 2,
                    -r + (1 - gap) / 2,
                    str(labels[r][c]),
                    ha="center",
                    va="center",
                    fontsize=size,
                    color=ink_on(colour),
                )
    axes.set(xlim=(-gap, len(colours[0])), ylim=(1 - len(colours) - gap, 1))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def ink_on(colour: str) -> str:
    """White or `INK`, whichever has the larger contrast on ``colour`` (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in mpl.colors.to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if luminance < 0.2 else INK
