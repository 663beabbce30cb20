"""The reader of `genecis` on a miniature in the exact layout and on the published files; its crops."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from composed_sets import (
    NO_NUMBERS,
    OFFICIAL,
    as_queries,
    change_row,
    encoded,
    official,
    read,
    rewrite,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stand_in import StandIn

from cache_builder import FeatureCache
from cache_builder.datasets import circo, genecis
from cache_builder.datasets.genecis import crop, crop_box
from cache_builder.errors import UnknownName
from cache_builder.images import BadImage
from cache_builder.records import DatasetError, DatasetNotFound
from cache_builder.testing import check_dataset
from eval.composed_table import CATEGORIES
from heads.overlap import coco_number, images_of


@pytest.fixture
def looks(tmp_path: Path) -> Path:
    return genecis.miniature(tmp_path / "genecis")


def looked(entry: dict[str, Any]) -> str:
    """The image id of an entry, from the definition."""
    if "val_image_id" in entry:
        return str(entry["val_image_id"])
    return f"{entry['image_id']}@{','.join(map(str, entry['instance_bbox']))}"


def test_genecis_says_what_its_rows_say(looks: Path) -> None:
    dataset = genecis.load(looks)
    for task in genecis.TASKS:
        rows = read(looks / f"genecis/{task}.json")
        mine = [e for e in dataset.tasks.composed if e.categories == (task,)]
        for number, (row, e) in enumerate(zip(rows, mine, strict=True)):
            ids = [looked(entry) for entry in (row["target"], *row["gallery"])]
            assert (e.id, e.reference) == (f"{task}/{number}", looked(row["reference"]))
            assert e.subset == tuple(ids)  # the target first, then the distractors
            assert e.targets == (ids[0],)
            assert (e.gallery, e.split) == ("", "test")
            assert words(dataset, e) == [row["condition"]]
    assert dataset.tasks.galleries == {}
    assert len({e.id for e in dataset.tasks.composed}) == 8
    assert len(encoded(dataset)) == 3 + 6


def test_tasks_are_those_of_the_evaluator() -> None:
    assert CATEGORIES["genecis"] == genecis.TASKS
    assert CATEGORIES["circo"] == circo.ASPECTS


def test_some_tasks_are_read_without_the_files_of_others(looks: Path) -> None:
    for task in ("focus_attribute", "change_attribute"):
        (looks / f"genecis/{task}.json").unlink()
    for part in genecis.GENOME[1:]:
        shutil.rmtree(looks / part)
    dataset = check_dataset(genecis.load(looks, tasks="change_object,focus_object"))
    assert Counter(e.categories[0] for e in dataset.tasks.composed) == {
        "focus_object": 2,
        "change_object": 2,
    }
    assert dataset.decode == circo.load(circo.miniature(looks / "circo")).decode
    with pytest.raises(DatasetNotFound, match=r"focus_attribute\.json.*tasks=focus_object"):
        genecis.load(looks)
    with pytest.raises(UnknownName, match="tasks='focus' is not known"):
        genecis.load(looks, tasks="focus")


def test_attribute_tasks_alone_need_no_coco(looks: Path) -> None:
    shutil.rmtree(looks / "val2017")
    dataset = check_dataset(genecis.load(looks, tasks=["focus_attribute"], check="official"))
    assert "padded to square with black" in dataset.decode
    assert dataset.counts["focus_attribute rows"] == "2 (papers 1,998)"
    with pytest.raises(DatasetNotFound, match="none of its 3 images of COCO"):
        genecis.load(looks)


def test_half_of_visual_genome_is_called_by_its_name(looks: Path) -> None:
    for part in genecis.GENOME[1:]:
        shutil.rmtree(looks / part)
    with pytest.raises(
        DatasetNotFound, match=r"images of Visual Genome: .*VG_100K_all/61\.jpg nor"
    ):
        genecis.load(looks)


def test_a_crop_s_id_is_no_number_of_coco(looks: Path) -> None:
    dataset = genecis.load(looks)
    crops = [i.id for i in dataset.images if "@" in i.id]
    assert crops[0] == "61@20,10,12,8"
    assert "61@0,0,30.5,20" in crops
    assert {coco_number(i, "genecis") for i in crops} == {None}
    whole = [i.id for i in dataset.images if "@" not in i.id]
    assert [coco_number(i, "genecis") for i in whole] == [5, 70, 4321]
    assert set(images_of(dataset.tasks, "composed", "test")) == {*crops, *whole}


def test_a_picture_of_visual_genome_lies_in_the_first_folder_that_has_it(looks: Path) -> None:
    def shown() -> Any:
        image = {i.id: i for i in genecis.load(looks).images}["2400001@0,0,30.5,20"]
        picture = image.open()
        return picture.getpixel((picture.width // 2, picture.height // 2))

    assert sorted(p.name for p in looks.iterdir()) == ["VG_100K", "VG_100K_2", "genecis", "val2017"]
    grey = shown()
    for part, colour in (("VG_100K", (9, 200, 9)), ("VG_100K_all", (9, 9, 200))):
        (looks / part).mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), colour).save(looks / part / "2400001.jpg", quality=100)
        now = shown()
        assert now != grey
        assert max(abs(a - b) for a, b in zip(now, colour, strict=True)) < 4
    (looks / "VG_100K_all/61.jpg").symlink_to(looks / "VG_100K/61.jpg")
    with pytest.raises(ValueError, match="is a link that leaves"):
        genecis.load(looks).images[0].open()


def test_a_target_that_is_also_a_distractor_competes_once(looks: Path) -> None:
    path = looks / "genecis/change_object.json"
    row = read(path)[0]
    change_row(path, 0, gallery=[row["gallery"][0], row["target"], row["gallery"][0]])
    dataset = check_dataset(genecis.load(looks))
    found = next(e for e in dataset.tasks.composed if e.id == "change_object/0")
    assert found.subset == (looked(row["target"]), looked(row["gallery"][0]))
    assert dataset.counts["rows that list an image twice"] == "1"
    assert as_queries(dataset, "test").subset[-2] == found.subset


def test_a_row_of_genecis_whose_reference_is_the_target_is_refused(looks: Path) -> None:
    path = looks / "genecis/focus_attribute.json"
    change_row(path, 1, reference=read(path)[1]["target"])
    with pytest.raises(DatasetError, match=r"among the targets, e\.g\. query 'focus_attribute/1'"):
        genecis.load(looks)


@NO_NUMBERS
@pytest.mark.parametrize("role", ["reference", "target", "gallery"])
@pytest.mark.parametrize(
    ("task", "key"), [("focus_object", "val_image_id"), ("focus_attribute", "image_id")]
)
def test_numbers_of_genecis_are_integers_below_a_million_million(
    looks: Path, task: str, key: str, role: str, number: object
) -> None:
    entry = {key: number, "instance_bbox": [1, 2, 3, 4]}
    change_row(looks / f"genecis/{task}.json", 1, **{role: [entry] if role == "gallery" else entry})
    message = rf"{task}\.json row 1: {role}: {key} is .*, not an integer from 0"
    with pytest.raises(DatasetError, match=message):
        genecis.load(looks)


@pytest.mark.parametrize(
    "box",
    [
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [1, 2, 0, 4],
        [1, 2, 3, -4],
        [1, 2, 3, True],
        [1, 2, "3", 4],
        [10**400, 2, 3, 4],
        [1e9, 2, 3, 4],
        "1,2,3,4",
        None,
    ],
    ids=lambda box: repr(box)[:20],
)
def test_a_box_is_four_numbers_of_pixels(looks: Path, box: object) -> None:
    path = looks / "genecis/change_attribute.json"
    change_row(path, 0, target={"image_id": 61, "instance_bbox": box})
    with pytest.raises(DatasetError, match=r"row 0: target: instance_bbox is"):
        genecis.load(looks)


@pytest.mark.parametrize("condition", ["", " ", None, 5])
def test_a_condition_is_a_text(looks: Path, condition: object) -> None:
    change_row(looks / "genecis/focus_object.json", 0, condition=condition)
    with pytest.raises(DatasetError, match=r"focus_object\.json row 0: condition is"):
        genecis.load(looks)


def test_counts_of_object_tasks_are_asserted_and_of_attribute_tasks_shown(
    looks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = dict.fromkeys(("focus_object", "change_object"), (("5", "70"),))
    monkeypatch.setattr(genecis, "MARKS", marks)
    monkeypatch.setattr(genecis, "ROWS", dict.fromkeys(genecis.TASKS, 2) | {"focus_attribute": 9})
    sizes = {t: 1 if t.endswith("object") else 4 for t in genecis.TASKS}
    monkeypatch.setattr(genecis, "DISTRACTORS", sizes)
    told = genecis.load(looks).counts
    assert told["set"] == "the published one, its counts asserted"
    assert told["focus_object rows with 1 distractors"] == "2 (published 2)"
    assert told["focus_attribute rows"] == "2 (papers 9)"
    assert told["change_attribute rows with 4 distractors"] == "2 (papers 2)"
    path = looks / "genecis/focus_object.json"
    change_row(path, 1, gallery=[])
    with pytest.raises(DatasetError, match="focus_object rows with 1 distractors: 2 expected, 1"):
        genecis.load(looks)
    rewrite(path, lambda rows: rows[:1])
    with pytest.raises(DatasetError, match="focus_object rows: 2 expected, 1 found"):
        genecis.load(looks)


def test_crops_of_one_file_are_all_encoded(
    looks: Path, make_cache: Callable[..., FeatureCache]
) -> None:
    """Files of the same bytes are encoded once, so a crop may not give its file as its own."""
    dataset, backbone = genecis.load(looks), StandIn()
    cache = make_cache(dataset=dataset, backbone=backbone)
    assert not cache.quarantined
    assert sum(backbone.encoded) == len(dataset.images) + len(dataset.texts) == 9 + 2
    crops = [i for i in dataset.images if "@" in i.id]
    assert {i.path for i in crops} == {None}
    assert len({i.open().tobytes() for i in crops}) == len(crops) == 6


def test_a_box_outside_its_picture_is_left_to_the_build(looks: Path) -> None:
    path = looks / "genecis/focus_attribute.json"
    change_row(path, 0, reference={"image_id": 61, "instance_bbox": [400, 10, 5, 5]})
    first = genecis.load(looks).images[0]
    for use in (first.open, first.size):
        with pytest.raises(BadImage, match="shows nothing of a picture of 64 × 48 pixels"):
            use()


# --- crops ---

CORNERS = st.sampled_from([0.0, 0.5, 1.0, 3.0, 7.25, 10.0, 23.0])
EXTENTS = st.sampled_from([0.5, 1.0, 2.0, 5.0, 9.5, 10.0, 40.0])


def slow_crop(picture: Image.Image, box: tuple[float, float, float, float]) -> np.ndarray:
    """Pixel by pixel, from the formula: left′ = max(0, x − 0.7 w), right′ = min(W, left′ + 1.7 w); likewise down."""
    (width, height), (x, y, w, h) = picture.size, box
    left, top = max(0, x - 0.7 * w), max(0, y - 0.7 * h)
    right, bottom = min(width, left + 1.7 * w), min(height, top + 1.7 * h)
    columns = [c for c in range(width) if round(left) <= c < round(right)]
    rows = [r for r in range(height) if round(top) <= r < round(bottom)]
    if columns and rows:  # as Pillow rounds
        assert picture.crop((left, top, right, bottom)).size == (len(columns), len(rows))
    side = max(len(columns), len(rows))
    square = np.zeros((side, side, 3), np.uint8)
    down, across = (side - len(rows)) // 2, (side - len(columns)) // 2
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            square[down + i, across + j] = np.asarray(picture)[r, c]
    return square


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.tuples(*[CORNERS] * 2),
    st.tuples(*[EXTENTS] * 2),
)
def test_a_crop_is_the_slow_one(
    size: tuple[int, int], corner: tuple[float, float], extent: tuple[float, float]
) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (*size[::-1], 3), dtype=np.uint8)
    picture, box = Image.fromarray(pixels), (*corner, *extent)
    expected = slow_crop(picture, box)
    if not expected.any():
        with pytest.raises(BadImage, match="shows nothing"):
            crop(picture, box)
        return
    assert np.array_equal(np.asarray(crop(picture, box)), expected)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((100, 100, 100, 50), (30, 65, 200, 150)),  # no context on the right, none below
        ((0, 0, 100, 50), (0, 0, 170, 85)),  # all of it there where the left runs into the edge
        ((10, 350, 100, 50), (0, 315, 170, 400)),
        ((480, 390, 100, 100), (410, 320, 500, 400)),
        ((35, 7, 50, 10), (0, 0, 85, 17)),
    ],
)
def test_a_crop_is_lop_sided(box: tuple[int, int, int, int], expected: tuple[int, ...]) -> None:
    x, y, w, h = map(float, box)
    assert crop_box((500, 400), (x, y, w, h)) == expected


def test_a_crop_stands_in_the_middle_of_a_black_square() -> None:
    wide = np.asarray(crop(Image.new("RGB", (40, 40), "white"), (20.0, 20.0, 10.0, 4.0)))
    assert wide.shape == (17, 17, 3)
    assert [int(row.min()) for row in wide] == [0] * 5 + [255] * 7 + [0] * 5
    record = np.asarray(crop(Image.new("RGB", (40, 40), "white"), (20.0, 20.0, 4.0, 9.0)))
    assert [int(column.min()) for column in record.transpose(1, 0, 2)].count(255) == 7


def test_a_crop_that_would_be_too_large_is_refused() -> None:
    with pytest.raises(BadImage, match="padded to a square has more than 100,000,000 pixels"):
        crop_box((30000, 10), (0.0, 0.0, 30000.0, 10.0))


# --- the published files ---


@OFFICIAL
def test_the_published_object_tasks_of_genecis() -> None:
    root = official("genecis")
    dataset = genecis.load(root, tasks="focus_object,change_object", require_images=False)
    assert dataset.counts["set"] == "the published one, its counts asserted"
    queries = as_queries(dataset, "test")
    assert Counter(k for (k,) in queries.categories) == {
        "focus_object": 1960,
        "change_object": 1960,
    }
    assert len(encoded(dataset)) == 3033
    once = Counter(len(few) for few in queries.subset)
    assert once == {15: 3919, 14: 1}
    assert dataset.counts["rows that list an image twice"] == "1"
    for task in ("focus_object", "change_object"):
        rows = read(root / f"genecis/{task}.json")
        mine = [e for e in dataset.tasks.composed if e.categories == (task,)]
        assert {len(row["gallery"]) for row in rows} == {14}
        assert set(genecis.MARKS[task]) <= {(e.reference, e.targets[0]) for e in mine}
        for row, e in zip(rows, mine, strict=True):
            ids = [looked(entry) for entry in (row["target"], *row["gallery"])]
            assert e.subset == tuple(dict.fromkeys(ids))
            assert e.subset[0] == e.targets[0]
            assert e.reference not in e.subset
