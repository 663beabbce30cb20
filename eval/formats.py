"""A comparison as markdown (percent, for people) and as CSV (fractions, for programs)."""

import csv
import io
from collections.abc import Iterable, Sequence

from eval.bootstrap import Interval
from eval.comparison import Comparison, Row
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
)
"""`seeds_other` is of differences alone: the seeds of the row that is taken away."""

BELOW = "▼"
"""Marks a value below chance."""


def percent(value: float, digits: int = 1, sign: str = "") -> str:
    """A fraction as percent, with more digits where it would else read 0.0; `sign` is "" or "+"."""
    shown = f"{100 * value:{sign}.{digits}f}"
    return shown if float(shown) or not value else f"{100 * value:{sign}.2g}"


def signed(gain: Interval, digits: int = 1) -> str:
    """A difference in points with its interval."""
    estimate, low, high = (percent(v, digits, "+") for v in (gain.estimate, gain.low, gain.high))
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
    if any(
        comparison.is_below_chance(row, m) for row in comparison.rows for m in comparison.columns
    ):
        text += [f"{BELOW} below chance", ""]
    return "\n".join(text + [f"Note: {plain(note)}\n" for note in comparison.notes])


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
        q = c.question
        for row in c.rows:
            for metric, cell in row.cells.items():
                gain = row.gain if metric == c.headline else None
                facts = [q.dataset, q.kind, q.variant, q.split, q.world, c.k, c.curve]
                facts += [row.group.backbone, row.group.method, row.group.space, c.name(metric)]
                numbers = [cell.mean, cell.std, cell.low, cell.high, c.chance.get(metric)]
                numbers += [gain.estimate, gain.low, gain.high] if gain else [None] * 3
                seeds = " ".join(
                    f"{r.seed}:{v:.6g}" for r, v in zip(row.group.runs, cell.seeds, strict=True)
                )
                rows.append([*facts, len(cell.seeds), *numbers, seeds, "", ""])
    return csv_text(rows)


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
