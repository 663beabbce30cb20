"""What `headstart metrics` does for open worlds: a feasibility threshold chosen on val, and used on test unchanged."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from eval.errors import ScoreTableError

if TYPE_CHECKING:
    from eval.any_table import Table


def add_options(metrics: argparse.ArgumentParser) -> None:
    """Add what `metrics` takes for open worlds."""
    group = metrics.add_argument_group("czsl, open world")
    group.add_argument(
        "--select-on",
        type=Path,
        metavar="VAL",
        help="score table whose auc chooses the feasibility threshold",
    )
    group.add_argument(
        "--feasibility",
        type=Path,
        metavar="FILE",
        help="of the pairs, for tables of all scores; a summary holds its own",
    )
    group.add_argument(
        "--mode",
        choices=("neg_inf", "csp_multiply", "compcos_minus_one"),
        default="neg_inf",
        help="what becomes of infeasible pairs: no candidates (default), or as in the releases of CSP and CompCos",
    )
    group.add_argument(
        "--save", type=Path, metavar="NEW", help="write the filtered table, e.g. for a report"
    )


def filter_of(args: argparse.Namespace) -> "Callable[[Table], Table]":
    """What to do to each table before it is measured: nothing, or pruning at the threshold found on --select-on.

    Raises:
        ScoreTableError: options that do not go together, or a table without feasibility.

    """
    if args.select_on is None:
        given = [f"--{n.replace('_', '-')}" for n in ("feasibility", "save") if getattr(args, n)]
        given += ["--mode"] if args.mode != "neg_inf" else []
        if given:
            raise ScoreTableError(
                f"{', '.join(given)} filters by a threshold, which --select-on VAL chooses; add it"
            )
        return lambda table: table
    if len(args.k or [1]) != 1 or (args.save and len(args.scores) != 1):
        raise ScoreTableError(
            "--select-on chooses one threshold for one --k, and --save takes one table"
        )
    from eval import importers, score_io
    from eval.feasibility import Feasibility
    from eval.open_world import select

    k = (args.k or [1])[0]
    file = None if args.feasibility is None else Feasibility.load(args.feasibility)
    val = importers.load(args.select_on)
    use = select(val, file, mode=args.mode, curve=args.curve, k=k, name=str(args.select_on))

    def filtered(table: "Table") -> "Table":
        made = use(table)
        if args.save:
            score_io.save(made, args.save)
        return made

    return filtered
