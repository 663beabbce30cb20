"""The verb `submit`: what the servers of CIRR and CIRCO take, from a score table of their test split.

headstart submit RUN/scores-test.zarr --out sent      sent/recall.json and sent/recall_subset.json, or sent/circo.json
"""

import argparse
from pathlib import Path
from typing import Any

from eval.errors import ScoreTableError


def add_verb(verbs: Any) -> None:
    """Add the verb."""
    submit = verbs.add_parser(
        "submit",
        help="files for the test servers of CIRR and CIRCO",
        description="Rank the gallery of every test query, check the lists as the server would, and write its files.",
    )
    submit.add_argument("table", type=Path, help="scores of composed queries: RUN/scores-test.zarr")
    submit.add_argument("--out", type=Path, required=True, help="folder of the files")
    submit.set_defaults(func=_submit)


def _submit(args: argparse.Namespace) -> None:
    from eval import score_io
    from eval.composed_table import ComposedScores
    from eval.submissions import submit_circo, submit_cirr

    table = score_io.load(args.table)
    protocol = table.queries.protocol if isinstance(table, ComposedScores) else table.kind
    if not isinstance(table, ComposedScores) or protocol not in ("cirr", "circo"):
        raise ScoreTableError(
            f"{args.table} is a table of {protocol}; servers exist for cirr and circo alone"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    if protocol == "cirr":
        names = args.out / "recall.json", args.out / "recall_subset.json"
        made = submit_cirr(table, *names)
    else:
        made = (submit_circo(table, args.out / "circo.json"),)
    for path in made:
        print(f"wrote {path}")
