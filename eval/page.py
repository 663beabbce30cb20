"""Comparisons as one HTML page: tables, plots, pictures, the provenance of every run; nothing is loaded from elsewhere.

No script: a page that is printed, mailed or opened on a phone shows the same. Words that come from files are escaped.
"""

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.comparison import Comparison, Row
from eval.composed_pictures import composed_of
from eval.diagnostic_figures import diagnostics_of
from eval.figures import figures_of, trained, training_figure
from eval.formats import BELOW, percent, to_csv
from eval.markup import chip, data_link, text
from eval.orderings_format import TITLE as ORDERINGS
from eval.pictures import pictures_of
from eval.runs import Run

TITLES = {
    "czsl": "Compositional zero-shot learning",
    "matching": "Compositional matching",
    "retrieval": "Image–text retrieval",
    "composed": "Composed image retrieval",
}
READING = {
    "czsl": "auc is the area under the seen–unseen curve as a bias moves from seen to unseen pairs; best_hm is its "
    "best harmonic mean; best_seen and best_unseen are its ends, which cannot be had together; the accuracies are "
    "without bias.",
    "matching": "i2t: each image prefers its own caption; t2i: each caption prefers its own image; group_score: both. "
    "accuracy: one image prefers its true caption. A tie is a miss.",
    "retrieval": "recall@K: a right answer is among the K best; map@K: mean average precision at K. A tie with a wrong "
    "answer counts against.",
    "composed": "A query is a reference image and an edit in words. recall@K: the right image is among the K best; "
    "map@K: mean average precision at K; avg: the benchmark's own mean. A tie with a wrong answer counts against.",
}


def render(
    runs: Sequence[Run],
    comparisons: Sequence[Comparison],
    title: str,
    below: Sequence[str] = (),
    claims: str = "",
) -> str:
    """The whole page; `below` holds HTML to stand under each comparison, `claims` that of claimed orderings."""
    under = dict(zip(map(id, comparisons), below, strict=False))
    groups = [row.group for c in comparisons for row in c.rows]
    methods = list(dict.fromkeys(group.method for group in groups))
    series = {group.label: methods.index(group.method) for group in groups}
    sections: list[tuple[str, str, str]] = []
    if claims:
        sections.append(("orderings", ORDERINGS, claims))
    for dataset, kind in dict.fromkeys((c.question.dataset, c.question.kind) for c in comparisons):
        mine = [c for c in comparisons if (c.question.dataset, c.question.kind) == (dataset, kind)]
        heading = f"{TITLES[kind]}, {dataset}"
        body = f'<p class="soft">{text(READING[kind])}</p>'
        sections.append(
            (
                f"{kind}-{dataset}",
                heading,
                body + "".join(_comparison(c, series) + under.get(id(c), "") for c in mine),
            )
        )
    curves = "".join(training_figure(group, series) for group in trained(runs))
    if curves:
        sections.append(("training", "Training", f'<div class="plots">{curves}</div>'))
    pictures = "".join(pictures_of(run) for run in runs)
    if pictures:
        sections.append(("pictures", "What heads look at", _PICTURE_TEXT + pictures))
    answers = "".join(composed_of(run) for run in runs)
    if answers:
        sections.append(("answers", "What composed queries get", _ANSWER_TEXT + answers))
    sections.append(("runs", "Runs", _provenance(runs)))
    sections.append(("reading", "How to read the numbers", _HOW))
    page = string.Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=text(title),
        summary=_summary(runs, comparisons),
        nav="".join(f'<a href="#{text(i)}">{text(name)}</a>' for i, name, _ in sections),
        body="\n".join(
            f'<section id="{text(i)}"><h2>{text(name)}</h2>{body}</section>'
            for i, name, body in sections
        ),
    )


_PICTURE_TEXT = (
    '<p class="soft">Each map is clear where its weight is largest and dark where it is smallest; the two numbers '
    "under it say what these are. Brightness does not compare between maps, and where the numbers are close the map is "
    "nearly flat, whatever it looks like. Items are the first of every category, not chosen.</p>"
)

_ANSWER_TEXT = (
    '<p class="soft">A row is a query: its reference picture, the edit in words, and the best images of what it ranks '
    "with their scores; right ones have a green frame and a ✓. Of equal scores a wrong image comes first. Queries are "
    "the first of each kind of edit, then the second of each, not chosen.</p>"
)

_HOW = f"""
<p>All numbers are percent. <b>±</b> is the standard deviation over training seeds; <b>[ , ]</b> a 95 % bootstrap
interval over test items and seeds together (1,000 resamples; with two or three seeds it still understates their
spread). “− zero_shot” is the paired difference to the frozen backbone itself on the same resampled items, coloured
where its interval does not contain 0. No correction for many comparisons is made.</p>
<p><b>chance</b> is what random scores get. <span class="below">{BELOW}</span> marks a mean below it. “–” is a metric
that does not exist for the data.</p>
<p>Rows of different score spaces (cosine, logit, probability) measure CZSL curves differently: compare them with care.
The <b>exact</b> curve is for comparing rows of this page; published numbers use the <b>legacy</b> curve.</p>
"""


def _summary(runs: Sequence[Run], comparisons: Sequence[Comparison]) -> str:
    """One line: how many of what."""
    parts: list[str] = []
    for noun, names in (
        ("backbone", {r.backbone for r in runs}),
        ("method", {r.name for r in runs}),
        ("data set", {c.question.dataset for c in comparisons} or {r.dataset for r in runs}),
    ):
        shown = ", ".join(sorted(names)) if len(names) <= 8 else ""
        parts.append(
            f"{len(names)} {noun}{'s' * (len(names) != 1)}" + (f" ({shown})" if shown else "")
        )
    seeds = len({r.seed for r in runs})
    return text(f"{len(runs)} runs: {'; '.join(parts)}; {seeds} seed{'s' * (seeds != 1)}.")


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _comparison(c: Comparison, series: Mapping[str, int]) -> str:
    """One table with its facts, plots and the values of each seed."""
    q = c.question
    facts = [("split", q.split), ("world", q.world), ("form", q.variant)]
    facts += [("k", str(c.k)), ("curve", c.curve)] if c.curve else []
    spaces = ", ".join(dict.fromkeys(row.group.space for row in c.rows))
    facts += [("score space", spaces), ("seeds", c.seeds.split(" ")[0])]
    chips = "".join(f"<li>{name} <b>{text(value)}</b></li>" for name, value in facts if value)
    heading = (
        ""
        if c.curve != "legacy"
        else "<h3>The same on the legacy curve, for comparison with published numbers</h3>"
    )
    parts = [
        heading,
        f'<ul class="facts">{chips}</ul>',
        f'<p class="soft">{text(c.counts)}; {c.seeds}.</p>',
        _table(c, series),
    ]
    parts += [f'<p class="note">{text(note)}</p>' for note in c.notes]
    parts += [figures_of(c, series), diagnostics_of(c, series), _seed_values(c)]
    return "".join(parts)


def _table(c: Comparison, series: Mapping[str, int]) -> str:
    """The main table: rows × metrics, chance last."""
    gains = any(row.gain for row in c.rows)
    head = ["<th>method · backbone</th>", '<th class="words">space</th>', "<th>seeds</th>"]
    for m in c.columns:
        head.append(_heading(c, m))
        if gains and m == c.headline:
            head.append(f"<th>{text(c.name(m))}<small class=soft>minus zero_shot</small></th>")
    head += ["<th>parameters</th>", "<th>training<small class=soft>seconds</small></th>"]
    best = {m: max(row.cells[m].mean for row in c.rows) for m in c.columns}
    lines = [f"<tr>{''.join(head)}</tr></thead><tbody>"]
    for row in c.rows:
        group = row.group
        name = f"{text(group.method)}<small class=soft>{text(group.backbone)}</small>"
        cells = [f"<th scope=row>{chip(series[group.label])}{name}</th>"]
        cells += [f'<td class="words">{text(group.space)}</td>', f"<td>{len(group.runs)}</td>"]
        for m in c.columns:
            classes = ["lead"] * (m == c.headline) + ["best"] * (
                row.cells[m].mean == best[m] and len(c.rows) > 1
            )
            cells.append(f'<td class="{" ".join(classes)}">{_cell(c, row, m)}</td>')
            cells += [_gain(row)] if gains and m == c.headline else []
        cells += [_mean_fact(row, "parameters", "{:,.0f}"), _mean_fact(row, "seconds", "{:.1f}")]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    chance = ""
    for m in c.columns:
        chance += f"<td>{percent(c.chance[m]) if m in c.chance else '–'}</td>"
        chance += "<td></td>" * (gains and m == c.headline)
    lines.append(
        f'<tr class="chance"><th scope=row>chance</th><td></td><td></td>{chance}<td></td><td></td></tr>'
    )
    link = data_link(c.question.key().replace("/", "-"), to_csv([c]))
    caption = f'<p class="csv soft">{link}, all metrics as fractions</p>'
    return f'<div class="wide" tabindex="0"><table><thead>{"".join(lines)}</tbody></table></div>{caption}'


def _heading(c: Comparison, metric: str) -> str:
    """A column's name, its category on a line of its own."""
    name, _, category = metric.partition("/")
    below = f"<small class=soft>{text(category)}</small>" if category else ""
    return f"<th>{text(c.name(name))}{below}</th>"


def _cell(c: Comparison, row: Row, metric: str) -> str:
    """Mean ± spread, and the interval below it."""
    cell = row.cells[metric]
    shown = percent(cell.mean) + (f" ± {100 * cell.std:.1f}" if cell.std is not None else "")
    if c.is_below_chance(row, metric):
        shown = f'<span class="below" title="below chance">{shown} {BELOW}</span>'
    if cell.low is not None and cell.high is not None:
        shown += f"<small class=soft>[{percent(cell.low)}, {percent(cell.high)}]</small>"
    return shown


def _gain(row: Row) -> str:
    """Difference to zero-shot, coloured where it is larger than its uncertainty."""
    if row.gain is None:
        return "<td>–</td>"
    sign = ("up" if row.gain.estimate > 0 else "down") if row.gain.excludes_zero else ""
    low, high = 100 * row.gain.low, 100 * row.gain.high
    return (
        f'<td><span class="{sign}">{100 * row.gain.estimate:+.1f}</span>'
        f"<small class=soft>[{low:+.1f}, {high:+.1f}]</small></td>"
    )


def _mean_fact(row: Row, name: str, form: str) -> str:
    """A number of run.json, averaged over seeds."""
    found = [
        run.facts[name] for run in row.group.runs if isinstance(run.facts.get(name), int | float)
    ]
    return f"<td>{form.format(np.mean(found)) if found else '–'}</td>"


def _seed_values(c: Comparison) -> str:
    """Every seed's value of every metric of the main table, folded away."""
    head = "".join(f"<th>{text(c.name(m))}</th>" for m in c.columns)
    lines = [
        f"<tr><th scope=row>{text(row.group.label)}</th><td>{run.seed}</td>"
        + "".join(f"<td>{percent(row.cells[m].seeds[i], 2)}</td>" for m in c.columns)
        + "</tr>"
        for row in c.rows
        for i, run in enumerate(row.group.runs)
    ]
    return (
        "<details><summary>Values of each seed</summary><div class=wide tabindex=0><table><thead><tr>"
        f"<th>method · backbone</th><th>seed</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div></details>"
    )


# ── provenance ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _provenance(runs: Sequence[Run]) -> str:
    """Where every number comes from: directory, configuration, cache fingerprint, versions."""
    lines: list[str] = []
    for run in runs:
        cache: dict[str, Any] = run.facts.get("cache") or {}
        fingerprint = str(run.facts.get("fingerprint") or cache.get("fingerprint") or "–")
        record = text(json.dumps(dict(run.facts), indent=1, ensure_ascii=False)).replace(
            "\\x0a", "\n"
        )
        tables = ", ".join(run.tables) or "none"
        lines.append(
            f"<tr><th scope=row>{text(run.name)}<small class=soft>{text(run.backbone)}</small></th>"
            f"<td>{run.seed}</td>"
            f'<td class="words">{text(run.dataset)}</td><td class="words"><code>{text(fingerprint[:12])}</code></td>'
            f'<td class="words"><code>{text(run.path)}</code><small class=soft>{text(tables)}</small></td>'
            f'<td class="words"><details><summary>run.json</summary><pre><code>{record}</code></pre></details></td>'
            "</tr>"
        )
    return (
        "<div class=wide tabindex=0><table><thead><tr><th>method · backbone</th><th>seed</th>"
        "<th class=words>data set</th><th class=words>cache</th>"
        "<th class=words>directory</th><th class=words>record</th></tr></thead><tbody>"
        f"{''.join(lines)}</tbody></table></div>"
    )
