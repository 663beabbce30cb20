"""Every recipe runs as its header says, from the build to finite metrics, and the header names only what there is.

The commands run one after another in a scratch directory, on the miniature of their data set. What changes in them is
in `on_a_miniature`: the backbone is a tiny one of the family that is named, and training is a step of a small head.
Builds that are written alike are run once for all recipes.
"""

import inspect
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kinds import directory

from cache_builder import ADDED, plugins
from cache_builder.cli_build import options_of
from cache_builder.format import stream
from heads import load_method
from heads.cli import _parser, main
from heads.config import parse, read_settings
from heads.train_config import TrainConfig

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "heads" / "recipes").glob("*.toml"))

SMALLER: dict[str, list[str]] = {
    "tf_local": ["layers=2", "dim=16", "heads=2", "ffn=16"],
    "eva": ["rank=2", "n_experts=3"],
    "finetune": ["width=4", "rank=2"],
    "linear_probe": ["max_iter=2000"],
}
"""Method → head settings where the recipe's own would take seconds on any data."""

STEP = ["train.steps=1", "train.batch_size=4", "train.device=cpu"]

CAPTIONED = ("tf_local-folder",)
"""Recipes whose folder of photos has captions instead of labels."""

FEW = ("vaw_czsl", "fashioniq")
"""Data sets whose miniature has fewer candidates than the K that is usual there."""

SELECT = {"zero_shot-fashioniq": "train.select=recall@1/dress"}
"""Recipe → what is validated by, for want of candidates."""


def header(path: Path) -> str:
    """The comment above the first table, without its `#`."""
    text = path.read_text()
    return re.sub(r"^# ?", "", text[: text.index("\n\n")], flags=re.M)


def commands(path: Path) -> list[list[str]]:
    """The words of the header's commands, in order; those joined by && are two."""
    joined = header(path).replace("\\\n", " ")
    lines = re.findall(r"^ {2}(headstart .*)$", joined, re.M)
    return [shlex.split(part) for line in lines for part in line.split(" && ")]


def on_a_miniature(words: list[str], root: Path, family: str) -> list[str]:
    """A command as it is, but for a tiny backbone, the miniature's root, and a block that a tiny tower has."""
    found = list(words)
    for i, word in enumerate(words):
        if word == "--backbone":
            found[i + 1] = f"{family}:{directory(family)}"
        elif word == "--root":
            found[i + 1] = str(root)
        elif word == "cuda":
            found[i] = "cpu"
        else:
            found[i] = re.sub(r"^image/block_\d+$", "image/block_1", found[i])
    if words[1] == "build" and "--root" not in words:
        found[2:2] = ["--root", str(root)]
    return found


def with_json(words: list[str], recipe: Path) -> list[str]:
    """A command that prints metrics, as JSON; at a K that there is."""
    found = " ".join(words)
    if recipe.stem.partition("-")[2] in FEW:
        found = f"{re.sub(r' --k [0-9 ]+', '', found)} --k 1 2"
    return [*shlex.split(found), "--json"]


def smaller(words: list[str], recipe: Path) -> list[str]:
    """A training command with a step of a small head."""
    method = words[2]
    trained = load_method(method).Head.training_kind
    sets = [f"head.{text}" for text in SMALLER.get(method, [])]
    sets += STEP if trained == "gradient" else []
    sets += [SELECT[recipe.stem]] if recipe.stem in SELECT else []
    return [*words, *(part for text in sets for part in ("--set", text))]


Built = Callable[[list[str]], Path]


@pytest.fixture(scope="module")
def roots(fast_folder: Path) -> Callable[[str, str], Path]:
    """The miniature of a data set, written when first asked for."""
    found: dict[tuple[str, bool], Path] = {}

    def root(dataset: str, recipe: str) -> Path:
        captioned = recipe in CAPTIONED
        if (dataset, captioned) not in found:
            where = fast_folder / f"recipes-{dataset}-{captioned}"
            kind = {"kind": "captions"} if captioned else {}
            plugins.find("cache_builder.datasets", dataset).miniature(where, **kind)
            found[dataset, captioned] = where
        return found[dataset, captioned]

    return root


@pytest.fixture(scope="module")
def built(fast_folder: Path) -> Built:
    """Runs a build, or finds the cache that the same words made before; returns where it lies."""
    made: dict[tuple[str, ...], Path] = {}

    def build(words: list[str]) -> Path:
        out = words.index("--out") + 1
        if (key := tuple(words)) not in made:
            place = fast_folder / f"recipes-cache-{len(made)}" / Path(words[out]).name
            assert main([*words[1:out], str(place), *words[out + 1 :]]) == 0
            made[key] = place
        return made[key]

    return build


@pytest.fixture
def here(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to run commands in, with heads/recipes/ in it."""
    (fast_path / "heads").symlink_to(ROOT / "heads")
    (fast_path / "caches").mkdir()
    monkeypatch.chdir(fast_path)
    yield fast_path
    shutil.rmtree(fast_path, ignore_errors=True)


def finite(value: Any) -> int:
    """How many numbers a JSON value holds; all must be finite."""
    if isinstance(value, dict):
        return sum(finite(v) for v in value.values())
    if isinstance(value, list):
        return sum(finite(v) for v in value)
    if isinstance(value, float):
        assert np.isfinite(value)
        return 1
    return 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_commands_of_a_header_lead_from_files_to_finite_metrics(
    path: Path,
    here: Path,
    roots: Callable[[str, str], Path],
    built: Built,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = 0
    for words in commands(path):
        verb = words[1]
        if verb == "build":
            dataset = words[words.index("--dataset") + 1]
            family = words[words.index("--backbone") + 1].partition(":")[0]
            changed = on_a_miniature(words, roots(dataset, path.stem), family)
            (here / words[words.index("--out") + 1]).symlink_to(built(changed))
            continue
        change = {"train": smaller, "metrics": with_json}.get(verb)
        changed = words if change is None else change(words, path)
        capsys.readouterr()
        status = main(changed[1:])
        assert status == 0, f"{' '.join(words)}: {capsys.readouterr().err}"
        if verb == "metrics":
            measured += finite(json.loads(capsys.readouterr().out))
        elif verb == "report":
            measured += 1
    assert measured, "no command of the header ends in numbers"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_commands_of_a_header_name_only_what_there_is(path: Path) -> None:
    method, _, dataset = path.stem.partition("-")
    assert commands(path), "the header has no command"
    for words in commands(path):
        args = _parser().parse_args(words[1:])
        if args.verb == "build":
            family = plugins.find("cache_builder.backbones", args.backbone.partition(":")[0])
            assert callable(family.load)
            assert options_of(args.dataset, args.set) is not None
            assert all(stream(name) for name in args.streams or ())
        elif args.verb == "train":
            (name,) = args.method
            named = [one.partition("=")[2] or one for one in args.config]
            settings = read_settings(ROOT / named[0], args.set)
            parse(TrainConfig, settings["train"], "train")
            parse(load_method(name).Config, settings["head"], "head")
            assert name == method or named[0].partition("-")[2] == f"{dataset}.toml"


def options(dataset: str) -> set[str]:
    """What `--set` may name at a build of a data set."""
    load = plugins.find("cache_builder.datasets", dataset).load
    return {*inspect.signature(load).parameters, *ADDED}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_settings_that_a_header_proposes_exist(path: Path) -> None:
    method = path.stem.partition("-")[0]
    proposed = re.findall(r"--set ([\w.]+)=", header(path))
    known = load_method(method).Config.model_fields
    for key in proposed:
        table, dot, name = key.partition(".")
        if not dot:
            built = [w[w.index("--dataset") + 1] for w in commands(path) if w[1] == "build"]
            assert any(key in options(name) for name in built)
        elif table == "train":
            assert name in TrainConfig.model_fields
        else:
            assert name.partition(".")[0] in known or "headstart train inversion" in header(path)
