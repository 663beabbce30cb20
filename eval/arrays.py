"""Arrays of numpy as score tables: `.npz` with names, `.npy` of logits. Nothing is ever unpickled.

    czsl        scores (Q, C)                  pairs (C, 2)   target (Q,)   seen (C,)      split, space, world
    matching    scores (n, 2) or (n, 2, 2)     category (n,)                               split, space
    retrieval   scores (Q, C)                  positives (Q, C)           split, space; optional: direction, rerank
    any         ids, one a row, optional; rows, columns as in `eval.czsl`, `eval.matching`, `eval.retrieval`

Facts are arrays without axes (`np.savez(path, scores=…, split="test")`), or are given.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.any_table import Table
from eval.errors import ScoreTableError
from eval.given import Given, flags, origin, unknown
from eval.matching import MatchingScores
from eval.npz import read_npy, read_npz
from eval.pair_files import Pair, composition
from eval.retrieval import RetrievalScores

FACTS = ("split", "space", "world", "direction", "rerank")
ARRAYS = ("scores", "pairs", "target", "seen", "category", "positives", "ids")


def load_npz(path: Path, given: Given) -> Table:
    """A table of a `.npz`.

    Raises:
        ScoreTableError: objects, a damaged file, unknown or missing arrays, facts that nobody says.

    """
    found = read_npz(path)
    unknown(found, (*ARRAYS, *FACTS), "the array", path)
    if "scores" not in found:
        raise ScoreTableError(f"{path} has no array 'scores', only {', '.join(found) or 'nothing'}")
    said = {name: _fact(found[name], name, path) for name in FACTS if name in found}
    ids: tuple[str, ...] = tuple(str(i) for i in found.get("ids", np.array([])).tolist())
    kind = _kind(found, given)
    belong = {"matching": ("category",), "retrieval": ("positives",)}.get(
        kind, ("pairs", "target", "seen")
    )
    unknown(
        [n for n in found if n not in FACTS],
        ("scores", *belong, "ids"),
        f"beside a {kind} table the array",
        path,
    )
    meta = {n: said[n] for n in ("direction", "rerank") if n in said}
    if kind == "czsl":
        given.only(
            path, "split", "space", "world", "pairs", "train_pairs", "split_pairs", "targets"
        )
        seen = flags(found["seen"], "seen", path) if "seen" in found else None
        names = _pairs(found["pairs"], path) if "pairs" in found else None
        target = found.get("target")
        return composition(
            found["scores"],
            names,
            path,
            given,
            target=target,
            seen=seen,
            ids=ids,
            said=said,
            **meta,
        )
    given.only(path, "split", "space")
    split, space = (given.fact(name, path, said.get(name)) for name in ("split", "space"))
    if kind == "matching":
        category = found["category"].astype(str)
        return MatchingScores(found["scores"], category, space, split, ids, origin(path, **meta))
    positives = flags(found["positives"], "positives", path)
    return RetrievalScores(found["scores"], positives, space, split, ids, origin(path, **meta))


def load_npy(path: Path, given: Given) -> Table:
    """A table of CZSL from a `.npy` of scores (Q, C); everything else lies in files of text.

    Raises:
        ScoreTableError: objects, a damaged file, a list that is missing or does not fit.

    """
    given.only(path, "split", "space", "world", "pairs", "train_pairs", "split_pairs", "targets")
    return composition(read_npy(path), None, path, given)


def _fact(value: NDArray[Any], name: str, path: Path) -> Any:
    """A fact as a Python value."""
    if value.ndim or value.dtype.kind not in "USiu":
        raise ScoreTableError(
            f"{name} of {path} must be one word or number, but is {value.dtype} of shape {value.shape}; save "
            f'{name}="…"'
        )
    found = value.item()
    return found.decode("utf-8", "replace") if isinstance(found, bytes) else found


def _kind(found: dict[str, NDArray[Any]], given: Given) -> str:
    """Which task the arrays belong to."""
    marks = {
        "matching": "category" in found,
        "retrieval": "positives" in found,
        "czsl": bool({"pairs", "target", "seen"} & set(found))
        or any(getattr(given, n) is not None for n in ("pairs", "targets", "train_pairs")),
    }
    kinds = [kind for kind, marked in marks.items() if marked]
    if len(kinds) != 1:
        raise ScoreTableError(
            f"scores of one task need 'category' (matching), 'positives' (retrieval) or 'pairs', 'target' and 'seen' "
            f"(czsl) beside them, but arrays and lists of {'no task' if not kinds else ' and '.join(kinds)} are there"
            f" ({', '.join(found)})"
        )
    return kinds[0]


def _pairs(values: NDArray[Any], path: Path) -> list[Pair]:
    """Names, or numbers taken as names, of an array (C, 2)."""
    if values.ndim != 2 or values.shape[1] != 2:
        raise ScoreTableError(
            f"pairs of {path} must be (C, 2) as (attr, obj), but are {values.shape}"
        )
    return [(attr, obj) for attr, obj in values.astype(str).tolist()]
