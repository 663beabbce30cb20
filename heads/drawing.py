"""Pictures of a run: its data set's images are found again, and the method's maps or answers drawn over or beside them.

composed      queries with what they get (composed_pictures.py)
other tasks   where the head looks, or which experts serve what (pictures.py)
"""

from collections.abc import Sequence
from pathlib import Path

from cache_builder import FeatureCache, load_dataset
from eval import score_io
from eval.composed_table import ComposedScores
from heads.composed_pictures import save_composed_pictures
from heads.pictures import has_pictures, save_pictures
from heads.run_files import read_run


def draw(
    run: Path,
    cache: FeatureCache,
    *,
    task: str,
    n: int,
    split: str = "test",
    tables: Sequence[Path] = (),
    backbone: str | None = None,
) -> list[Path]:
    """Write up to `n` pictures into RUN/pictures; returns their paths.

    Args:
        run: a trained run's directory.
        cache: of the run's backbone; says where the pictures are.
        task, split: what is drawn.
        n: how many examples.
        tables: of composed retrieval, the table that `score_run` wrote.
        backbone: as of `save_pictures`.

    Raises:
        DatasetError, ConfigError: the pictures are not where they were, or the method has nothing to draw.
    """
    name, header = cache.spec.dataset.name, cache.header
    dataset = load_dataset(name, header.root or None, **header.options)
    if task == "composed":
        table = score_io.load(tables[0])
        assert isinstance(table, ComposedScores)
        return save_composed_pictures(run, cache, dataset, table, n=n, backbone=backbone)
    return save_pictures(run, cache, dataset, task=task, split=split, n=n, backbone=backbone)


def draw_first_seeds(runs: Sequence[Path], caches: dict[str, FeatureCache], n: int) -> list[Path]:
    """Pictures of a comparison: of every row's first run, where its method has something to show.

    Args:
        runs: directories, `OUT/<cache>/<label>-seed<n>`; those that have pictures already keep them.
        caches: by name.
        n: examples a run.
    """
    drawn: list[Path] = []
    seen: set[tuple[str, str]] = set()
    for run in runs:
        row = (run.parent.name, run.name.rpartition("-seed")[0])
        record = read_run(run)
        task = record["task"]
        if row in seen or not (task == "composed" or has_pictures(record["method"], task)):
            continue
        seen.add(row)
        tables = sorted(run.glob("scores-test*.zarr"))
        if not (run / "pictures").exists() and (task != "composed" or tables):
            drawn += draw(run, caches[row[0]], task=task, n=n, tables=tables)
    return drawn
