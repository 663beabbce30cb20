"""What holds of all four readers of composed retrieval: `cirr`, `fashioniq`, `circo`, `genecis`."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from composed_sets import (
    OFFICIAL,
    as_queries,
    asked,
    official,
    rewrite,
)
from PIL import Image

from cache_builder import load_dataset, plugins
from cache_builder.datasets import circo, cirr, fashioniq, genecis
from cache_builder.datasets.base import Dataset
from cache_builder.errors import CacheError, UnknownName
from cache_builder.images import BadImage
from cache_builder.records import DatasetError, DatasetNotFound
from cache_builder.testing import check_dataset
from eval.composed import evaluate
from eval.composed_table import ComposedScores

ALL = pytest.mark.parametrize(
    "module", [cirr, fashioniq, circo, genecis], ids=["cirr", "fashioniq", "circo", "genecis"]
)

ANNOTATION = {
    "cirr": "captions/cap.rc2.val.json",
    "fashioniq": "captions/cap.dress.val.json",
    "circo": "annotations/val.json",
    "genecis": "genecis/focus_object.json",
}
"""A file of rows of each set."""

PICTURES = {
    "cirr": "img_raw/dev",
    "fashioniq": "images",
    "circo": circo.PICTURES,
    "genecis": "val2017",
}


def made(module, folder: Path) -> Path:
    return module.miniature(folder / module.__name__.rpartition(".")[2])


def short(module) -> str:
    return module.__name__.rpartition(".")[2]


def sides(dataset: Dataset) -> tuple[str, ...]:
    return tuple(dict.fromkeys(e.split for e in dataset.tasks.composed))


# --- all readers ---


@ALL
def test_a_miniature_conforms(module, tmp_path: Path) -> None:
    dataset = check_dataset(module, tmp_path)
    assert dataset.tasks.kinds == ("composed",)
    assert dataset.name == short(module)
    assert dataset.counts["set"] == "another set in this layout"
    for record in dataset.images:
        assert record.measure is not None
        assert record.size() == record.open().size


@pytest.mark.parametrize("module", [cirr, fashioniq])
def test_all_splits_of_a_miniature_conform(module, tmp_path: Path) -> None:
    dataset = check_dataset(module.load(made(module, tmp_path), splits=["train", "val", "test"]))
    assert sides(dataset) == ("train", "val", "test")


@ALL
def test_the_evaluator_takes_the_examples_as_they_are(module, tmp_path: Path) -> None:
    dataset = module.load(made(module, tmp_path))
    for split in sides(dataset):
        queries = as_queries(dataset, split)
        published = split == "val" or module is genecis
        assert queries.answered == published
        assert [bool(t) for t in queries.targets] == [published] * len(queries.ids)


@ALL
def test_right_answers_on_top_give_full_marks_and_equal_scores_none(module, tmp_path: Path) -> None:
    """Equal scores count against the target although it comes first in a row of genecis."""
    dataset = module.load(made(module, tmp_path))
    split = "test" if module is genecis else "val"
    queries = as_queries(dataset, split)
    candidates = [image.id for image in dataset.images]
    flat = np.full((len(queries.ids), len(candidates)), -np.inf, np.float32)
    best = flat.copy()
    for i, e in enumerate(asked(dataset, split)):
        competing = dataset.tasks.galleries[e.gallery].images if e.gallery else e.subset
        for score, some in ((0, competing), (1, e.targets), (2, e.targets[:1])):
            best[i, [candidates.index(one) for one in some]] = score
        flat[i, [candidates.index(one) for one in competing]] = 0
    full = evaluate(ComposedScores(best, candidates, queries, space="cosine"), ks=[1])
    none = evaluate(ComposedScores(flat, candidates, queries, space="cosine"), ks=[1])
    assert any(name.startswith("recall@1") for name in full)
    assert set(full.values()) == {1}
    assert {value for name, value in none.items() if "@1" in name} == {0}


def test_the_shared_file_is_no_data_set() -> None:
    found = set(plugins.names("cache_builder.datasets"))
    assert found >= {"cirr", "fashioniq", "circo", "genecis"}
    assert "triplets" not in found


@ALL
def test_missing_files_are_named_with_their_source(module, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound, match=rf"{short(module)} needs the folder .*--root"):
        module.load(None)
    with pytest.raises(DatasetNotFound, match=r"there is no folder .*github\.com"):
        module.load(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"looked in .*github\.com") as caught:
        module.load(tmp_path)
    assert Path(ANNOTATION[short(module)]).parts[0] in str(caught.value)


@ALL
def test_a_half_downloaded_set_names_the_file_and_its_source(module, tmp_path: Path) -> None:
    root = made(module, tmp_path)
    (root / ANNOTATION[short(module)]).unlink()
    with pytest.raises(DatasetNotFound, match=r"github\.com") as caught:
        module.load(root)
    assert ANNOTATION[short(module)] in str(caught.value)


@ALL
def test_a_set_without_any_image_is_half_downloaded(module, tmp_path: Path) -> None:
    root = made(module, tmp_path)
    before = module.load(root)
    assert before.counts.get("images missing") != "images not looked for"
    shutil.rmtree(root / PICTURES[short(module)])
    message = r"found none of its \d+ images of .*no such file: \S+.*; get .*require_images=false"
    with pytest.raises(DatasetNotFound, match=message):
        module.load(root)
    dataset = module.load(root, require_images=False)
    assert dataset.digest() == before.digest()
    assert dataset.counts["images missing"] == "images not looked for"


def a_picture(dataset: Dataset) -> Path:
    """A file that one image of the set is the whole of."""
    return next(image.path() for image in dataset.images if image.path is not None)


@ALL
def test_one_missing_image_is_left_to_the_build(module, tmp_path: Path) -> None:
    root = made(module, tmp_path)
    path = a_picture(module.load(root))
    path.unlink()
    dataset = module.load(root)
    with pytest.raises(FileNotFoundError, match=path.name):
        [image.open() for image in dataset.images]


@ALL
def test_a_picture_that_is_none_is_left_to_the_build(module, tmp_path: Path) -> None:
    root = made(module, tmp_path)
    a_picture(module.load(root)).write_bytes(b"no picture")
    dataset = module.load(root)
    with pytest.raises(BadImage):
        [image.open() for image in dataset.images]


@ALL
def test_an_image_may_not_be_a_link_out_unless_that_is_said(module, tmp_path: Path) -> None:
    root = made(module, tmp_path)
    sizes = [image.open().size for image in module.load(root).images]
    path = a_picture(module.load(root))
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")  # the folder may be one
    assert [image.open().size for image in module.load(root).images] == sizes
    Image.new("RGB", (3, 5)).save(tmp_path / "outside.png")
    path.unlink()
    path.symlink_to(tmp_path / "outside.png")
    with pytest.raises(CacheError, match="is a link that leaves"):
        [image.open() for image in module.load(root).images]
    opened = [image.open().size for image in module.load(root, follow_links=True).images]
    assert (3, 5) in opened
    assert sum(a != b for a, b in zip(sizes, opened, strict=True)) == 1


@ALL
@pytest.mark.parametrize("text", ["{}", "7", '[["a"]]', "[null]"])
def test_a_file_that_is_no_list_of_rows_is_refused(module, text: str, tmp_path: Path) -> None:
    root = made(module, tmp_path)
    (root / ANNOTATION[short(module)]).write_text(text)
    with pytest.raises(DatasetError, match=r"\.json (holds a|row 0 is)"):
        module.load(root)


@ALL
def test_a_git_lfs_pointer_is_called_by_its_name(module, tmp_path: Path) -> None:
    root = made(module, tmp_path)
    (root / ANNOTATION[short(module)]).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DatasetError, match="Git LFS pointer"):
        module.load(root)


@ALL
@pytest.mark.parametrize(
    ("option", "value"), [("check", "maybe"), ("check", "A"), ("splits", "dev"), ("splits", [])]
)
def test_an_unknown_option_lists_the_known(module, option: str, value: Any, tmp_path: Path) -> None:
    option = "tasks" if module is genecis and option == "splits" else option
    with pytest.raises(UnknownName, match=rf"{option}=.* is not known; choose "):
        module.load(made(module, tmp_path), **{option: value})


@ALL
def test_the_miniature_does_not_have_the_published_counts(module, tmp_path: Path) -> None:
    root = made(module, tmp_path)
    with pytest.raises(DatasetError, match=r"is not the published .*expected, .*check=\"none\""):
        module.load(root, check="official")
    assert module.load(root, check="none").digest() == module.load(root).digest()


def test_options_of_the_command_line_are_kept(tmp_path: Path) -> None:
    clothes = made(fashioniq, tmp_path)
    dataset = load_dataset("fashioniq", clothes, splits="train,val", gallery="union")
    assert sides(dataset) == ("train", "val")
    assert dataset.options == {"splits": "train,val", "gallery": "union"}


# --- the published files ---


@OFFICIAL
@ALL
def test_a_damaged_copy_of_published_files_is_refused(module, tmp_path: Path) -> None:
    name = short(module)
    root, folder = tmp_path / "copy", Path(os.environ["HEADSTART_OFFICIAL_DATA"]) / name
    shutil.copytree(folder, root / "genecis" if module is genecis else root)
    chosen = {"tasks": "focus_object,change_object"} if module is genecis else {}
    for path in root.rglob("*"):
        path.chmod(0o755)
    rewrite(root / ANNOTATION[name], lambda rows: rows[:-1])
    message = r"(queries|rows): [\d,]+ expected, [\d,]+ found"
    with pytest.raises(DatasetError, match=message):
        module.load(root, require_images=False, **chosen)
    counts = module.load(root, require_images=False, check="none", **chosen).counts
    assert counts["set"] == "published names, counts not asserted"


@OFFICIAL
@ALL
def test_the_record_shown_is_one_of_the_published(module) -> None:
    shown = re.search(r"\{\"(?:.|\n)*?\}(?=\n)", module.__doc__.replace(", … 14", ""))
    assert shown
    text = " ".join(shown[0].split())
    record, at = json.JSONDecoder().raw_decode(text)
    name = ANNOTATION[short(module)].replace("focus", "change")
    rows = json.loads((official(short(module)) / name).read_text())
    if module is genecis:
        rows = [row | {"gallery": row["gallery"][:1]} for row in rows]
    assert record in rows
    assert at == len(text)
