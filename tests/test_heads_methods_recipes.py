"""Recipes fill the models they are for, and their headers say how to run them."""

import re
import tomllib
from pathlib import Path

import pytest

from heads import load_method
from heads.config import parse, read_settings
from heads.train_config import TrainConfig

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "heads" / "recipes").glob("*.toml"))
OURS = ("toy_world", "folder")
"""Data sets that nobody downloads and no paper prints."""

CZSL = ("mit_states", "ut_zappos", "cgqa", "vaw_czsl")
CAPTIONS = ("coco", "flickr30k", "sugarcrepe", "bivlc", "two_by_two")
COMPOSED = ("cirr", "fashioniq", "circo", "genecis")


def test_every_method_has_a_recipe_for_every_official_set_of_its_task() -> None:
    """tf_local and zero_shot score pairs as well as captions; zero_shot also asks composed queries."""
    methods = {p.stem for p in (ROOT / "heads" / "methods").glob("[a-z]*.py")}
    wanted = {"zero_shot": (*CZSL, *CAPTIONS, *COMPOSED), "tf_local": (*CZSL, *CAPTIONS)}
    wanted |= {"finetune": (*CZSL, *CAPTIONS), "sgi": CAPTIONS}
    wanted |= {"inversion": COMPOSED, "mota": COMPOSED}
    asked = {f"{m}-{dataset}" for m in methods for dataset in wanted.get(m, CZSL)}
    assert asked <= {path.stem for path in RECIPES}


def rows_published(dataset: str) -> set[str]:
    """S/U/HM/AUC of every published row of a data set, as papers write it."""
    found: set[str] = set()
    keys = ("best_seen", "best_unseen", "best_hm", "auc")
    for file in (ROOT / "eval" / "published").glob("*.toml"):
        for row in tomllib.loads(file.read_text())["row"]:
            if set(keys) <= set(figures := row.get(dataset, {})):
                found.add("/".join(f"{figures[key]:.1f}" for key in keys))
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_header_says_which_files_and_which_verified_figures_there_are(path: Path) -> None:
    dataset = path.stem.partition("-")[2]
    if dataset in OURS:
        return
    header = re.sub(r"\n# ?", " ", path.read_text().partition("\n\n")[0])
    assert "Files: " in header
    papers = re.search(r"Papers: (.*?) (?:Quick look|Expect):", header)
    assert papers
    told = re.findall(r"\d+\.\d/\d+\.\d/\d+\.\d/\d+\.\d", papers[1])
    assert set(told) <= rows_published(dataset)
    assert told or "verified" in papers[1] or re.search(r"\d+\.\d+", papers[1])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_valid_and_its_header_is_the_command(path: Path) -> None:
    method, _, dataset = path.stem.partition("-")
    settings = read_settings(path)
    parse(load_method(method).Config, settings["head"], "head")
    parse(TrainConfig, settings["train"], "train")
    text = path.read_text()
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"--dataset {dataset} " in header
    assert f"headstart train {method} --cache" in header
    assert f"--config heads/recipes/{path.name}" in header
    assert "Expect:" in header
    assert "Quick look:" in header
