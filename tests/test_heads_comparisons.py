"""The packaged comparisons: every row of every task trains on the caches that their headers say how to build."""

import re
import shlex
from pathlib import Path

import pytest

from cache_builder import FeatureCache, build, load_backbone, load_dataset
from cache_builder.build_log import sessions
from heads.ablation import plan, read
from heads.cli import main
from heads.run_files import Trained
from heads.sweep import train_runs
from heads.wanted import Wanted

FOLDER = Path(__file__).parent.parent / "heads" / "comparisons"
PLANS = sorted(FOLDER.glob("*.toml"))
LEFT_OUT = {"two_by_two": {"sgi"}}
"""Task → rows that want what these caches do not hold, as their headers say."""


@pytest.fixture(scope="module")
def cache(fast_folder: Path) -> FeatureCache:
    """What the header of czsl.toml builds for clip, smaller."""
    dataset = load_dataset("toy_world", scale=0.02, words="vocabulary", triplets="rules")
    streams = (
        "image/pooled image/patches image/prefix image/pixels image/block_2 text/pooled text/tokens"
    )
    path = fast_folder / "comparisons" / "toy-clip.zarr"
    return build(
        dataset,
        load_backbone("clip:demo"),
        path,
        streams=streams.split(),
        backbone_name="clip:demo",
        progress=False,
    )


def test_there_is_one_for_each_kind_of_task() -> None:
    assert [path.stem for path in PLANS] == ["composed", "czsl", "czsl_heads", "two_by_two"]
    plans = [read(path.stem) for path in PLANS]
    methods = {row.method or plan.method for plan in plans for row in plan.row}
    everything = {p.stem for p in FOLDER.with_name("methods").glob("[a-z]*.py")}
    assert methods == everything, "a method is in no comparison"


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_its_header_is_the_command(path: Path) -> None:
    text = path.read_text()
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    lines = re.findall(r"headstart compare .*", header)
    assert any(f"--plan {path.stem} " in line for line in lines)
    for line in lines:
        assert shlex.split(line)[:2] == ["headstart", "compare"]


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_every_row_trains_a_step(
    path: Path, cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if path.stem == "composed":
        words = [
            "inversion",
            "--cache",
            str(cache.path),
            "--set",
            "train.steps=1",
            "--set",
            "head.kind=lincir",
        ]
        assert main(["train", *words, "--task", "composed", "--out", "runs/phi-clip"]) == 0
    made = plan(read(path.stem), {"it": cache}, settings={"train": {"steps": 1}})
    rows = {row.label for row in read(path.stem).row}
    assert rows - {entry.label for entry in made.entries["it"]} == LEFT_OUT.get(path.stem, set())
    wanted = [
        Wanted(e.method, tmp_path / e.label, {"head": e.head, "train": e.train})
        for e in made.entries["it"]
        if e.method != "linear_probe"  # its solver warns of so few pictures
    ]
    runs = train_runs(cache, wanted, task=read(path.stem).task, progress=False)
    assert all(isinstance(run, Trained) for run in runs), runs
    assert sessions(cache.place)
