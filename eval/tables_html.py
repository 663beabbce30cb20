"""The main table of a comparison, and the values of each seed, as HTML; every row leads to the runs behind it."""

from collections.abc import Mapping

from eval.comparison import Comparison, Row
from eval.formats import BELOW, percent, points, to_csv
from eval.markup import cell, chip, data_link, table, text
from eval.runs import Group, Run

Anchors = Mapping[Run, str]
"""Run → its place on the page."""


def main_table(c: Comparison, series: Mapping[str, int], anchors: Anchors) -> str:
    """Rows × metrics, chance below."""
    gains = any(row.gain for row in c.rows)
    head = ["<th>method · backbone</th>", '<th class="words">space</th>', "<th>seeds</th>"]
    for m in c.columns:
        head.append(heading(c, m))
        if gains and m == c.headline:
            head.append(f"<th>{text(c.name(m))}<small class=soft>minus zero_shot</small></th>")
    best = {m: max(row.cells[m].mean for row in c.rows) for m in c.columns}
    lines: list[str] = []
    for row in c.rows:
        group = row.group
        cells = [row_head(group, series, anchors)]
        cells += [cell(text(group.space), None, "words"), seeds_cell(group, anchors)]
        for m in c.columns:
            classes = ["lead"] * (m == c.headline)
            classes += ["best"] * (row.cells[m].mean == best[m] and len(c.rows) > 1)
            cells.append(metric_cell(c, row, m, *classes))
            cells += [_gain(row)] if gains and m == c.headline else []
        lines.append(f"<tr>{''.join(cells)}</tr>")
    chance = ""
    for m in c.columns:
        chance += f"<td>{percent(c.chance[m]) if m in c.chance else '–'}</td>"
        chance += "<td></td>" * (gains and m == c.headline)
    foot = f'<tr class="chance"><th scope=row>chance</th><td></td><td></td>{chance}</tr>'
    link = data_link(c.question.key().replace("/", "-"), to_csv([c]))
    made = table(head, lines, f"All metrics, {c.title}", foot)
    return f'{made}<p class="csv soft">{link}, all metrics as fractions</p>'


def heading(c: Comparison, metric: str) -> str:
    """A column's name, its category on a line of its own."""
    name, _, category = metric.partition("/")
    below = f"<small class=soft>{text(category)}</small>" if category else ""
    return f"<th>{text(c.name(name))}{below}</th>"


def row_head(group: Group, series: Mapping[str, int], anchors: Anchors) -> str:
    """What a row is: its method, a link to the first of its runs, and its backbone."""
    link = f'<a href="#{anchors[group.runs[0]]}">{text(group.method)}</a>'
    return (
        f"<th scope=row>{chip(series[group.label])}{link}"
        f"<small class=soft>{text(group.backbone)}</small></th>"
    )


def seeds_cell(group: Group, anchors: Anchors) -> str:
    """The seeds of a row, each a link to its run; sorted by their number."""
    links = ", ".join(f'<a href="#{anchors[run]}">{run.seed}</a>' for run in group.runs)
    return cell(links, len(group.runs), "seeds")


def metric_cell(c: Comparison, row: Row, metric: str, *classes: str) -> str:
    """Mean ± spread, and the interval below it."""
    found = row.cells[metric]
    shown = percent(found.mean) + (f" ± {100 * found.std:.1f}" if found.std is not None else "")
    if c.is_below_chance(row, metric):
        shown = f'<span class="below" title="below chance">{shown} {BELOW}</span>'
    if found.low is not None and found.high is not None:
        shown += f"<small class=soft>[{percent(found.low)}, {percent(found.high)}]</small>"
    return cell(shown, found.mean, *classes)


def _gain(row: Row) -> str:
    """Difference to zero-shot, coloured where it is larger than its uncertainty."""
    if row.gain is None:
        return cell("–")
    sign = ("up" if row.gain.estimate > 0 else "down") if row.gain.excludes_zero else ""
    return cell(
        f'<span class="{sign}">{points(row.gain.estimate)}</span>'
        f"<small class=soft>[{points(row.gain.low)}, {points(row.gain.high)}]</small>",
        row.gain.estimate,
    )


def seed_values(c: Comparison, anchors: Anchors) -> str:
    """Every seed's value of every metric of the main table, folded away."""
    head = ["<th>method · backbone</th>", "<th>seed</th>"]
    head += [heading(c, m) for m in c.columns]
    lines: list[str] = []
    for row in c.rows:
        for i, run in enumerate(row.group.runs):
            values = (row.cells[m].seeds[i] for m in c.columns)
            cells = "".join(cell(percent(value, 2), value) for value in values)
            seed = cell(f'<a href="#{anchors[run]}">{run.seed}</a>', run.seed)
            lines.append(f"<tr><th scope=row>{text(row.group.label)}</th>{seed}{cells}</tr>")
    made = table(head, lines, f"Values of each seed, {c.title}")
    return f"<details><summary>Values of each seed</summary>{made}</details>"
