"""The reader of `circo` on a miniature in the exact layout and on the published files."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composed_sets import (
    NO_NUMBERS,
    OFFICIAL,
    as_queries,
    asked,
    change_row,
    encoded,
    official,
    read,
    rewrite,
    words,
)

from cache_builder.datasets import circo
from cache_builder.records import DatasetError, DatasetNotFound
from heads.overlap import coco_number

VAL = "annotations/val.json"


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    return circo.miniature(tmp_path / "circo")


def test_circo_says_what_its_rows_say(scenes: Path) -> None:
    dataset = circo.load(scenes)
    assert list(dataset.tasks.galleries) == ["unlabeled2017"]
    assert dataset.tasks.galleries["unlabeled2017"].with_reference
    for split in ("val", "test"):
        rows = read(scenes / f"annotations/{split}.json")
        for number, (row, e) in enumerate(zip(rows, asked(dataset, split), strict=True)):
            assert (e.id, e.reference) == (str(number), str(row["reference_img_id"]))
            assert e.targets == tuple(map(str, row.get("gt_img_ids", ())))
            assert e.categories == tuple(row.get("semantic_aspects", ()))
            assert words(dataset, e) == [row["relative_caption"].strip()]
            assert (e.gallery, e.subset) == ("unlabeled2017", ())
    assert set(read(scenes / "annotations/test.json")[0]) == {
        "reference_img_id",
        "relative_caption",
        "shared_concept",
        "id",
    }


def test_the_gallery_is_the_list_in_its_own_order(scenes: Path) -> None:
    listed = [str(row["id"]) for row in read(scenes / circo.LIST)["images"]]
    dataset = circo.load(scenes)
    assert listed != sorted(listed, key=int)
    assert list(dataset.tasks.galleries["unlabeled2017"].images) == listed
    assert [i.id for i in dataset.images] == listed
    for row, image in zip(read(scenes / circo.LIST)["images"], dataset.images, strict=True):
        assert image.path is not None
        assert image.path() == scenes / circo.PICTURES / row["file_name"]
        assert coco_number(image.id, "circo") == row["id"]


def test_the_target_comes_first_and_no_ground_truth_is_lost(scenes: Path) -> None:
    change_row(scenes / VAL, 0, gt_img_ids=[900000000042, 120, 31])
    first = asked(circo.load(scenes), "val")[0]
    assert first.targets == ("31", "900000000042", "120")


@pytest.mark.parametrize(
    "truths",
    [[31, 31], [31, 0, 0], [31] + [900000000042] * 22, [120, 900000000042], [], [31, 7, 31]],
    ids=["twice", "zeros", "23", "without the target", "empty", "reference"],
)
def test_padded_or_foreign_ground_truths_are_refused(scenes: Path, truths: list[int]) -> None:
    """The published loader pads them to 23; a copy that was written so is not read as if it were not."""
    change_row(scenes / VAL, 0, gt_img_ids=truths)
    with pytest.raises(DatasetError, match=r"val\.json row 0: gt_img_ids"):
        circo.load(scenes)


def test_the_reference_is_never_among_the_ground_truths(scenes: Path) -> None:
    change_row(scenes / VAL, 0, gt_img_ids=[31, 7])
    message = r"1 queries with their reference among the targets, e\.g\. query '0' \('7'\)"
    with pytest.raises(DatasetError, match=message):
        circo.load(scenes)


@pytest.mark.parametrize("key", ["reference_img_id", "target_img_id", "gt_img_ids"])
def test_every_image_of_a_query_is_in_the_gallery(scenes: Path, key: str) -> None:
    change: dict[str, Any] = {key: 5}
    if key != "reference_img_id":
        change = {"target_img_id": 31, "gt_img_ids": [31, 5]}
    change_row(scenes / VAL, 0, **change)
    with pytest.raises(DatasetError, match=r"not in their gallery, e\.g\. '5' of query '0'"):
        circo.load(scenes)


@NO_NUMBERS
@pytest.mark.parametrize("key", ["reference_img_id", "target_img_id", "id", "gt_img_ids"])
def test_numbers_of_circo_are_integers_below_a_million_million(
    scenes: Path, key: str, number: object
) -> None:
    value = [31, number] if key == "gt_img_ids" else number
    change_row(scenes / VAL, 0, **{key: value})
    with pytest.raises(DatasetError, match=rf"val\.json row 0: {key} is .*, not an integer from 0"):
        circo.load(scenes)


def test_the_largest_number_is_allowed(scenes: Path) -> None:
    number = 10**12 - 1
    rewrite(scenes / circo.LIST, lambda held: held["images"][1].update(id=number))
    change_row(scenes / VAL, 0, reference_img_id=number)
    change_row(scenes / "annotations/test.json", 0, reference_img_id=number)
    assert asked(circo.load(scenes), "val")[0].reference == str(number)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"semantic_aspects": ["colour"]}, "semantic aspect 'colour' is not one of cardinality"),
        ({"semantic_aspects": "addition"}, "semantic_aspects is 'addition', not a list"),
        ({"semantic_aspects": [3]}, "semantic_aspects is 3; it must be a text"),
        ({"relative_caption": "  "}, "relative_caption is '  '; it must be a text"),
        ({"gt_img_ids": {"31": 1}}, "not a list"),
    ],
)
def test_a_malformed_row_of_circo_is_named(
    scenes: Path, change: dict[str, Any], message: str
) -> None:
    change_row(scenes / VAL, 0, **change)
    with pytest.raises(DatasetError, match=r"val\.json row 0: ") as caught:
        circo.load(scenes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 7}, "image 0: id 7 occurs twice"),
        ({"id": True}, "image 0: id is True, not an integer"),
        ({"file_name": "../000000000007.jpg"}, "image 0: image name .* holds a '..' component"),
        ({"file_name": None}, "image 0: file_name is None; it must be a text"),
    ],
)
def test_the_list_of_images_is_checked(scenes: Path, change: dict[str, Any], message: str) -> None:
    rewrite(scenes / circo.LIST, lambda held: held["images"][0].update(change) or None)
    if change.get("id") == 7:
        message = message.replace("image 0", "image 1")
    with pytest.raises(DatasetError, match=rf"image_info_unlabeled2017\.json {message}"):
        circo.load(scenes)


def test_the_shared_concept_is_no_part_of_the_text(scenes: Path) -> None:
    before = circo.load(scenes).digest()
    change_row(scenes / VAL, 0, shared_concept="something else")
    change_row(scenes / VAL, 1, shared_concept=None)
    assert circo.load(scenes).digest() == before


def test_an_id_of_circo_occurs_once_in_a_split(scenes: Path) -> None:
    change_row(scenes / VAL, 1, id=0)
    with pytest.raises(DatasetError, match="1 ids of val occur twice, e"):
        circo.load(scenes)


def test_one_split_is_read_without_the_other(scenes: Path) -> None:
    (scenes / "annotations/test.json").unlink()
    assert len(circo.load(scenes, splits="val").tasks.composed) == 2
    with pytest.raises(
        DatasetNotFound, match=r"annotations/test\.json .*name with splits= those that are there"
    ):
        circo.load(scenes)


def test_without_images_the_list_may_be_missing_too(scenes: Path) -> None:
    shutil.rmtree(scenes / "COCO2017_unlabeled")
    with pytest.raises(DatasetNotFound, match=r"image_info_unlabeled2017\.json.*require_images=fa"):
        circo.load(scenes)
    dataset = circo.load(scenes, require_images=False)
    gallery = dataset.tasks.galleries["annotated"]
    assert gallery.images == ("7", "31", "900000000042", "8", "120")
    assert encoded(dataset) == set(gallery.images)
    assert dataset.counts["gallery"].startswith("5, only what the annotations name: there is no CO")
    assert as_queries(dataset, "val").gallery_names == ("annotated",)
    with pytest.raises(FileNotFoundError, match=r"unlabeled2017/000000000007\.jpg"):
        dataset.images[0].open()


def test_without_images_the_list_still_counts(scenes: Path) -> None:
    shutil.rmtree(scenes / circo.PICTURES)
    dataset = circo.load(scenes, require_images=False)
    assert len(dataset.tasks.galleries["unlabeled2017"].images) == 6
    assert dataset.counts["gallery"] == "6"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIRCO's constants for the miniature."""
    monkeypatch.setattr(circo, "QUERIES", {"val": 2, "test": 1})
    monkeypatch.setattr(circo, "TRUTHS", {"fewest": 1, "most": 2, "in all": 3})
    monkeypatch.setattr(circo, "MARKS", {"val": (7, 8), "test": (7,)})


def test_counts_of_circo_are_asserted(scenes: Path, published: None) -> None:
    told = circo.load(scenes).counts
    assert told["set"] == "the published one, its counts asserted"
    assert told["val ground truths, in all"] == "3 (published 3)"
    assert told["gallery"] == "6 (papers 123,403)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:1], "val queries: 2 expected, 1 found"),
        (lambda rows: rows[::-1], "val ids in order: 2 expected, 0 found"),
        (lambda rows: rows[1].update(id=5), "val ids in order: 2 expected, 1 found"),
        (lambda rows: rows[1]["gt_img_ids"].append(31), "val ground truths, fewest: 1 expected, 2"),
        (lambda rows: rows[0].update(gt_img_ids=[31]), "val ground truths, most: 2 expected, 1 fo"),
    ],
)
def test_a_damaged_circo_is_refused(
    scenes: Path, published: None, change: Callable[[Any], Any], message: str
) -> None:
    rewrite(scenes / VAL, change)
    with pytest.raises(DatasetError, match=message):
        circo.load(scenes)
    assert circo.load(scenes, check="none").counts["set"] == "published names, counts not asserted"


# --- the published files ---


@OFFICIAL
def test_the_published_circo() -> None:
    root = official("circo")
    dataset = circo.load(root, require_images=False)
    assert dataset.counts["set"] == "the published one, its counts asserted"
    for split, n in (("val", 220), ("test", 800)):
        examples = asked(dataset, split)
        assert [e.id for e in examples] == [str(i) for i in range(n)]
        assert as_queries(dataset, split).answered == (split == "val")
        rows = read(root / f"annotations/{split}.json")
        assert {(split, str(m)) for m in circo.MARKS[split]} <= {
            (split, e.reference) for e in examples
        }
        for row, e in zip(rows, examples, strict=True):
            assert e.targets == tuple(map(str, row.get("gt_img_ids", ())))
            assert e.targets[:1] == tuple(str(row[k]) for k in row if k == "target_img_id")
            assert len(set(e.targets)) == len(e.targets)
            assert e.reference not in e.targets
    sizes = [len(e.targets) for e in asked(dataset, "val")]
    assert (min(sizes), max(sizes), round(sum(sizes) / 220, 2)) == (1, 14, 4.16)
    assert {a for e in asked(dataset, "val") for a in e.categories} == set(circo.ASPECTS)
    assert encoded(dataset) == set(dataset.tasks.galleries["annotated"].images)
