"""Comparisons as one HTML page: tables, plots, pictures, the provenance of every run; nothing is loaded from elsewhere.

Without its script, which sorts tables, a page shows the same: printed, mailed or opened on a phone. Words that come
from files are escaped.
"""

import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.agreement_html import agreement_of
from eval.breakdown_html import categories_of
from eval.comparison import Comparison
from eval.composed_pictures import composed_of
from eval.cost_figures import cost_figures_of
from eval.diagnostic_figures import diagnostics_of
from eval.failures_html import failures_of
from eval.figures import figures_of, trained, training_figure
from eval.formats import BELOW
from eval.leaderboard_html import leaderboard_of
from eval.markup import text
from eval.orderings_format import TITLE as ORDERINGS
from eval.pictures import pictures_of
from eval.runs import Run
from eval.runs_html import anchors_of, runs_of
from eval.table import plain
from eval.tables_html import Anchors, main_table, seed_values

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


COMPARED = "What was compared"
"""Heading of the notes."""


def notes_markdown(notes: Sequence[str]) -> str:
    """The notes as a section of their own; nothing where there are none."""
    lines = [f"* {plain(note)}" for note in notes]
    return "\n".join([f"### {COMPARED}", "", *lines, ""]) if notes else ""


def render(
    runs: Sequence[Run],
    comparisons: Sequence[Comparison],
    title: str,
    below: Sequence[str] = (),
    claims: str = "",
    notes: Sequence[str] = (),
) -> str:
    """The whole page; `below` holds HTML to stand under each comparison, `claims` that of claimed orderings.

    `notes` are sentences on what was compared.
    """
    under = dict(zip(map(id, comparisons), below, strict=False))
    groups = [row.group for c in comparisons for row in c.rows]
    methods = list(dict.fromkeys(group.method for group in groups))
    anchors = anchors_of(runs)
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
                body
                + "".join(_comparison(c, series, anchors) + under.get(id(c), "") for c in mine),
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
    if notes:
        said = "".join(f'<p class="note">{text(note)}</p>' for note in notes)
        sections.append(("compared", COMPARED, said))
    sections.append(("runs", "Runs", runs_of(runs, anchors)))
    sections.append(("reading", "How to read the numbers", _HOW))
    here = Path(__file__).parent
    page = string.Template((here / "page.html").read_text(encoding="utf-8"))
    return page.substitute(
        script=(here / "page.js").read_text(encoding="utf-8"),
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
spread). “− zero_shot” is the paired difference to the frozen backbone itself on the same resampled items, where it has
one such row and not several; in the tables of all metrics it is coloured where its interval does not contain 0, without
any correction.</p>
<p>Leaderboards correct for many comparisons. p weighs a paired difference against the variance of its items and that of
each row’s seeds, the latter with Student’s quantile: with two or three seeds only large differences are decided. A row
trained under one seed has no p towards any other, as nothing is known of what training varies; it is never told apart.
Nor is anything where there are fewer than 30 items, or clusters of items that are drawn together.
Holm’s procedure then makes all pairs of one table hold together: in simulations of up to five equal rows with 100 or
2,000 items and two, three or five seeds fewer than 5 of 100 tables had a false decision. It is made for each table by
itself, for its headline only, not for categories, other metrics or tables.</p>
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


# ── one question ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _comparison(c: Comparison, series: Mapping[str, int], anchors: Anchors) -> str:
    """Leaderboard, main table with its facts, plots and the values of each seed."""
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
    ]
    if board := leaderboard_of(c, series, anchors):
        parts += [board, "<h3>All metrics</h3>"]
    parts.append(main_table(c, series, anchors))
    parts += [f'<p class="note">{text(note)}</p>' for note in c.notes]
    parts += [seed_values(c, anchors), cost_figures_of(c, series), figures_of(c, series)]
    if c.curve != "legacy":
        parts += [categories_of(c, series), diagnostics_of(c, series)]
        parts += [agreement_of(c, series), failures_of(c, series)]
    return "".join(parts)
