"""Which rows get the same items right, as small tables: backbones under one method, methods on one backbone."""

from collections.abc import Mapping, Sequence

from eval.agreement import Agreement, Circle, agreements, circles
from eval.comparison import Comparison
from eval.correctness import RULES
from eval.figures import names_of
from eval.formats import csv_table, percent
from eval.markup import cell, chip, data_link, table, text

Pairs = Mapping[tuple[int, int], Agreement]

CSV = ("first", "second", "both", "only_first", "only_second", "neither", "kappa", "oracle")


def agreement_of(c: Comparison, series: Mapping[str, int]) -> str:
    """All of it; nothing for one row, and on the legacy curve."""
    groups = circles(c.rows) if c.curve != "legacy" else []
    if not groups:
        return ""
    right, pairs = agreements(c)
    names = names_of(c)
    labels = [names[row.group] for row in c.rows]
    made = "".join(_matrix(c, group, right, pairs, series) for group in groups)
    lines: list[Sequence[object]] = [CSV]
    lines += [
        (labels[p.ours], labels[p.theirs], p.both, p.first, p.second, p.neither, p.kappa, p.oracle)
        for p in pairs.values()
    ]
    rule = RULES[c.question.kind]
    return (
        f'<h3>Which rows get the same items right</h3><p class="soft">An item is right where {rule}, for more than '
        f"half of the seeds. On the diagonal: right items. Above it: Cohen’s kappa (1: the same items, 0: no more in "
        f"common than by chance), and what an oracle gets that always picks the right one of the two. Below it: items "
        f"that the row alone, and the column alone, gets right. In percent, but for kappa. "
        f'{data_link("agreement", csv_table(lines))} of all pairs of rows</p><div class="small">{made}</div>'
    )


def _matrix(
    c: Comparison, group: Circle, right: Sequence[float], pairs: Pairs, series: Mapping[str, int]
) -> str:
    """One circle of rows."""
    rows = [c.rows[i].group for i in group.rows]
    one_method = len({g.method for g in rows}) == 1
    short = [g.backbone if one_method else g.method for g in rows]
    numbers = [str(n) for n in range(1, len(rows) + 1)]
    head = [f"<th>{text(group.name)}</th>"]
    head += [
        f'<th title="{text(name)}">{chip(series[g.label])}{n}</th>'
        for n, name, g in zip(numbers, short, rows, strict=True)
    ]
    lines: list[str] = []
    for n, name, g, i in zip(numbers, short, rows, group.rows, strict=True):
        cells = [f"<th scope=row>{chip(series[g.label])}{n} · {text(name)}</th>"]
        cells += [_square(i, j, right, pairs) for j in group.rows]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return table(head, lines, f"Agreement, {group.name}, {c.title}", sorts=False)


def _square(i: int, j: int, right: Sequence[float], pairs: Pairs) -> str:
    """Right items on the diagonal; above it kappa and oracle; below it what only one gets right."""
    if i == j:
        return cell(percent(right[i]), right[i], "lead")
    found = pairs[min(i, j), max(i, j)]
    if i < j:
        shown = "–" if found.kappa is None else f"{found.kappa:.2f}"
        return cell(f"{shown}<small class=soft>oracle {percent(found.oracle)}</small>")
    mine, other = found.second, found.first  # i is the second of the pair
    return cell(f"{percent(mine)}<small class=soft>column {percent(other)}</small>")
