"""Runs → one page that needs no network, and the same tables as markdown, CSV and JSON beside it.

Every table shows split, world, k, score space, kind of curve, number of seeds and chance; what lies below chance is
marked.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from eval import orderings_format, page
from eval.comparison import Comparison, compare, metrics
from eval.errors import ScoreTableError
from eval.formats import markdown, to_csv
from eval.orderings import Ordering, judge
from eval.published import Beside, beside
from eval.published_format import as_html, as_markdown, csv_lines
from eval.runs import read_runs


def report(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    k: int = 1,
    title: str = "headstart",
    published: bool = False,
    orderings: Sequence[Ordering] = (),
    legend: str = "",
    notes: Sequence[str] = (),
    draw: Callable[[Sequence[Comparison]], object] | None = None,
) -> list[Path]:
    """Write the page `out`, and beside it the same tables as .md, .csv and, seed by seed, .json.

    Args:
        runs: run directories, or directories of run directories.
        out: the .html or .htm file; missing folders are made, old files replaced.
        k: top-k of CZSL.
        title: heading of the page.
        published: print verified published numbers under the tables that they may be compared with, and under the
            others why none is shown.
        orderings: claims to hold against the runs, in a section of their own (`eval/orderings.py`).
        legend: of their sources.
        notes: sentences on what was compared, such as which rows are missing, and why.
        draw: is called with the comparisons before the page is made, to add pictures of what they show to their runs,
            and to `notes` what there is to say of it.

    Returns:
        The four files: the page, .md, .csv, .json.

    Raises:
        RunError: a run that cannot be read, or two that are the same row and seed.
        ScoreTableError: `out` is no .html file, a damaged score table, or a k above the number of candidates.

    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ScoreTableError(
            f"a report was asked for as {out.name}, but it is a page with .md, .csv and .json beside it: name the "
            f"page, such as {out.name}.html"
        )
    found = read_runs(runs)
    comparisons = compare(found, k=k)
    if draw is not None:
        draw(comparisons)
    theirs: list[Beside | None] = [beside(c) if published else None for c in comparisons]
    pairs = list(zip(comparisons, theirs, strict=True))
    verdicts = judge(comparisons, orderings)
    claims, claims_html = "", ""
    if orderings:
        said = [*orderings_format.sentences(orderings, verdicts), *([legend] if legend else [])]
        claims = orderings_format.as_markdown(verdicts, said)
        claims_html = orderings_format.as_html(verdicts, said)
    below = [as_html(*pair) for pair in pairs]
    blocks = [part for c, b in pairs for part in (markdown([c]), as_markdown(c, b))]
    texts = {
        out: page.render(found, comparisons, title, below, claims_html, notes),
        out.with_suffix(".md"): "\n".join(
            part for part in (*blocks, claims, page.notes_markdown(notes)) if part
        ),
        out.with_suffix(".csv"): to_csv(comparisons)
        + csv_lines(pairs)
        + orderings_format.csv_lines(verdicts),
        out.with_suffix(".json"): json.dumps(metrics(comparisons), indent=1, ensure_ascii=False),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(text, encoding="utf-8", newline="")
        aside.replace(path)
    return list(texts)


def comparison_table(runs: Sequence[str | os.PathLike[str]], *, k: int = 1) -> str:
    """The main tables as markdown, for a terminal."""
    return markdown(compare(read_runs(runs), k=k))
