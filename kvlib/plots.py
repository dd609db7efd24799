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
