"""Plots of what a table gets right and takes for what, as SVG text in the page's colours.

Written out by hand, not through matplotlib: some hundred small marks, each with its numbers as a title, in a few KB.

    attribute   right                          true, taken for:    dry  wet  old
    dry         ───●──────○──                  dry                  ▓    ░
    wet         ──○────────●─                  wet                  ░    ▓    ░
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from eval.markup import text
from eval.plots import colour

MARKS = (
    "M0-5A5 5 0 1 0 0 5A5 5 0 1 0 0-5Z",
    "M-4.5-4.5H4.5V4.5H-4.5Z",
    "M0-6L6 0L0 6L-6 0Z",
    "M0-5.6L5.6 4.4H-5.6Z",
    "M0 5.6L5.6-4.4H-5.6Z",
    "M-5-1.8H-1.8V-5H1.8V-1.8H5V1.8H1.8V5H-1.8V1.8H-5Z",
)
"""Outlines, so that rows of the table differ by more than their colour."""

WIDE = 420
"""Units of a plot's width, about a pixel each in a column of the page."""


def primitive_dots(
    names: Sequence[str], values: Mapping[str, Float[np.ndarray, " p"]], series: Mapping[str, int],
    counts: Sequence[int], label: str,
) -> str:  # fmt: skip
    """One line a primitive, on it one mark a row of the table: the share that is right, 0 to 100 %.

    Args:
        names: attributes or objects, from top to bottom.
        values: row of the table → shares, fractions.
        series: row → number of its colour and mark.
        counts: images of each primitive.
        label: what the picture shows, for those who do not see it.

    """
    longest = max(map(len, names))
    left = min(170, 22 + 7 * longest + 7 * len(str(max(counts))))
    step, top = 22, 8
    height, width = top + step * len(names) + 38, WIDE - left - 16
    parts = [opened(height, label)]
    floor = top + step * len(names)
    for percent in range(0, 101, 20):
        x = left + width * percent / 100
        parts.append(f'<path d="M{x:.4g} {top}V{floor}" stroke="var(--grid)"/>')
        parts.append(f'<text x="{x:.4g}" y="{floor + 16}" text-anchor="middle">{percent}</text>')
    middle = left + width / 2
    parts.append(f'<text x="{middle:.4g}" y="{floor + 32}" text-anchor="middle">right (%)</text>')
    for i, name in enumerate(names):
        y = top + step * (i + 0.5)
        parts.append(
            f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{text(_short(name, 18))} '
            f'<tspan fill="var(--soft)">{counts[i]}</tspan></text>'
        )
        parts.append(f'<path d="M{left} {y}H{left + width}" stroke="var(--grid)"/>')
        for row, shares in values.items():
            x = left + width * float(shares[i])
            mark = MARKS[series[row] % len(MARKS)]
            parts.append(
                f'<path transform="translate({x:.4g} {y})" d="{mark}" fill="{colour(series[row])}" fill-opacity=".85">'
                f"<title>{text(name)}, {text(row)}: {100 * shares[i]:.1f} % of {counts[i]}</title></path>"
            )
    return "".join([*parts, "</svg>"])


def confusion_map(
    names: Sequence[str], shares: Float[np.ndarray, "a a"], counts: Float[np.ndarray, "a a"], label: str
) -> str:  # fmt: skip
    """A square a pair of attributes: rows are true, columns what they were taken for.

    Off the diagonal the darkest square is the largest share there; on it, a bar as wide as what is right.

    Args:
        names: of the attributes shown, in the order of both axes.
        shares: of the images of a row, over all attributes, also those not shown.
        counts: the same in images.
        label: what the picture shows.

    """
    n = len(names)
    longest = min(14, max(map(len, names)))
    left = 14 + 7 * longest
    cell = min(26.0, (WIDE - left - 4) / n)
    size, top = cell * n, left
    font = min(12.0, cell * 0.92)
    off = np.where(np.eye(n, dtype=bool), 0, shares)
    most = float(off.max()) or 1.0
    parts = [opened(top + size + 6, label, f"{font:.3g}")]
    for i, name in enumerate(names):
        at = cell * (i + 0.5)
        shown = text(_short(name, 14))
        parts.append(
            f'<text x="{left - 6}" y="{top + at + font / 3:.4g}" text-anchor="end">{shown}</text>'
        )
        parts.append(
            f'<text transform="translate({left + at + font / 3:.4g} {top - 6}) rotate(-90)">{shown}</text>'
        )
    grid = "".join(
        f"M{left} {top + cell * i:.4g}h{size:.4g}M{left + cell * i:.4g} {top}v{size:.4g}"
        for i in range(n + 1)
    )
    parts.append(f'<path d="{grid}" stroke="var(--grid)" stroke-width=".6" fill="none"/>')
    for i, j in np.argwhere(shares > 0):
        x, y = left + cell * j, top + cell * i
        if i == j:
            shape = f'width="{cell * shares[i, i]:.3g}" height="{cell:.4g}" fill="var(--s0)" opacity=".45"'
            says = f"{names[i]}: right {100 * shares[i, i]:.1f} % ({counts[i, i]:.4g} images)"
        else:
            shade = max(0.06, off[i, j] / most)
            shape = (
                f'width="{cell:.4g}" height="{cell:.4g}" fill="var(--mark)" opacity="{shade:.2f}"'
            )
            says = f"{names[i]} taken for {names[j]}: {100 * shares[i, j]:.1f} % ({counts[i, j]:.4g} images)"
        parts.append(f'<rect x="{x:.5g}" y="{y:.5g}" {shape}><title>{text(says)}</title></rect>')
    return "".join([*parts, "</svg>"])


def opened(height: float | int, label: str, font: str = "12") -> str:
    """The start of a plot: its size, and what it shows for those who do not see it."""
    return (
        f'<svg viewBox="0 0 {WIDE} {height:.5g}" role="img" aria-label="{text(label)}" font-size="{font}" '
        f'fill="var(--ink)">'
    )


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
