"""Published rows beside ours, as markdown, HTML and lines of CSV: a block of their own under a table, never ranked.

Nothing here is marked best: the rows share the data, the curve and the backbone, but neither preprocessing, seeds nor
the rule by which a checkpoint was selected.
"""

from collections.abc import Sequence

from eval.comparison import Comparison, Row
from eval.formats import csv_text, percent
from eval.markup import text
from eval.published import Beside, PublishedRow
from eval.table import plain


def heading(c: Comparison, found: Beside) -> str:
    """What the rows have in common."""
    return f"Published beside ours · {c.title} · {found.backbone}"


def as_markdown(c: Comparison, found: Beside | None) -> str:
    """The block, one sentence instead of it, or nothing for the exact curve."""
    if found is None:
        return ""
    if found.why:
        return f"Published: {plain(found.why)}.\n"
    lines = _lines(c, found)
    shown = [[plain(cell).replace("|", "\\|") for cell in line] for line in lines]
    rule = ["---", "---:", *["---:"] * len(found.metrics(c)), "---"]
    body = [f"| {' | '.join(line)} |" for line in (shown[0], rule, *shown[1:])]
    return "\n".join([f"#### {plain(heading(c, found))}", "", *body, ""])


def as_html(c: Comparison, found: Beside | None) -> str:
    """The same as HTML."""
    if found is None:
        return ""
    if found.why:
        return f'<p class="note">Published: {text(found.why)}.</p>'
    head, *lines = _lines(c, found)
    cells = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope=row>{text(line[0])}</th>"
        + "".join(f"<td>{text(cell)}</td>" for cell in line[1:-1])
        + f'<td class="words">{text(line[-1])}</td></tr>'
        for line in lines
    )
    return (
        f"<h4>{text(heading(c, found))}</h4>"
        f'<div class="wide" tabindex="0"><table class="published"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _lines(c: Comparison, found: Beside) -> list[list[str]]:
    """Head, our rows, theirs and chance, as text."""
    metrics = found.metrics(c)
    head = ["method", "seeds", *(c.name(m) for m in metrics), "source"]
    ours = [
        [
            f"ours: {row.group.method}",
            str(len(row.group.runs)),
            *(_mine(row, m) for m in metrics),
            f"this report, space {row.group.space}",
        ]
        for row in found.ours
    ]
    theirs = [
        [row.method, "–", *(_theirs(row, m) for m in metrics), _source(row)]
        for row in found.published
    ]
    chance = [percent(c.chance[m]) if m in c.chance else "–" for m in metrics]
    return [head, *ours, *theirs, ["chance", "", *chance, ""]]


def _mine(row: Row, metric: str) -> str:
    cell = row.cells.get(metric)
    if cell is None:
        return "–"
    return percent(cell.mean) + (f" ± {100 * cell.std:.1f}" if cell.std is not None else "")


def _source(row: PublishedRow) -> str:
    return row.source + (f" ({row.note})" if row.note else "")


def _theirs(row: PublishedRow, metric: str) -> str:
    """With the digits that were printed: one, or two."""
    if metric not in row.values:
        return "–"
    value = round(100 * row.values[metric], 2)
    return f"{value:.1f}" if value == round(value, 1) else f"{value:.2f}"


def csv_lines(pairs: Sequence[tuple[Comparison, Beside | None]]) -> str:
    """Lines to stand behind `formats.to_csv` of the same comparisons, in its columns; fractions, with their sources."""
    lines: list[Sequence[object]] = []
    for c, found in pairs:
        q = c.question
        for row in found.published if found else ():
            for metric, value in row.values.items():
                facts = [q.dataset, q.kind, q.variant, q.split, q.world, c.k, c.curve]
                facts += [row.backbone, row.method, "", c.name(metric), ""]
                numbers = [value, None, None, None, c.chance.get(metric), *[None] * 4]
                lines.append([*facts, *numbers, row.source, row.note])
    return csv_text(lines)
