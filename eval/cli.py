"""`headstart metrics` and `headstart report`: numbers and pages from score tables and run directories.

Heavy imports wait until a verb runs, so that `--help` is quick.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import cli_open_world, cli_submit
from eval.errors import EvalWarning, ScoreTableError

if TYPE_CHECKING:
    from eval.any_table import Table
    from eval.bootstrap import Interval
    from eval.composed import Ranks


INTERRUPTED, UNREAD = 130, 141
"""Exit status after Ctrl-C, and where nobody reads the output any more, as shells have it of SIGINT and SIGPIPE."""

GIVEN = {
    "split": "train, val or test, where the scores do not say it",
    "space": "cosine, logit or probability, where the scores do not say it",
    "world": "czsl: closed or open, where the scores do not say it",
    "pairs": "file of the pairs of the columns, 'attr obj' a line",
    "train_pairs": "file of the pairs seen in training",
    "split_pairs": "file of the pairs of the split scored; others do not compete",
    "targets": "file of the true pair of every row",
    "qrels": "file of right answers of a retrieval run, 'query 0 document relevance' a line",
}
"""What may be told beside scores that are no table of ours: the fields of `eval.given.Given`."""


def add_verbs(verbs: Any) -> None:
    """Add this room's verbs to what `ArgumentParser.add_subparsers` returns; each sets `func`."""
    metrics = verbs.add_parser(
        "metrics",
        help="numbers of score tables, with chance and intervals",
        description="Print the metrics of score tables, in percent, with chance lines and 95 % bootstrap intervals.",
    )
    metrics.add_argument(
        "scores",
        type=Path,
        nargs="+",
        help="score tables (.zarr) written by `headstart score`, or other people's .npz .npy .csv .trec .run .txt",
    )
    metrics.add_argument(
        "--k",
        type=int,
        nargs="+",
        metavar="K",
        help="czsl: top-k (default: 1); retrieval: the K of recall and map",
    )
    metrics.add_argument(
        "--curve", choices=("exact", "legacy"), default="exact",
        help="czsl: the exact seen-unseen curve, or the procedure of published numbers",
    )  # fmt: skip
    for name, text in GIVEN.items():
        kind = Path if text.startswith("file") else str
        metrics.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    metrics.add_argument("--json", action="store_true", help="print JSON instead, as fractions")
    cli_open_world.add_options(metrics)
    metrics.set_defaults(func=_metrics)
    report = verbs.add_parser(
        "report",
        help="one page comparing runs",
        description="Write a self-contained HTML page comparing runs, and its tables as .md, .csv and .json.",
    )
    report.add_argument(
        "runs", type=Path, nargs="+", help="run directories, or directories of run directories"
    )
    report.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("report.html"),
        help="the page (default: report.html)",
    )
    report.add_argument("--k", type=int, default=1, help="czsl: top-k (default: 1)")
    report.add_argument(
        "--published", action="store_true", help="published numbers beside ours, where both measure the same"
    )  # fmt: skip
    report.add_argument("--title", default="headstart", help="heading of the page")
    report.set_defaults(func=_report)
    cli_submit.add_verb(verbs)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m eval`: the verbs of this room alone, ended as `headstart` ends them; returns the exit status."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # this room talks to nobody but its reader, who has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval", description="Score tables and runs → numbers."
    )
    add_verbs(parser.add_subparsers(dest="verb", required=True))
    args = parser.parse_args(argv)
    said = f"{parser.prog} {args.verb}:"
    try:
        args.func(args)
    except KeyboardInterrupt:
        print(f"\n{said} stopped; what was finished is kept", file=sys.stderr)
        return INTERRUPTED
    except ScoreTableError as error:
        print(f"{said} {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"{said} {what}", file=sys.stderr)
        return 1
    return 0


def _metrics(args: argparse.Namespace) -> None:
    """Print every table's numbers."""
    from eval import importers

    given = {name: getattr(args, name) for name in GIVEN}
    use = cli_open_world.filter_of(args)
    found = [
        _measured(path, use(importers.load(path, **given)), args.k, args.curve)
        for path in args.scores
    ]
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print("\n".join(_shown(entry) for entry in found))


def _measured(path: Path, table: "Table", ks: Sequence[int] | None, curve: Any) -> dict[str, Any]:
    """Facts, metrics, chance and intervals of one table; metrics of k > 1 carry it in their name."""
    from eval import comparison, composed, czsl, matching, retrieval, score_io
    from eval.composed_table import ComposedScores
    from eval.composition import Composition
    from eval.remarks import remarks
    from eval.retrieval import RetrievalScores

    entry: dict[str, Any] = {
        "scores": str(path),
        "task": score_io.kind(table),
        "split": table.split,
    }
    if isinstance(table, Composition):
        entry |= {"world": table.world, "curve": curve, "k": list(ks or [1])}
        entry |= {"feasibility": f} if (f := table.meta.get("feasibility")) else {}
    entry |= {"space": table.space, "seeds": 1, "items": comparison.counts(table)}
    entry |= {"metrics": {}, "chance": {}, "intervals": {}, "notes": remarks(table), "warnings": []}
    if isinstance(table, Composition):
        for k in ks or [1]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", EvalWarning)
                values = czsl.evaluate(table, k=k, curve=curve)
            ranges = _ranges(table, k) if curve == "exact" else {}
            # The formulas for area and harmonic mean are of the exact curve.
            lines = {
                n: v
                for n, v in czsl.chance(table, k=k).items()
                if curve == "exact" or n not in ("auc", "best_hm")
            }
            for name, part in (("metrics", values), ("chance", lines), ("intervals", ranges)):
                entry[name] |= {m if k == 1 else f"{m}@{k}": value for m, value in part.items()}
            entry["warnings"] += [str(w.message) for w in caught]
        return entry
    if isinstance(table, RetrievalScores):
        entry |= {
            "metrics": retrieval.evaluate(table, ks=ks),
            "chance": retrieval.chance(table, ks=ks),
        }
    elif isinstance(table, ComposedScores):
        found = composed.ranks(table, ks)  # one pass over rows that lie on disk
        entry |= {
            "metrics": composed.evaluate(table, ks=ks, found=found),
            "chance": composed.chance(table, ks=ks, found=found),
        }
        return entry | {"intervals": _ranges(table, 1, ks, found)}
    elif ks:
        raise ScoreTableError(
            f"--k was given, but {path} is a matching table, which has no k; leave it out"
        )
    else:
        entry |= {"metrics": matching.evaluate(table), "chance": matching.chance(table)}
    return entry | {"intervals": _ranges(table, 1, ks)}


def _ranges(
    table: "Table", k: int, ks: Sequence[int] | None = None, found: "Ranks | None" = None
) -> dict[str, list[float]]:
    """Metric → low and high."""
    from eval import bootstrap

    ranges: dict[str, Interval] = bootstrap.intervals([table], k=k, ks=ks, found=[found])
    return {name: [interval.low, interval.high] for name, interval in ranges.items()}


def _shown(entry: dict[str, Any]) -> str:
    """One table for people: facts, then a line a metric."""
    from eval.formats import BELOW, percent
    from eval.table import plain

    facts = [entry["task"], f"split {entry['split']}"]
    if "world" in entry:
        ks = ", ".join(map(str, entry["k"]))
        facts += [f"{entry['world']} world", f"k = {ks}", f"{entry['curve']} curve"]
    lines = [
        plain(entry["scores"]),
        f"  {' · '.join([*facts, 'space ' + entry['space'], '1 seed'])}",
        f"  {entry['items']}",
    ]
    width = max(map(len, entry["metrics"]))
    lines += [f"  {'':{width}}  {'%':>7}  {'95 % interval':>15}  {'chance':>7}"]
    for name, value in entry["metrics"].items():
        bias = name.startswith("bias_at_best_hm")  # in units of the scores, not a share
        low_high, chance = entry["intervals"].get(name), entry["chance"].get(name)
        shown = f"{value:.4g}" if bias else percent(value)
        interval = f"[{percent(low_high[0])}, {percent(low_high[1])}]" if low_high else "–"
        line = f"  {name:{width}}  {shown:>7}  {interval:>15}  {percent(chance) if chance is not None else '–':>7}"
        lines.append(
            line + (f"  {BELOW} below chance" if chance is not None and value < chance else "")
        )
    lines += [f"  note: {note}" for note in entry["notes"]]
    return "\n".join([*lines, *(f"  warning: {w}" for w in entry["warnings"]), ""])


def _report(args: argparse.Namespace) -> None:
    """Write the page and print its tables and where everything lies."""
    from eval.report import report

    files = report(args.runs, args.out, k=args.k, title=args.title, published=args.published)
    print(files[0].with_suffix(".md").read_text(encoding="utf-8"))
    print(f"wrote {', '.join(str(path) for path in files)}")


if __name__ == "__main__":
    sys.exit(main())
