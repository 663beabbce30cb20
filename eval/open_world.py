"""The feasibility threshold of an open world: searched on validation, carried to test unchanged, and written down."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from eval import czsl
from eval.any_table import Table
from eval.composition import Composition, CompositionScores
from eval.curve import summarise
from eval.czsl import CurveKind
from eval.czsl_summary import CompositionSummary
from eval.errors import EvalWarning, ScoreTableError
from eval.feasibility import Feasibility, Mode, Search, grid, kept, search


def search_threshold(
    table: Composition,
    rho: Float[np.ndarray, " c"],
    *,
    mode: Mode = "neg_inf",
    curve: CurveKind = "exact",
    k: int = 1,
) -> Search:
    """The threshold of the grid with the largest area, the first on equality; -inf, with a warning, if all are 0.

    Args:
        table: the validation split, open world.
        rho: feasibility of its columns.
        mode: what becomes of infeasible pairs.
        curve, k: of the area.

    Raises:
        ScoreTableError: no unseen pair, or images of one kind only, so that there is no area.

    """
    if 0 in table.counts:
        raise ScoreTableError(
            f"a threshold is chosen by auc, but the {table.split} table has {table.counts[0]} images of seen and "
            f"{table.counts[1]} of unseen pairs; it needs both"
        )

    def auc(threshold: float) -> float:
        pruned = table.pruned(threshold, rho, mode)
        if curve == "legacy":
            return czsl.evaluate(pruned, k=k, curve=curve)["auc"]
        points = czsl.exact_curve(pruned, k)
        return float(summarise(points.seen[None], points.unseen[None])["auc"][0])

    found = search(auc, grid(rho, table.seen))
    if found.threshold == -np.inf:
        warnings.warn(
            f"no feasibility threshold gives {table.split} an auc above 0, so every pair is kept",
            EvalWarning,
            stacklevel=2,
        )
    return found


def select(
    val: Table,
    file: Feasibility | None = None,
    *,
    mode: Mode = "neg_inf",
    curve: CurveKind = "exact",
    k: int = 1,
    name: str = "val",
) -> Callable[[Table], Table]:
    """A function that filters a table at the threshold chosen on another.

    Its tables carry `meta["feasibility"]`: `threshold` (None keeps everything), `mode`, the numbers `kept` and
    `unseen`, how T was chosen (`selected_on`, `selected_by`, `selected_value`), and as `rule` what
    tables must share to be compared: each method has a T of its own.

    Args:
        val: where the threshold is chosen.
        file: feasibility, for tables of all scores; a summary holds its own.
        mode, curve, k: see `search_threshold`.
        name: of `val`, for the record.

    Raises:
        ScoreTableError: not an open-world table, no feasibility, or a table to be filtered whose split is the one T was
            chosen on, or whose pairs differ.

    """
    chosen = _open(val)
    found = search_threshold(chosen, _rho(chosen, file), mode=mode, curve=curve, k=k)
    by = f"{chosen.split} auc{'' if k == 1 else f'@{k}'} ({curve})"

    def use(table: Table) -> Table:
        mine = _open(table)
        rho = _rho(mine, file)
        if mine.split == chosen.split:
            raise ScoreTableError(
                f"the threshold was chosen on {name}, a table of split {chosen.split}, and is to filter that split, "
                "where it would be fitted to the very images; filter another split"
            )
        if mine.shape[1] != chosen.shape[1] or not np.array_equal(mine.seen, chosen.seen):
            raise ScoreTableError(
                f"the {mine.split} table has other candidates ({mine.shape[1]}) than {name} ({chosen.shape[1]}); score "
                "both in the open world of one data set"
            )
        if not np.array_equal(np.asarray(mine.pairs), np.asarray(chosen.pairs)):
            raise ScoreTableError(
                f"the {mine.split} table has other pairs in its columns than {name}; score both in the open world of "
                "one data set"
            )
        bounded = found.threshold > -np.inf
        facts: dict[str, Any] = {
            "threshold": found.threshold if bounded else None,
            "rule": f"feasible, {mode}, T by {by}",
            "mode": mode,
            "kept": int((kept(rho, mine.seen, found.threshold) & ~mine.seen).sum()),
            "unseen": int((~mine.seen).sum()),
            "selected_on": name,
            "selected_by": by,
            "selected_value": found.auc,
        }
        pruned = mine.pruned(found.threshold, rho, mode) if bounded else mine
        return replace(pruned, meta={**pruned.meta, "feasibility": facts})

    return use


def _open(table: Table) -> CompositionScores | CompositionSummary:
    if not isinstance(table, CompositionScores | CompositionSummary) or table.world != "open":
        raise ScoreTableError(
            f"feasibility filters open-world tables of czsl, but this is {type(table).__name__} of split "
            f"{table.split!r}; score with --world open"
        )
    return table


def _rho(
    table: CompositionScores | CompositionSummary, file: Feasibility | None
) -> Float[np.ndarray, " c"]:
    """Feasibility of the columns, from the file or the table's own."""
    if file is not None:
        return file.of(table.pairs)
    if isinstance(table, CompositionSummary) and table.rho is not None:
        return table.rho
    raise ScoreTableError(
        f"the {table.split} table keeps no feasibility; give it (--feasibility FILE), and a summary has to be scored "
        "with it (headstart score … --world open --feasibility FILE)"
    )
