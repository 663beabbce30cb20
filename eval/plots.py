"""Plots as SVG text for a web page: text stays text, and colours are the page's, so that light and dark both work.

Every function returns one `<svg>` element. Colours are written as stand-ins and replaced by CSS variables: `--ink`,
`--grid`, and `--s0` … `--s7` for the series. No pyplot: nothing global, nothing to close.
"""

# pyright: reportUnknownMemberType=false, reportArgumentType=false
# matplotlib is partly untyped.
import html
import io
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from eval.curve import Curve

INK, GRID = "#f00dfa", "#f00dfb"
SERIES = tuple(f"#f00d0{i}" for i in range(8))
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
"""Line styles: a ninth series repeats the first colour, dashed."""

STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's font
    "svg.hashsalt": "headstart",  # the same plot gives the same bytes
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.9,
}

WIDTH = 4.6
"""Inches; narrow, so that text is still legible when a phone scales the picture down."""


def colour(series: int) -> str:
    """CSS colour of a series."""
    return f"var(--s{series % len(SERIES)})"


def _line(series: int) -> dict[str, object]:
    """Colour and dashes of a series."""
    return {
        "color": SERIES[series % len(SERIES)],
        "linestyle": DASHES[series // len(SERIES) % len(DASHES)],
    }


def _axes(height: float = 3.1) -> tuple[Figure, Axes]:
    """An empty plot."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The figure as an element that scales with its place and follows the page's colours."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", text, flags=re.S)
    # Ids are hashes of content, but two plots on one page may still clash in the names of groups.
    text = re.sub(
        r' id="(?:figure|axes|patch|matplotlib|xtick|ytick|text|line2d|PathC|Line|Poly)[^"]*"',
        "",
        text,
    )
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{html.escape(label)}">',
        text,
        count=1,
    )
    text = re.sub(r"#f00d0(\d)", r"var(--s\1)", text)
    return text.replace(INK, "var(--ink)").replace(GRID, "var(--grid)").strip()


def seen_unseen(
    curves: Mapping[str, Sequence[Curve]], series: Mapping[str, int], label: str
) -> str:
    """Accuracy on seen pairs over accuracy on unseen pairs, in percent; one line a seed.

    Args:
        curves: row of the table → its seeds' curves.
        series: row → number of its colour.
        label: what the picture shows, for those who do not see it.

    """
    with mpl.rc_context(STYLE):
        figure, axes = _axes()
        for name, seeds in curves.items():
            for points in seeds:
                axes.plot(
                    100 * points.unseen, 100 * points.seen, **_line(series[name]),
                    alpha=0.9 if len(seeds) == 1 else 0.65, lw=1.9 if len(seeds) == 1 else 1.3,
                )  # fmt: skip
        axes.set(xlabel="unseen pairs right (%)", ylabel="seen pairs right (%)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(True)
        return _svg(figure, label)


def category_bars(
    groups: Sequence[str],
    values: Mapping[str, Float[np.ndarray, "g 3"]],
    series: Mapping[str, int],
    chance: Sequence[float | None],
    label: str,
) -> str:
    """One block of bars a category, with intervals and the chance line, in percent.

    Args:
        groups: the categories.
        values: row of the table → (estimate, low, high) of each category, fractions; NaN where there is none.
        series: row → number of its colour.
        chance: of each category.
        label: what the picture shows.

    """
    with mpl.rc_context(STYLE):
        figure, axes = _axes(max(2.2, 0.62 + len(groups) * (0.22 + 0.2 * len(values))))
        thick = 0.82 / max(1, len(values))
        for i, (name, numbers) in enumerate(values.items()):
            y = np.arange(len(groups)) - 0.41 + thick * (i + 0.5)
            mean, low, high = 100 * numbers.T
            error = np.clip([mean - low, high - mean], 0, None)
            axes.barh(
                y, mean, thick * 0.86, color=SERIES[series[name] % len(SERIES)], xerr=error,
                error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 1.8, "capthick": 0.9},
            )  # fmt: skip
        for g, line in enumerate(chance):
            if line is not None:
                axes.plot(
                    [100 * line] * 2,
                    [g - 0.47, g + 0.47],
                    color=INK,
                    lw=1.3,
                    ls=(0, (3, 2)),
                    zorder=5,
                )
        axes.set_yticks(range(len(groups)), groups)
        axes.invert_yaxis()
        axes.set(xlabel="right (%), dashed: chance", xlim=(0, 100))
        axes.grid(True, axis="x")
        return _svg(figure, label)


def training(
    losses: Sequence[Sequence[tuple[float, float]]],
    validation: Sequence[Sequence[tuple[float, float]]],
    metric: str,
    series: int,
    label: str,
) -> str:
    """Loss (left, logarithmic where it can be) and a validation metric (right, percent) over steps; one line a seed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.3), layout="constrained")
        panels = [("training loss", losses, 1.0), (f"validation {metric} (%)", validation, 100.0)]
        shown = [panel for panel in panels if any(panel[1])]
        for i, (title, lines, scale) in enumerate(shown):
            axes = figure.add_subplot(1, len(shown), i + 1)
            for line in filter(None, lines):
                x, y = np.array(line, dtype=float).T
                axes.plot(
                    x,
                    scale * y,
                    color=SERIES[series % len(SERIES)],
                    lw=1.3,
                    alpha=0.75,
                    marker="." if len(x) < 30 else "",
                )
            if scale == 1 and all(y > 0 for line in lines for _, y in line):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
            axes.set_title(title, fontsize=11)
            axes.set_xlabel("step")
            axes.grid(True)
        return _svg(figure, label)
