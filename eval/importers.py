"""Files of scores from any code → score tables; docs/scores.md shows every layout.

    .zarr               written by `headstart score` or `eval.score_io.save`
    .npz, .npy          arrays of numpy; logits of CZSL with a list of pairs          eval.arrays, eval.pair_files
    .csv                scores as text                                               eval.csv_scores
    .trec .run .txt     a run of TREC, with qrels                                    eval.trec

No pickle is ever loaded, so no `.pt`, `.pth`, `.t7` and `.pkl` is: the message says how to convert one.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval import arrays, csv_scores, trec
from eval.any_table import Table
from eval.errors import ScoreTableError, ScoreTableNotFound
from eval.given import Given

LOADERS: dict[str, Callable[[Path, Given], Table]] = {
    ".npz": arrays.load_npz,
    ".npy": arrays.load_npy,
    ".csv": csv_scores.load_csv,
    ".trec": trec.load_run,
    ".run": trec.load_run,
    ".txt": trec.load_run,
}

PICKLED = (".pt", ".pth", ".t7", ".pkl", ".pickle", ".joblib")


def load(path: str | os.PathLike[str], **given: Any) -> Table:
    """A score table of a file or, for `.zarr`, a folder.

    Args:
        path: the scores; the suffix says what they are.
        given: facts and files that the scores do not hold: the fields of `eval.given.Given`. None counts as not given.

    Raises:
        ScoreTableNotFound: nothing is at the path.
        ScoreTableError: a suffix without a reader, a file that is not what its suffix says, facts that are missing,
            contradict the file or have no use for it.

    """
    path = Path(path)
    suffix = path.suffix.lower()
    files = ("pairs", "train_pairs", "split_pairs", "targets", "qrels")
    facts: dict[str, Any] = {
        n: Path(v) if n in files and v is not None else v for n, v in given.items()
    }
    told = Given(**facts)
    if suffix == ".zarr" or (suffix not in LOADERS and path.is_dir()):
        return _ours(path, told)
    if suffix in PICKLED:
        raise ScoreTableError(
            f"{path} is a pickle by its suffix, which can run any code and is never read here; in the program that "
            "made it, convert it: np.save('scores.npy', logits.float().cpu().numpy()), and its names to text"
        )
    if suffix not in LOADERS:
        raise ScoreTableError(
            f"{path} has the suffix {suffix!r}; scores are read from .zarr, {', '.join(LOADERS)}"
        )
    if not path.exists():
        raise ScoreTableNotFound(f"no scores at {path}; name a file that is there")
    try:
        return LOADERS[suffix](path, told)
    except MemoryError as error:
        raise ScoreTableError(f"{path} does not fit into memory; write it as a .zarr") from error


def _ours(path: Path, given: Given) -> Table:
    """A table of ours says everything itself; what is given must agree."""
    from eval import score_io  # zarr takes a moment to import, and other files do without

    given.only(path, "split", "space", "world")
    table = score_io.load(path)
    for name in ("split", "space", "world"):
        if getattr(given, name) is not None:
            if not getattr(table, name):  # a world, outside CZSL
                raise ScoreTableError(f"--{name} was given, but {path} is a table without one")
            given.fact(name, path, getattr(table, name))
    return table
