"""`headstart demo`: the bundled backbones on `toy_world`, from pictures to a report, as a real comparison is made.

Configurations are small because everything runs on two cores in minutes; none of them was chosen by looking at test
scores (weights are selected on val).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_builder import build, load_backbone, load_dataset
from eval.report import report
from heads.compare import Entry, Question, compare
from heads.compare_engines import Processes
from heads.errors import RunExists, TrainingDiverged
from heads.pictures import save_pictures

BACKBONES = ("clip", "siglip2", "pe", "llava")
SEEDS = 3
EPOCHS = 4
PICTURED = ("tf_local-seed0", "late_maxsim-seed0")

SCORER = {"dim": 64, "heads": 4, "ffn": 128, "n_sampled": 2}
BINDING = (Question("two_by_two"), Question("matching"), Question("retrieval", rerank=16))
LABELS = (Question("czsl"), Question("czsl", "open"))


def entries(epochs: int, *, joint: bool = True) -> tuple[Entry, ...]:
    """The rows of a backbone: heads of the CZSL task, and one scorer with its controls, all trained on the 2×2 items.

    Args:
        epochs: of the scorers.
        joint: has the backbone a joint space? Without one (LLaVA) nothing is pooled: there is no cosine to compare
            with, to rerank by or to draw candidates by, so the heads that need one are left out.
    """
    train = {"lr": 1e-3, "epochs": epochs, "batch_size": 32}
    drawn = {} if joint else {"top_sampled": 0}

    def scorer(label: str, **fields: Any) -> Entry:
        asked = BINDING if joint else BINDING[:2]
        return Entry(label, "tf_local", "two_by_two", asked, {**SCORER, **drawn, **fields}, train)

    aligned = (
        scorer("late_maxsim", variant="late_maxsim", layers=4),
        scorer("tf_local", layers=2),
    )
    if not joint:
        return aligned
    return (
        Entry("zero_shot", "zero_shot", "czsl", (*LABELS, *BINDING[:2], Question("retrieval"))),
        Entry("linear_probe", "linear_probe", "czsl", LABELS),
        scorer("tf_global", variant="global", layers=2),
        *aligned,
    )


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo made.

    Attributes:
        table: the comparison, as markdown.
        files: what lies where: the report, its figures, the caches, the runs.
    """

    table: str
    files: dict[str, Path]


def run(
    out: str | Path,
    *,
    scale: float = 1.0,
    epochs: int = EPOCHS,
    seeds: int = SEEDS,
    backbones: Sequence[str] = BACKBONES,
) -> Demo:
    """Build the caches, train and score every entry, draw what the aligned heads attend to, and report.

    Args:
        out: directory for everything; caches of an earlier demo are used again, its runs are not.
        scale: size of `toy_world`; 1 is the demo's own, less is for a quick look.
        epochs: of the trained heads; 20 made the table of the README, in 19 minutes on two busy cores.
        seeds: how many, for each trained head.
        backbones: families whose bundled model takes part.

    Raises:
        RunExists: `out` holds runs of an earlier demo.
    """
    out = Path(out)
    if (out / "runs").exists():
        raise RunExists(f"{out / 'runs'} holds an earlier demo; remove it, or choose another --out")
    dataset = load_dataset("toy_world", scale=scale)
    paths = {name: out / "caches" / f"toy_world-{name}.zarr" for name in backbones}
    caches = {
        name: build(dataset, load_backbone(f"{name}:demo"), path, batch_size=256)
        for name, path in paths.items()
    }
    rows = {
        name: entries(epochs, joint="image/pooled" in cache.streams)
        for name, cache in caches.items()
    }
    compared = compare(
        caches, rows, range(seeds), out / "runs", engine=Processes(os.cpu_count() or 1)
    )
    if compared.failures:
        raise TrainingDiverged("; ".join(compared.failures))
    runs = compared.runs
    for path in runs:
        if path.name in PICTURED:
            save_pictures(path, caches[path.parent.name], dataset, task="two_by_two", n=5)
    page, *tables, figures = report(runs, out / "report.html", title="headstart demo: toy_world")
    named = figures.rename(out / "metrics.json")
    files = {"report": page, **{f"tables ({p.suffix[1:]})": p for p in tables}, "metrics": named}
    (markdown,) = (p for p in tables if p.suffix == ".md")
    text = markdown.read_text(encoding="utf-8")
    return Demo(text, {**files, "caches": out / "caches", "runs": out / "runs"})
