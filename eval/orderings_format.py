"""Verdicts on claimed orderings as markdown, HTML and CSV; what does not hold is said as plainly as what does."""

from collections.abc import Sequence

from eval.formats import csv_text
from eval.markup import text
from eval.orderings import DECISIONS, Ordering, Verdict, unmeasured
from eval.table import plain

TITLE = "Claimed orderings"
HEAD = ("claim", "metric", "backbone", "task", "difference", "seeds", "verdict", "who says so")
_COLOURS = {"holds": "up", "does not hold": "down", "not decided": ""}


def summary(verdicts: Sequence[Verdict]) -> str:
    """One sentence: how many hold, how many do not."""
    n = {decision: sum(v.verdict == decision for v in verdicts) for decision in DECISIONS}
    many = "s" * (len(verdicts) != 1)
    return (
        f"{len(verdicts)} difference{many} measured: the claim holds in {n['holds']}, does not hold in "
        f"{n['does not hold']}, and is not decided in {n['not decided']}. In points, with the paired 95 % interval "
        "over test items and seeds (over items alone where a row has one seed); not corrected for their number."
    )


def sentences(
    orderings: Sequence[Ordering], verdicts: Sequence[Verdict], left_out: Sequence[str] = ()
) -> list[str]:
    """What the table cannot show: claims that were not measured, and rows that are missing."""
    missing = [
        f"Not measured: {o.words()} in {o.metric} ({o.says}); no backbone here has both rows with this metric."
        for o in unmeasured(orderings, verdicts)
    ]
    return [*missing, *left_out]


def as_markdown(verdicts: Sequence[Verdict], notes: Sequence[str] = ()) -> str:
    """A table and the sentences below it."""
    lines = [f"### {TITLE}", ""]
    if verdicts:
        rows = [HEAD, *map(_cells, verdicts)]
        shown = [[plain(cell).replace("|", "\\|") for cell in row] for row in rows]
        width = [max(len(row[i]) for row in shown) for i in range(len(HEAD))]
        shown.insert(1, ["-" * w for w in width])
        lines += [summary(verdicts), ""]
        lines += [
            f"| {' | '.join(c.ljust(w) for c, w in zip(row, width, strict=True))} |"
            for row in shown
        ]
        lines.append("")
    return "\n".join([*lines, *(f"Note: {plain(note)}\n" for note in notes)])


def as_html(verdicts: Sequence[Verdict], notes: Sequence[str] = ()) -> str:
    """The same as HTML, without a heading."""
    parts: list[str] = []
    if verdicts:
        head = "".join(f'<th class="words">{text(cell)}</th>' for cell in HEAD)
        body = "".join(map(_html_row, verdicts))
        parts.append(
            f'<p class="soft">{text(summary(verdicts))}</p><div class="wide" tabindex="0"><table><thead><tr>{head}</tr>'
            f"</thead><tbody>{body}</tbody></table></div>"
        )
    return "".join([*parts, *(f'<p class="note">{text(note)}</p>' for note in notes)])


def csv_lines(verdicts: Sequence[Verdict]) -> str:
    """Lines to stand behind `formats.to_csv`, in its columns: fractions, the verdict as note."""
    lines: list[Sequence[object]] = []
    for v in verdicts:
        c, o = v.comparison, v.ordering
        q = c.question
        facts = [q.dataset, q.kind, q.variant, q.split, q.world, c.k, c.curve, v.backbone]
        facts += [f"{o.better} minus {o.than}", "", f"difference of {c.name(o.metric)}"]
        numbers = [v.difference, None, v.low, v.high, *[None] * 5]
        lines.append([*facts, _seeds(v), *numbers, o.says, v.verdict])
    return csv_text(lines)


def _cells(v: Verdict) -> list[str]:
    q, o = v.comparison.question, v.ordering
    task = " · ".join(w for w in (q.kind, q.variant, q.world, q.dataset) if w)
    difference = f"{100 * v.difference:+.2f} [{100 * v.low:+.2f}, {100 * v.high:+.2f}]"
    metric = v.comparison.name(o.metric)
    return [o.words(), metric, v.backbone, task, difference, _seeds(v), v.verdict, o.says]


def _html_row(v: Verdict) -> str:
    claim, metric, backbone, task, difference, seeds, verdict, says = map(text, _cells(v))
    cells = [f'<td class="words">{cell}</td>' for cell in (metric, backbone, task)]
    cells += [f"<td>{difference}</td>", f"<td>{seeds}</td>"]
    cells.append(f'<td class="words"><span class="{_COLOURS[v.verdict]}">{verdict}</span></td>')
    return f'<tr><th scope=row>{claim}</th>{"".join(cells)}<td class="words">{says}</td></tr>'


def _seeds(v: Verdict) -> str:
    """One number, or both where the rows have not equally many."""
    return " and ".join(str(n) for n in dict.fromkeys(v.seeds))
