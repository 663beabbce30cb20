"""Score against cost for each kind of cost that the runs of a comparison say, with the numbers as CSV."""

from collections.abc import Mapping

from eval.comparison import Comparison
from eval.cost_plots import Point, score_against_cost
from eval.costs import COSTS, Cost, is_untrained, mean_cost, pareto
from eval.diagnostic_plots import MARKS
from eval.figures import figure, names_of, numbers_of
from eval.formats import csv_table
from eval.leaderboard import Entry, leaderboard
from eval.markup import chip, data_link, text
from eval.runs import Group

AXES = {
    "bytes_per_image": ("stored bytes read per image", "none"),
    "training_seconds": ("seconds of training", "untrained"),
    "parameters": ("trained parameters", "untrained"),
}
"""Costs that are drawn; the whole build is the same for all rows of a cache."""


def cost_figures_of(c: Comparison, series: Mapping[str, int]) -> str:
    """A plot a cost, as far as the rows that say it differ in it."""
    entries = leaderboard(c)
    if not entries:
        return ""
    names = names_of(c)
    numbers = numbers_of(names, series)
    backbones = list(dict.fromkeys(row.group.backbone for row in c.rows))
    figures: list[str] = []
    for cost in COSTS:
        if cost.name not in AXES:
            continue
        points = [
            _point(c, entry, value, numbers[names[entry.row.group]], names, backbones)
            for entry in entries
            if (value := drawn_cost(entry, cost)) is not None
        ]
        if len({point.cost for point in points}) > 1:
            figures.append(_figure(c, cost, points, len(entries) - len(points)))
    if not figures:
        return ""
    methods = {n.removesuffix(f" · {g.backbone}"): numbers[n] for g, n in names.items()}
    colours = "".join(f"<li>{chip(n)}{text(name)}</li>" for name, n in methods.items())
    shapes = "".join(f"<li>{_key(i)} {text(name)}</li>" for i, name in enumerate(backbones))
    return (
        f'<h3>{text(c.name(c.headline))} against cost</h3><p class="soft">{_SAYS}</p>'
        f'<ul class="legend">{colours}</ul><ul class="legend">{shapes}</ul>'
        f'<div class="plots">{"".join(figures)}</div>'
    )


_SAYS = (
    "Up and to the left is better. The colour is the method, the shape the backbone, the number the place on the "
    "leaderboard, the line through a mark its 95 % interval. Along the dashed line lies what no row of that cost or "
    "less exceeds, by the means alone. At the left edge stand rows without trained parameters."
)


def drawn_cost(entry: Entry, cost: Cost) -> float | None:
    """Where a row stands: 0 for one that trains nothing, whatever seconds its run took."""
    trained = cost.name in ("training_seconds", "parameters")
    if trained and is_untrained(entry.row.group):
        return 0.0
    return mean_cost(entry.row.group, cost.name)


def _point(
    c: Comparison,
    entry: Entry,
    cost: float,
    series: int,
    names: Mapping[Group, str],
    backbones: list[str],
) -> Point:
    cell, group = entry.row.cells[c.headline], entry.row.group
    low, high = (cell.mean if v is None else v for v in (cell.low, cell.high))
    mark = backbones.index(group.backbone)
    return Point(names[group], cost, cell.mean, low, high, series, mark, entry.place)


def _figure(c: Comparison, cost: Cost, points: list[Point], unknown: int) -> str:
    """One plot."""
    axis, edge = AXES[cost.name]
    front = set(pareto([p.cost for p in points], [p.value for p in points]))
    lines: list[tuple[object, ...]] = [
        ("row", "place", cost.name, c.headline, "low", "high", "on_front")
    ]
    lines += [
        (p.name, p.place, p.cost, p.value, p.low, p.high, int(i in front))
        for i, p in enumerate(points)
    ]
    left = f" {unknown} row{'s' * (unknown != 1)} whose runs do not say it left out." * (
        unknown > 0
    )
    caption = (
        f"<b>{text(c.name(c.headline))} against {axis}</b>.{left} "
        f"{data_link(f'{c.headline}-{cost.name}', csv_table(lines))}"
    )
    what = f"{c.headline} against {axis}, {len(points)} rows, {c.title}"
    svg = score_against_cost(
        points, axis, edge, cost.shown, what, binary=cost.name == "bytes_per_image"
    )
    return figure(svg, caption)


def _key(mark: int) -> str:
    """The shape of a backbone."""
    return (
        '<span class="key"><svg viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<path d="{MARKS[mark % len(MARKS)]}" fill="var(--ink)"/></svg></span>'
    )
