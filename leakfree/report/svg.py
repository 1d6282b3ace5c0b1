"""How figures look and how they become SVG for inlining.

Text is drawn as paths (no font is needed); every colour becomes a CSS variable of the page, so a figure
follows the light, the dark and the print scheme. Sentinel colours stand for the variables while
matplotlib draws.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

from matplotlib.figure import Figure

__all__ = ["CARD", "INK", "MARKERS", "MUTED", "NUM_COLORS", "STYLE", "color", "dashes", "marker", "to_svg"]

NUM_COLORS = 8  # --series-0 ... --series-7 of style.css
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
_DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))  # from the ninth variant on, colours repeat with other dashes
INK, MUTED, _GRID, CARD = "#5e00f0", "#5e00f1", "#5e00f2", "#5e00f3"
_VARIABLES = {INK: "--ink", MUTED: "--muted", _GRID: "--rule", CARD: "--card"} | {
    f"#5e000{index}": f"--series-{index}" for index in range(NUM_COLORS)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "leakfree",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": _GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.left": False,
    "lines.linewidth": 1.5,
    "figure.facecolor": "none",
}


def color(index: int) -> str:
    return f"#5e000{index % NUM_COLORS}"


def marker(index: int) -> str:
    """The marker of the variant at ``index``, in every figure, legend and table."""
    return MARKERS[(index + index // len(MARKERS)) % len(MARKERS)]


def dashes(index: int) -> Any:
    return _DASHES[(index // NUM_COLORS) % len(_DASHES)]


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for inlining: no header, ids of its own, colours as CSS variables."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # a run's name may hold signs that the font lacks; the page also says it in text
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r"<svg\b[^>]*>", lambda match: _root(match.group(0)), text, count=1)
    for sentinel, variable in _VARIABLES.items():
        text = text.replace(sentinel, f"var({variable})")
    return re.sub(r"\n\s*", "\n", text).strip()


def _root(tag: str) -> str:
    """The opening tag with the viewBox alone: the page decides on the size."""
    box = re.search(r'viewBox="[^"]*"', tag)
    assert box is not None, f"matplotlib wrote an SVG without a viewBox: {tag}"
    return f'<svg class="plot" {box.group(0)} aria-hidden="true" focusable="false">'
