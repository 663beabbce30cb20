"""Recipes fill the models they are for, and their headers say how to run them."""

from pathlib import Path

import pytest

from heads import load_method
from heads.config import parse, read_settings
from heads.train_config import TrainConfig

RECIPES = sorted((Path(__file__).parent.parent / "heads" / "recipes").glob("*.toml"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 3


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
