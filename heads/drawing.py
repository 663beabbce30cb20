"""Pictures of a run: its data set's images are found again, and the method's maps or answers drawn over or beside them.

composed      queries with what they get (composed_pictures.py)
other tasks   where the head looks, or which experts serve what (pictures.py)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cache_builder import FeatureCache, load_dataset
from cache_builder.errors import CacheError
from eval import score_io
from eval.comparison import Comparison
from eval.composed_table import ComposedScores
from heads.composed_pictures import save_composed_pictures
from heads.errors import HeadError
from heads.failure_pictures import save_failures
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


def draw_comparison(
    comparisons: Sequence[Comparison],
    runs: Sequence[Path],
    caches: Mapping[str, FeatureCache],
    n: int,
) -> list[str]:
    """Pictures of a comparison: of every row's first run that has something to show, and of what goes wrong most.

    Args:
        comparisons: of the runs.
        runs: directories, `OUT/<cache>/<label>-seed<n>`; pictures of an earlier call are replaced.
        caches: by name.
        n: examples a run.

    Returns:
        Sentences about what could not be drawn, which keeps nothing else from being shown.
    """
    said: list[str] = []
    first: dict[tuple[str, str], Path] = {}
    for run in runs:
        first.setdefault((run.parent.name, run.name.rpartition("-seed")[0]), run)
    for (name, _), run in first.items():
        record, tables = read_run(run), sorted(run.glob("scores-test*.zarr"))
        task = record["task"]
        if tables if task == "composed" else has_pictures(record["method"], task):
            try:
                draw(run, caches[name], task=task, n=n, tables=tables)
            except (CacheError, HeadError, OSError) as error:
                said.append(f"{name}/{run.name} has no pictures: {error}")
    try:
        save_failures(comparisons, caches)
    except (CacheError, HeadError, OSError) as error:
        said.append(f"What goes wrong most is shown without pictures: {error}")
    return said
