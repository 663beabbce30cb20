"""A comparison as markdown (percent, for people) and as CSV (fractions, for programs)."""

import csv
import io
from collections.abc import Iterable, Sequence

import numpy as np

from eval.bootstrap import Interval
from eval.comparison import Comparison, Row
from eval.costs import COSTS, mean_cost, seed_costs
from eval.leaderboard import leaderboard
from eval.pairwise import FEW, Pairs
from eval.table import plain

CSV_HEAD = (
    *(
        "dataset",
        "task",
        "variant",
        "split",
        "world",
        "k",
        "curve",
        "backbone",
        "method",
        "space",
        "metric",
    ),
    *(
        "seeds",
        "mean",
        "std",
        "low",
        "high",
        "chance",
        "minus_zero_shot",
        "minus_low",
        "minus_high",
        "seed_values",
    ),
    *("source", "note"),
    "seeds_other",
    *("place", "tied", "p", "p_holm"),
)
"""Lines are metrics of rows, costs of rows (bytes, seconds, numbers), or differences of two rows.

`seeds_other` is of differences alone: the seeds of the row that is taken away; so are `p` and `p_holm`. `place` and
`tied` (with the best) are of the headline.
"""

BELOW = "▼"
"""Marks a value below chance."""


def percent(value: float, digits: int = 1, sign: str = "") -> str:
    """A fraction as percent, with more digits where it would else read 0.0; `sign` is "" or "+"."""
    shown = f"{100 * value:{sign}.{digits}f}"
    return shown if float(shown) or not value else f"{100 * value:{sign}.2g}"


def points(difference: float) -> str:
    """A difference in points with its sign; none for what rounds to 0."""
    shown = f"{100 * difference:+.1f}"
    return "0.0" if float(shown) == 0 else shown


def p_words(p: float | None) -> str:
    """A p-value for people, who need not tell small ones apart."""
    if p is None:
        return "no p"
    if p < 0.001:
        return "p < 0.001"
    return "p = 1" if p >= 0.995 else f"p = {p:.2g}"


def unknown_pairs(pairs: Pairs) -> str:
    """That some pairs, or all, cannot be decided, and why; nothing where all can."""
    if not pairs.unknown:
        return ""
    if pairs.items < FEW:
        return f"No pair has a p, and none is decided: {pairs.items} items are too few to judge a difference by."
    which = "All" if pairs.unknown == len(pairs.all) else f"{pairs.unknown} of the {len(pairs.all)}"
    return (
        f"{which} pairs have no p and are never decided: a row of theirs is trained under one seed, so that what "
        "training varies is unknown. Train further seeds."
    )


def signed(gain: Interval, digits: int = 1) -> str:
    """A difference in points with its interval."""
    shown = (percent(v, digits, "+") for v in (gain.estimate, gain.low, gain.high))
    estimate, low, high = (f"+{abs(float(s)):.{digits}f}" if float(s) == 0 else s for s in shown)
    return f"{estimate} [{low}, {high}]"


def markdown_table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a table, its columns as wide as they must be.

    Args:
        rows: cells as they are, the head first.
        right: columns that stand at the right.

    """
    shown = [[plain(cell).replace("|", "\\|") for cell in row] for row in rows]
    width = [max(map(len, column)) for column in zip(*shown, strict=True)]
    rule = ["-" * (w - 1) + ":" if i in right else "-" * w for i, w in enumerate(width)]
    return [
        "| "
        + " | ".join(
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, width, strict=True))
        )
        + " |"
        for row in (shown[0], rule, *shown[1:])
    ]


def markdown(comparisons: Sequence[Comparison]) -> str:
    """All comparisons as markdown, in percent."""
    return "\n".join(_markdown(comparison) for comparison in comparisons)


def _markdown(comparison: Comparison) -> str:
    """One table with its title, chance row and notes."""
    gains = any(row.gain for row in comparison.rows)
    names = [comparison.name(m) for m in comparison.columns]
    head = ["backbone", "method", "space", "seeds", *names]
    head += [f"{comparison.name(comparison.headline)} − zero_shot"] if gains else []
    body: list[list[str]] = []
    for row in comparison.rows:
        cells = [_cell(comparison, row, m) for m in comparison.columns]
        group = row.group
        line = [group.backbone, group.method, group.space, str(len(group.runs)), *cells]
        body.append(line + ([signed(row.gain) if row.gain else "–"] if gains else []))
    lines = [
        percent(comparison.chance[m]) if m in comparison.chance else "–" for m in comparison.columns
    ]
    body.append(["", "*chance*", "", "", *lines] + (["–"] if gains else []))
    text = [f"### {plain(comparison.title)}", "", f"{comparison.counts}; {comparison.seeds}", ""]
    text += [*markdown_table([head, *body], right=range(3, len(head))), ""]
    text += _board(comparison)
    if any(
        comparison.is_below_chance(row, m) for row in comparison.rows for m in comparison.columns
    ):
        text += [f"{BELOW} below chance", ""]
    return "\n".join(text + [f"Note: {plain(note)}\n" for note in comparison.notes])


def _board(c: Comparison) -> list[str]:
    """Lines of the leaderboard with costs and corrected differences; none for a single row."""
    entries = leaderboard(c)
    if not entries or c.pairs is None:
        return []
    name = c.name(c.headline)
    costs = [f"{cost.title} ({cost.unit})" for cost in COSTS]
    head = ["place", "backbone", "method", name, "− best", "p", "− zero_shot", "p", *costs]
    body: list[list[str]] = []
    for entry in entries:
        group = entry.row.group
        line = [f"{entry.place}{' ≈' * entry.is_tied}", group.backbone, group.method]
        line.append(_cell(c, entry.row, c.headline))
        for found in (entry.behind, entry.gain):
            line += [signed(found.interval), _p(found.corrected)] if found else ["–", "–"]
        for cost in COSTS:
            value = mean_cost(group, cost.name)
            line.append("–" if value is None else cost.shown(value))
        body.append(line)
    m, decided = len(c.pairs.all), sum(found.is_decided for found in c.pairs.all)
    return [
        f"#### Leaderboard by {name}",
        "",
        f"≈ cannot be told apart from the best; p by Holm over the {m - c.pairs.unknown} pairs that have one; of "
        f"{m} pairs {decided} {'is' if decided == 1 else 'are'} decided",
        "",
        *([unknown_pairs(c.pairs), ""] if c.pairs.unknown else []),
        *markdown_table([head, *body], right=[0, *range(3, len(head))]),
        "",
    ]


def _p(p: float | None) -> str:
    """Of a column that is called p."""
    return "–" if p is None else p_words(p).removeprefix("p ").removeprefix("= ")


def _cell(comparison: Comparison, row: Row, metric: str) -> str:
    """Mean, spread over seeds, interval; marked below chance."""
    cell = row.cells[metric]
    text = percent(cell.mean)
    if cell.std is not None:
        text += f" ± {100 * cell.std:.1f}"
    if cell.low is not None and cell.high is not None:
        text += f" [{percent(cell.low)}, {percent(cell.high)}]"
    return f"{text} {BELOW}" if comparison.is_below_chance(row, metric) else text


def to_csv(comparisons: Sequence[Comparison]) -> str:
    """Every metric of every row, one a line, as fractions."""
    rows: list[Sequence[object]] = [CSV_HEAD]
    for c in comparisons:
        places = {entry.number: entry for entry in leaderboard(c)}
        for number, row in enumerate(c.rows):
            for metric, cell in row.cells.items():
                gain = row.gain if metric == c.headline else None
                entry = places.get(number) if metric == c.headline else None
                ranked = [entry.place, int(entry.is_tied)] if entry else []
                facts = _facts(c)
                facts += [row.group.backbone, row.group.method, row.group.space, c.name(metric)]
                numbers = [cell.mean, cell.std, cell.low, cell.high, c.chance.get(metric)]
                numbers += [gain.estimate, gain.low, gain.high] if gain else [None] * 3
                seeds = " ".join(
                    f"{r.seed}:{v:.6g}" for r, v in zip(row.group.runs, cell.seeds, strict=True)
                )
                rows.append([*facts, len(cell.seeds), *numbers, seeds, "", "", "", *ranked])
        if c.curve != "legacy":
            rows += _cost_lines(c)
        rows += _pair_lines(c)
    return csv_text(rows)


def _facts(c: Comparison) -> list[object]:
    """The first columns of every line of a comparison."""
    q = c.question
    return [q.dataset, q.kind, q.variant, q.split, q.world, c.k, c.curve]


def _cost_lines(c: Comparison) -> list[Sequence[object]]:
    """What each row costs, as far as its runs say it: mean over the seeds that do."""
    rows: list[Sequence[object]] = []
    for row in c.rows:
        g = row.group
        for cost in COSTS:
            found = list(zip(g.runs, seed_costs(g, cost.name), strict=True))
            known = [(run, value) for run, value in found if value is not None]
            if not known:
                continue
            mean = float(np.mean([value for _, value in known]))
            seeds = " ".join(f"{run.seed}:{value:.6g}" for run, value in known)
            facts = [*_facts(c), g.backbone, g.method, g.space, cost.name, len(known), mean]
            rows.append([*facts, *[None] * 7, seeds])
    return rows


def _pair_lines(c: Comparison) -> list[Sequence[object]]:
    """Every difference of two rows: its interval, p-value, Holm's, and whether it is decided."""
    rows: list[Sequence[object]] = []
    for found in c.pairs.all if c.pairs else ():
        a, b = c.rows[found.ours].group, c.rows[found.theirs].group
        names = [
            _both(a.backbone, b.backbone),
            f"{a.method} minus {b.method}",
            _both(a.space, b.space),
        ]
        i = found.interval
        numbers = [i.estimate, None, i.low, i.high, *[None] * 6]
        verdict = "decided" if found.is_decided else "undecided"
        metric = f"difference of {c.name(c.headline)}"
        ps = [None, None, found.p, found.corrected]
        rows.append([*_facts(c), *names, metric, len(a.runs), *numbers, verdict, len(b.runs), *ps])
    return rows


def _both(ours: str, theirs: str) -> str:
    """One name where both are equal."""
    return ours if ours == theirs else f"{ours} minus {theirs}"


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Lines of the report's CSV, in the columns of `CSV_HEAD`; empty cells at a line's end may be left out."""
    return csv_table([*row, *[None] * (len(CSV_HEAD) - len(row))] for row in rows)


def csv_table(rows: Iterable[Sequence[object]]) -> str:
    """Rows of values as CSV, a line each; see `csv_cell`."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(map(csv_cell, row) for row in rows)
    return buffer.getvalue()


def csv_cell(value: object) -> str:
    """A CSV cell; text that a spreadsheet would take for a formula is marked as text."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = plain(str(value))
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
