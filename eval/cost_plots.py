"""Plots of a score against a cost, as SVG text in the page's colours; by hand, as `diagnostic_plots`.

score                ● 1           a mark a row: its colour is the method, its shape the backbone, its number the
  │      ■ 2 ┌╌╌╌╌╌╌╌╌╌╌           place on the leaderboard; a line through it is the 95 % interval
  │ ▲┆╌╌╌╌╌╌╌┘   ● 4               ╌╌ what no row of that cost or less exceeds
  └──┆──────────────── cost        left of ┆: rows without any of that cost, which a logarithm has no place for
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.costs import pareto
from eval.diagnostic_plots import MARKS, WIDE, opened
from eval.markup import text
from eval.plots import colour

HEIGHT, TOP, LEFT, RIGHT, FLOOR = 290, 10, 46, 16, 246
EDGE = 66
"""Width of the place for rows without any cost."""

LETTER = 7.0
"""Width of a letter of a label, at most."""

MOST_TICKS = 6


@dataclass(frozen=True, slots=True)
class Point:
    """A row.

    Attributes:
        name: of it on the page.
        cost: 0 puts it at the left edge.
        value, low, high: its score with the interval, fractions.
        series, mark: numbers of its colour and of its shape.
        place: on the leaderboard.

    """

    name: str
    cost: float
    value: float
    low: float
    high: float
    series: int
    mark: int
    place: int


def score_against_cost(
    points: Sequence[Point],
    axis: str,
    edge: str,
    shown: Callable[[float], str],
    label: str,
    *,
    binary: bool = False,
) -> str:
    """Scores in percent over a logarithmic cost, with the front of what no cheaper row exceeds.

    Args:
        points: the rows.
        axis: what the cost is, with its unit.
        edge: what rows at the left edge are.
        shown: a cost as text.
        label: what the picture shows, for those who do not see it.
        binary: marks of the axis at powers of two.

    """
    some_free = any(p.cost == 0 for p in points)
    start = LEFT + (EDGE if some_free else 0)
    x_of, ticks = _logarithmic([p.cost for p in points if p.cost > 0], start, binary)
    y_of, lines = _percent(points)

    def at(point: Point) -> tuple[float, float]:
        x = x_of(point.cost) if point.cost > 0 else LEFT + EDGE / 2
        return x, y_of(point.value)

    parts = [opened(HEIGHT, label)]
    for value in lines:
        y = y_of(value / 100)
        parts.append(f'<path d="M{LEFT} {y:.5g}H{WIDE - RIGHT}" stroke="var(--grid)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.5g}" text-anchor="end">{value:g}</text>')
    free = 0.0
    for value in ticks:
        x, said = x_of(value), shown(value)
        parts.append(f'<path d="M{x:.5g} {TOP}V{FLOOR}" stroke="var(--grid)"/>')
        if x - LETTER * len(said) / 2 < free:
            continue  # a line without a number is read by its neighbours
        free = x + LETTER * (len(said) / 2 + 1)
        parts.append(f'<text x="{x:.5g}" y="{FLOOR + 16}" text-anchor="middle">{text(said)}</text>')
    if some_free:
        parts.append(
            f'<path d="M{LEFT + EDGE} {TOP}V{FLOOR}" stroke="var(--soft)" stroke-dasharray="2 3"/>'
        )
        middle = LEFT + EDGE / 2
        parts.append(
            f'<text x="{middle}" y="{FLOOR + 16}" text-anchor="middle">{text(edge)}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{FLOOR + 36}" text-anchor="middle">{text(axis)}</text>'
    )
    parts.append(_front(points, at))
    taken = [at(p) for p in points]
    for point in points:
        x, y = at(point)
        fill = colour(point.series)
        parts.append(
            f'<path d="M{x:.5g} {y_of(point.low):.5g}V{y_of(point.high):.5g}" stroke="{fill}" stroke-opacity=".55"/>'
            f'<path transform="translate({x:.5g} {y:.5g})" d="{MARKS[point.mark % len(MARKS)]}" fill="{fill}">'
            f"<title>{text(point.name)}: {100 * point.value:.1f} % at {text(shown(point.cost))}</title></path>"
        )
    for point in sorted(points, key=lambda p: p.place):
        x, y = _free_place(*at(point), taken)
        taken.append((x, y))
        parts.append(
            f'<text x="{x:.5g}" y="{y + 4:.5g}" text-anchor="middle" font-size="11">{point.place}</text>'
        )
    return "".join([*parts, "</svg>"])


def _front(points: Sequence[Point], at: Callable[[Point], tuple[float, float]]) -> str:
    """Steps through the rows that no cheaper one is as good as."""
    front = [points[i] for i in pareto([p.cost for p in points], [p.value for p in points])]
    (x, y), *rest = map(at, front)
    path = f"M{x:.5g} {y:.5g}" + "".join(f"H{x:.5g}V{y:.5g}" for x, y in rest)
    return (
        f'<path d="{path}H{WIDE - RIGHT}" fill="none" stroke="var(--ink)" stroke-dasharray="5 3"/>'
    )


def _free_place(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Where the number of a mark has room: beside, above or below it, else a step further out."""
    places = [
        (x + side * far, y + down * far)
        for far in (12, 22, 32)
        for side, down in ((1, 0), (-1, 0), (0.7, -0.8), (0.7, 0.8), (-0.7, -0.8), (-0.7, 0.8))
    ]
    free = (
        place
        for place in places
        if LEFT < place[0] < WIDE - 6
        and all(abs(place[0] - u) > 10 or abs(place[1] - v) > 10 for u, v in taken)
    )
    return next(free, places[0])


def _logarithmic(
    costs: Sequence[float], start: int, binary: bool
) -> tuple[Callable[[float], float], list[float]]:
    """Cost → place on the axis, and the costs that are marked on it; a bare axis where nothing costs anything."""
    if not costs:
        return (lambda cost: float(start)), []
    low, high = math.log(min(costs)), math.log(max(costs))
    room = max(0.12 * (high - low), 0.35)
    low, high = low - room, high + room

    def place(cost: float) -> float:
        return start + (WIDE - RIGHT - start) * (math.log(cost) - low) / (high - low)

    base, steps = (2.0, (1,)) if binary else (10.0, (1, 2, 5))
    powers = range(math.floor(low / math.log(base)), math.ceil(high / math.log(base)) + 1)
    found = [step * base**power for power in powers for step in steps]
    found = [tick for tick in found if low <= math.log(tick) <= high]
    if not binary and len(found) > MOST_TICKS:
        found = [tick for tick in found if round(math.log10(tick), 9).is_integer()]
    if len(found) < 2:
        found = sorted({min(costs), max(costs)} if high - low > 4 * room else {min(costs)})
    return place, found[:: math.ceil(len(found) / MOST_TICKS)]


def _percent(points: Sequence[Point]) -> tuple[Callable[[float], float], list[float]]:
    """Score → height, and the percents that lines are drawn at."""
    low = min(min(p.low, p.value) for p in points)
    high = max(max(p.high, p.value) for p in points)
    room = max(0.05 * (high - low), 0.005)
    low, high = max(0.0, low - room), min(1.0, high + room)
    if high - low < 0.01:
        low, high = max(0.0, high - 0.01), max(high, 0.01)
    step = next(s for s in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0) if 100 * (high - low) / s <= MOST_TICKS)
    first = math.ceil(100 * low / step)
    lines = [i * step for i in range(first, math.floor(100 * high / step) + 1)]
    return (lambda value: FLOOR - (FLOOR - TOP) * (value - low) / (high - low)), lines
