"""Runs → one page that needs no network, and the same tables as markdown, CSV and JSON beside it.

Every table shows split, world, k, score space, kind of curve, number of seeds and chance; what lies below chance is
marked.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from eval import page
from eval.comparison import compare, metrics
from eval.formats import markdown, to_csv
from eval.runs import read_runs


def report(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    k: int = 1,
    title: str = "headstart",
) -> list[Path]:
    """Write the page `out`, and beside it the same tables as .md, .csv and, seed by seed, .json.

    Args:
        runs: run directories, or directories of run directories.
        out: the .html file; missing folders are made, old files replaced.
        k: top-k of CZSL.
        title: heading of the page.

    Returns:
        The four files, the page first.

    Raises:
        RunError: a run that cannot be read, or two that are the same row and seed.
        ScoreTableError: a damaged score table, or a k above the number of candidates.

    """
    found = read_runs(runs)
    comparisons = compare(found, k=k)
    out = Path(out)
    texts = {
        out: page.render(found, comparisons, title),
        out.with_suffix(".md"): markdown(comparisons),
        out.with_suffix(".csv"): to_csv(comparisons),
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
