"""The leaderboard of a question and the differences between all of its rows, as HTML."""

from collections.abc import Mapping, Sequence

from eval.comparison import Comparison
from eval.costs import COSTS, mean_cost
from eval.formats import p_words, points, unknown_pairs
from eval.leaderboard import Entry, leaderboard
from eval.markup import cell, chip, table, text
from eval.pairwise import LEVEL, Difference, Pairs
from eval.tables_html import Anchors, heading, metric_cell, row_head, seeds_cell

TIED = "≈"
"""Marks a row that cannot be told apart from the best."""

MATRIX = 12
"""Rows up to which every difference is on the page; beyond, those to the best and to zero_shot, and all in the CSV."""


def leaderboard_of(c: Comparison, series: Mapping[str, int], anchors: Anchors) -> str:
    """All rows ranked, with what they cost, and the differences between them; nothing for a single row."""
    entries = leaderboard(c)
    if c.pairs is None or not entries:
        return ""
    head = ["<th>method · backbone</th>", heading(c, c.headline), "<th>place</th>"]
    head += ["<th>− best<small class=soft>points</small></th>"]
    gains = any(entry.gain for entry in entries)
    head += ["<th>− zero_shot<small class=soft>points</small></th>"] * gains
    head += [f"<th>{cost.title}<small class=soft>{cost.unit}</small></th>" for cost in COSTS]
    head.append("<th>seeds</th>")
    lines = [_line(c, entry, gains, series, anchors) for entry in entries]
    made = table(head, lines, f"Leaderboard, {c.title}")
    return (
        f'<h3>Leaderboard</h3>{made}<p class="soft">{_says(c.pairs)}</p>'
        f"{_matrix(c, entries, series)}"
    )


def _line(
    c: Comparison, entry: Entry, gains: bool, series: Mapping[str, int], anchors: Anchors
) -> str:
    """One row of the leaderboard."""
    group = entry.row.group
    tied = f' <span title="cannot be told apart from the best">{TIED}</span>' * entry.is_tied
    cells = [row_head(group, series, anchors)]
    cells.append(metric_cell(c, entry.row, c.headline, "lead", *["best"] * (entry.place == 1)))
    cells.append(cell(f"{entry.place}{tied}", entry.place))
    cells.append(_difference(entry.behind, "best"))
    cells += [_difference(entry.gain, "–")] * gains
    for cost in COSTS:
        value = mean_cost(group, cost.name)
        cells.append(cell("–" if value is None else cost.shown(value), value))
    cells.append(seeds_cell(group, anchors))
    first = ' class="tied"' if entry.place == 1 or entry.is_tied else ""
    return f"<tr{first}>{''.join(cells)}</tr>"


def _difference(found: Difference | None, none: str) -> str:
    """Points with their interval and the corrected p-value; coloured where decided."""
    if found is None:
        return cell(none, 0.0 if none == "best" else None)
    return cell(
        f'<span class="{_colour(found)}">{points(found.interval.estimate)}</span>'
        f"<small class=soft>{_interval(found)}</small>"
        f"<small class=soft>{text(p_words(found.corrected))}</small>",
        found.interval.estimate,
    )


def _interval(found: Difference) -> str:
    return f"[{points(found.interval.low)}, {points(found.interval.high)}]"


def _colour(found: Difference) -> str:
    """What is decided has a colour; its sign says the same without one."""
    return ("up" if found.interval.estimate > 0 else "down") if found.is_decided else ""


def _says(pairs: Pairs) -> str:
    """What was compared and how, and which pairs cannot be decided."""
    m, unknown = len(pairs.all), pairs.unknown
    decided = sum(found.is_decided for found in pairs.all)
    if m - unknown <= 1:
        correction = "No more than one pair has a p, so nothing is corrected"
    else:
        correction = (
            f"p is corrected by Holm for the {m - unknown} pairs of this table that have one"
        )
    return (
        f"{TIED}: cannot be told apart from the best. {correction}: {decided} decided (p ≤ {LEVEL}, coloured), "
        f"{m - decided} undecided. Intervals are of each difference alone; p, which gives few seeds their due, may "
        f"leave undecided what an interval separates from 0. {unknown_pairs(pairs)}"
    )


def _matrix(c: Comparison, entries: Sequence[Entry], series: Mapping[str, int]) -> str:
    """Every row minus every other, by place."""
    if c.pairs is None or len(entries) < 3:
        return ""
    if len(entries) > MATRIX:
        return (
            f'<p class="soft">The differences between all {len(entries)} rows, with p-values, are in the CSV below the '
            "next table.</p>"
        )
    places = [f"{n}" for n in range(1, len(entries) + 1)]
    labels = [entry.row.group.label for entry in entries]
    head = [f"<th>row minus column, {text(c.name(c.headline))}</th>"]
    head += [
        f'<th title="{text(label)}">{chip(series[label])}{n}</th>'
        for n, label in zip(places, labels, strict=True)
    ]
    lines: list[str] = []
    for n, label, mine in zip(places, labels, entries, strict=True):
        cells = [f"<th scope=row>{chip(series[label])}{n} · {text(label)}</th>"]
        for other in entries:
            found = c.pairs.between(mine.number, other.number)
            cells.append(_square(found) if found else cell(""))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    made = table(head, lines, f"Differences between all rows, {c.title}")
    return f"<details open><summary>Differences between all rows</summary>{made}</details>"


def _square(found: Difference) -> str:
    """Points and p-value; the interval is its title."""
    return cell(
        f'<span class="{_colour(found)}" title="{_interval(found)}">{points(found.interval.estimate)}</span>'
        f"<small class=soft>{text(p_words(found.corrected))}</small>",
        found.interval.estimate,
    )
