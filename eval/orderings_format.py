"""Verdicts on claimed orderings as markdown, HTML and CSV; what does not hold is said as plainly as what does."""

from collections.abc import Mapping, Sequence

from eval.formats import csv_text, markdown_table, signed
from eval.markup import text
from eval.orderings import DECISIONS, Ordering, Verdict, unmeasured
from eval.table import plain

TITLE = "Claimed orderings"
HEAD = ("claim", "metric", "backbone", "task", "difference", "seeds", "verdict", "who says so")
_COLOURS = {"holds": "up", "does not hold": "down", "not decided": ""}


def summary(verdicts: Sequence[Verdict]) -> str:
    """One sentence: how many hold, how many do not."""
    n = {decision: sum(v.decision == decision for v in verdicts) for decision in DECISIONS}
    many = "s" * (len(verdicts) != 1)
    return (
        f"{len(verdicts)} difference{many} measured: the claim holds in {n['holds']}, does not hold in "
        f"{n['does not hold']}, and is not decided in {n['not decided']}. In points, with the paired 95 % interval "
        "over test items and seeds, of which a row of one seed adds no variation of its own; not corrected for their "
        "number."
    )


def sentences(orderings: Sequence[Ordering], verdicts: Sequence[Verdict]) -> list[str]:
    """What the table cannot show: claims that were not measured."""
    return [
        f"Not measured: {o.words()} in {o.metric}{f', {o.world} world' if o.world else ''} ({o.says}); no backbone "
        "here has both rows with this metric."
        for o in unmeasured(orderings, verdicts)
    ]


def as_markdown(verdicts: Sequence[Verdict], notes: Sequence[str] = ()) -> str:
    """A table and the sentences below it."""
    lines = [f"### {TITLE}", ""]
    if verdicts:
        lines += [summary(verdicts), "", *markdown_table([HEAD, *map(_cells, verdicts)]), ""]
    return "\n".join([*lines, *(f"Note: {plain(note)}\n" for note in notes)])


def as_html(verdicts: Sequence[Verdict], notes: Sequence[str] = ()) -> str:
    """A table with a column a backbone and the sentences below it, without a heading."""
    parts: list[str] = []
    if verdicts:
        backbones = list(dict.fromkeys(v.backbone for v in verdicts))
        rows: dict[tuple[Ordering, int, object], dict[str, Verdict]] = {}
        for v in verdicts:
            rows.setdefault((v.ordering, id(v.comparison), v.spaces), {})[v.backbone] = v
        head = "".join(f'<th class="words">{text(n)}</th>' for n in ("metric", *backbones))
        body = "".join(_html_row(found, backbones) for found in rows.values())
        parts.append(
            f'<p class="soft">{text(summary(verdicts))}</p><div class="wide" tabindex="0"><table><thead><tr>'
            f"<th>claim, and who says so</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return "".join([*parts, *(f'<p class="note">{text(note)}</p>' for note in notes)])


def csv_lines(verdicts: Sequence[Verdict]) -> str:
    """Lines to stand behind `formats.to_csv`, in its columns: fractions, the verdict as note."""
    lines: list[Sequence[object]] = []
    for v in verdicts:
        c, o = v.comparison, v.ordering
        q = c.question
        facts = [q.dataset, q.kind, q.variant, q.split, q.world, c.k, c.curve, v.backbone]
        facts += [f"{o.better} minus {o.than}", _spaces(v, " minus ")]
        facts += [f"difference of {c.name(o.metric)}", v.seeds[0]]
        numbers = [v.interval.estimate, None, v.interval.low, v.interval.high, *[None] * 5]
        lines.append([*facts, *numbers, o.says, v.words(), v.seeds[1]])
    return csv_text(lines)


def _cells(v: Verdict) -> list[str]:
    o, metric = v.ordering, v.comparison.name(v.ordering.metric)
    return [o.words(), metric, v.backbone, _task(v), _points(v), _seeds(v), v.words(), o.says]


def _html_row(found: Mapping[str, Verdict], backbones: Sequence[str]) -> str:
    """One claim in one comparison; "–" for a backbone that lacks one of the rows."""
    v = next(iter(found.values()))
    metric = text(v.comparison.name(v.ordering.metric))
    cells = [f'<td class="words">{metric}<small class=soft>{text(_task(v))}</small></td>']
    cells += [_html_cell(found[name]) if name in found else "<td>–</td>" for name in backbones]
    claim = f"{text(v.ordering.words())}<small class=soft>{text(v.ordering.says)}</small>"
    return f"<tr><th scope=row>{claim}</th>{''.join(cells)}</tr>"


def _html_cell(v: Verdict) -> str:
    seeds = f"{_seeds(v)} seed{'s' * (v.seeds != (1, 1))}"
    return (
        f'<td class="words"><span class="{_COLOURS[v.decision]}">{v.words()}</span>'
        f"<small class=soft>{_points(v)}<br>{seeds}</small></td>"
    )


def _task(v: Verdict) -> str:
    q = v.comparison.question
    return " · ".join(w for w in (q.kind, q.variant, q.world, q.dataset, _spaces(v, " − ")) if w)


def _spaces(v: Verdict, minus: str) -> str:
    """Score spaces, where they tell verdicts apart."""
    return minus.join(dict.fromkeys(v.spaces)) if v.spaces else ""


def _points(v: Verdict) -> str:
    """With two digits, as small differences are what is asked for."""
    return signed(v.interval, 2)


def _seeds(v: Verdict) -> str:
    """One number, or both where the rows have not equally many."""
    return " and ".join(str(n) for n in dict.fromkeys(v.seeds))
