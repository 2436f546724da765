"""What the report's figures have in common: colors, style, and what stands in for a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's colors, which people with any color vision tell apart; ours first, in the strongest.
COLORS = (
    *("#0072B2", "#56B4E9", "#000000", "#D55E00", "#E69F00", "#CC79A7", "#009E73"),
    *("#8A8A00", "#7F7F7F", "#B5651D", "#9467BD", "#C0C0C0"),
)
#: In this order.
MARKERS = "os^DvP*X<>hp"
#: Of Matplotlib, for every figure.
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",
    "svg.hashsalt": "sparse_runtime",
    # Names come from files and paths; a dollar sign in them starts no formula.
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        name: of its files.
        title: above it.
        alt: what it shows, in words and numbers.
        figure: of Matplotlib.
    """

    name: str
    title: str
    alt: str
    figure: Figure


def new_figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes."""
    # Not pyplot, which keeps figures and picks a backend for windows.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, **options)
