"""Readers of `cirr` and `fashioniq` on miniatures in the exact layouts and on the published files."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composed_sets import (
    OFFICIAL,
    as_queries,
    asked,
    change_row,
    encoded,
    official,
    rewrite,
    words,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cache_builder import FeatureCache
from cache_builder.backbones import clip
from cache_builder.datasets import cirr, fashioniq
from cache_builder.errors import UnknownName
from cache_builder.records import DatasetError, DatasetNotFound
from cache_builder.testing import check_dataset

ANNOTATION = {"cirr": "captions/cap.rc2.val.json", "fashioniq": "captions/cap.dress.val.json"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return cirr.miniature(tmp_path / "cirr")


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    return fashioniq.miniature(tmp_path / "fashioniq")


# --- cirr ---


def cirr_rows(root: Path, split: str = "val") -> list[dict[str, Any]]:
    return json.loads((root / f"captions/cap.rc2.{split}.json").read_text())


def test_cirr_says_what_its_rows_say(photos: Path) -> None:
    dataset = cirr.load(photos)
    for split, name in (("val", "val"), ("test", "test1")):
        listed = list(json.loads((photos / f"image_splits/split.rc2.{name}.json").read_text()))
        assert dataset.tasks.galleries[split].images == tuple(listed)
        assert not dataset.tasks.galleries[split].with_reference
        for row, e in zip(cirr_rows(photos, name), asked(dataset, split), strict=True):
            members = row["img_set"]["members"]
            assert (e.id, e.reference, e.gallery) == (str(row["pairid"]), row["reference"], split)
            assert words(dataset, e) == [row["caption"].strip()]
            assert e.subset == tuple(m for m in members if m != row["reference"])
            assert len(e.subset) == 5
            assert e.targets == ((row["target_hard"],) if split == "val" else ())
            assert e.categories == ()


def test_val_of_cirr_is_called_dev_and_test_test1(photos: Path) -> None:
    dataset = cirr.load(photos)
    assert Counter(i.id.partition("-")[0] for i in dataset.images) == {"dev": 7, "test1": 6}
    assert {e.reference.partition("-")[0] for e in asked(dataset, "val")} == {"dev"}
    assert not [key for row in cirr_rows(photos, "test1") for key in row if "target" in key]
    assert {len(e.targets) for e in asked(dataset, "test")} == {0}
    train = cirr.load(photos, splits="train").images[0]
    assert train.open().size == (30, 25)
    assert train.path is not None
    assert train.path().parent.relative_to(photos).as_posix() == "img_raw/train/3"


def test_soft_targets_count_nowhere(photos: Path) -> None:
    before = cirr.load(photos).digest()
    path = photos / ANNOTATION["cirr"]
    soft = {cirr_rows(photos)[0]["reference"]: 1.0, "nowhere": 0.5}
    change_row(path, 0, target_soft=soft)
    change_row(path, 1, target_soft=None)
    assert cirr.load(photos).digest() == before


def test_a_reference_that_is_its_own_target_is_refused(photos: Path) -> None:
    change_row(photos / ANNOTATION["cirr"], 1, target_hard=cirr_rows(photos)[1]["reference"])
    with pytest.raises(DatasetError, match="1 queries with their reference among the targets"):
        cirr.load(photos)


@pytest.mark.parametrize("split", ["val", "test1"])
@pytest.mark.parametrize("fault", ["five", "seven", "twice", "without the reference", "number"])
def test_members_are_six_different_images_with_the_reference(
    photos: Path, split: str, fault: str
) -> None:
    row = cirr_rows(photos, split)[1]
    members = row["img_set"]["members"]
    rest = [m for m in members if m != row["reference"]]
    bad = {
        "five": members[:5],
        "seven": [*members, "more"],
        "twice": [*rest[:4], rest[0], row["reference"]],
        "without the reference": [*rest, "more"],
        "number": [*members[:5], 6],
    }[fault]
    change_row(photos / f"captions/cap.rc2.{split}.json", 1, img_set={"members": bad})
    with pytest.raises(DatasetError, match=rf"cap\.rc2\.{split}\.json row 1: .*members"):
        cirr.load(photos)


def test_a_target_of_cirr_is_among_the_members(photos: Path) -> None:
    change_row(photos / ANNOTATION["cirr"], 0, target_hard="dev-906-2-img0")
    with pytest.raises(DatasetError, match=r"row 0: target_hard .* is not among the members"):
        cirr.load(photos)


def test_every_member_must_be_an_image_of_the_split(photos: Path) -> None:
    row = cirr_rows(photos, "test1")[0]
    members = [*row["img_set"]["members"][:5], "test1-gone"]
    change_row(photos / "captions/cap.rc2.test1.json", 0, img_set={"members": members})
    with pytest.raises(DatasetError, match=r"not in their gallery, e\.g\. 'test1-gone' of query"):
        cirr.load(photos)


def test_a_pairid_occurs_once(photos: Path) -> None:
    change_row(photos / "captions/cap.rc2.test1.json", 0, pairid=cirr_rows(photos)[0]["pairid"])
    with pytest.raises(DatasetError, match="1 pairids occur twice"):
        cirr.load(photos)


def test_an_image_name_of_cirr_belongs_to_one_split(photos: Path) -> None:
    path = photos / "image_splits/split.rc2.test1.json"
    rewrite(path, lambda held: held.update({"dev-900-0-img0": "./test1/dev-900-0-img0.png"}))
    with pytest.raises(DatasetError, match=r"1 image names occur twice, e\.g\. 'dev-900-0-img0'"):
        cirr.load(photos)


@pytest.mark.parametrize(
    "place", ["./test1/x.png", "./dev/../../x.png", "/etc/passwd", "./dev", "", 7, "dev\\x.png"]
)
def test_a_path_of_cirr_stays_in_the_folder_of_its_split(photos: Path, place: object) -> None:
    path = photos / "image_splits/split.rc2.val.json"
    rewrite(path, lambda held: held.update({"dev-900-0-img0": place}))
    with pytest.raises(DatasetError, match=r"split\.rc2\.val\.json image 'dev-900-0-img0'"):
        cirr.load(photos)


@pytest.mark.parametrize("pairid", [True, -1, 10**12, "8", 8.0, None])
def test_a_pairid_is_a_number(photos: Path, pairid: object) -> None:
    change_row(photos / ANNOTATION["cirr"], 0, pairid=pairid)
    with pytest.raises(DatasetError, match=r"row 0: pairid is .*, not an integer from 0 to below"):
        cirr.load(photos)


def test_a_blank_caption_stays_a_query_of_cirr_and_is_counted(photos: Path) -> None:
    change_row(photos / "captions/cap.rc2.test1.json", 0, caption=" ")
    dataset = cirr.load(photos)
    assert words(dataset, asked(dataset, "test")[0]) == [""]
    assert dataset.counts["blank captions"] == "1"


def test_a_blank_caption_can_be_built(
    photos: Path, make_cache: Callable[..., FeatureCache]
) -> None:
    change_row(photos / "captions/cap.rc2.test1.json", 0, caption=" ")
    cache = make_cache(dataset=cirr.load(photos), backbone=clip.tiny())
    assert cache.tasks == cirr.load(photos).tasks
    assert not cache.quarantined


def test_both_layouts_of_cirr_say_the_same(photos: Path, tmp_path: Path) -> None:
    other = cirr.miniature(tmp_path / "common", layout="common")
    assert (other / "dev").is_dir()
    assert (other / "cirr/captions").is_dir()
    found = check_dataset(cirr.load(other))
    assert found.digest() == cirr.load(photos).digest()
    assert (found.counts["layout"], cirr.load(photos).counts["layout"]) == ("common", "official")


def test_both_layouts_at_once_are_asked_about(photos: Path) -> None:
    shutil.copytree(photos / "captions", photos / "cirr/captions")
    shutil.copytree(photos / "image_splits", photos / "cirr/image_splits")
    with pytest.raises(DatasetError, match=r"holds both .* with layout=official or layout=common"):
        cirr.load(photos)
    assert cirr.load(photos, layout="official").counts["layout"] == "official"
    with pytest.raises(DatasetNotFound, match=r"none of its 7 images of val: .*/dev/"):
        cirr.load(photos, layout="common")


def test_neither_layout_of_cirr_names_both(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound, match=r"captions/ \(layout official\) and cirr/captions/"):
        cirr.load(tmp_path)


def as_published(monkeypatch: pytest.MonkeyPatch, **changed: dict[str, int]) -> None:
    """CIRR's constants for the miniature."""
    monkeypatch.setattr(
        cirr, "QUERIES", {"train": 2, "val": 2, "test": 2, **changed.get("queries", {})}
    )
    monkeypatch.setattr(
        cirr, "IMAGES", {"train": 6, "val": 7, "test": 6, **changed.get("images", {})}
    )
    marks = {s: [f"{f}-900-0-img0"] for s, f in cirr.FOLDERS.items()}
    monkeypatch.setattr(cirr, "MARKS", marks)


def test_counts_are_asserted_where_the_set_is_recognised(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_published(monkeypatch, queries={"train": 9})
    counts = cirr.load(photos, splits="train,val,test").counts
    assert counts["set"] == "the published one, its counts asserted"
    assert counts["val images"] == "7 (published 7)"
    assert counts["train queries"] == "2 (papers 9)"  # from a paper: shown, never asserted


@pytest.mark.parametrize("what", ["queries", "images"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_damaged_published_set_is_refused(
    photos: Path, monkeypatch: pytest.MonkeyPatch, what: str, split: str
) -> None:
    as_published(monkeypatch, **{what: {split: 9}})
    with pytest.raises(DatasetError, match=rf"{split} {what}: 9 expected, \d found"):
        cirr.load(photos)
    counts = cirr.load(photos, check="none").counts
    assert counts["set"] == "published names, counts not asserted"


# --- fashioniq ---


def fashion_rows(root: Path, category: str, split: str = "val") -> list[dict[str, Any]]:
    return json.loads((root / f"captions/cap.{category}.{split}.json").read_text())


def test_fashioniq_says_what_its_rows_say(clothes: Path) -> None:
    dataset = fashioniq.load(clothes, splits="val,test")
    for split in ("val", "test"):
        rows = [(c, row) for c in fashioniq.CATEGORIES for row in fashion_rows(clothes, c, split)]
        for (category, row), e in zip(rows, asked(dataset, split), strict=True):
            a, b = (caption.strip(".?, ") for caption in row["captions"])
            assert e.reference == row["candidate"]
            assert e.targets == ((row["target"],) if split == "val" else ())
            assert (e.categories, e.gallery) == ((category,), f"{split}/{category}/split")
            assert words(dataset, e) == [f"{a} and {b}", f"{b} and {a}"]
            assert e.subset == ()
    assert "target" not in fashion_rows(clothes, "dress", "test")[0]
    assert words(dataset, asked(dataset, "val")[0]) == [
        "is red and has a belt",
        "has a belt and is red",
    ]


def test_one_order_of_captions_is_a_choice(clothes: Path) -> None:
    both, single = fashioniq.load(clothes), fashioniq.load(clothes, orders="single")
    assert {len(e.modifications) for e in both.tasks.composed} == {2}
    assert {len(e.modifications) for e in single.tasks.composed} == {1}
    first = [words(both, e)[0] for e in both.tasks.composed]
    assert [words(single, e) for e in single.tasks.composed] == [[one] for one in first]
    assert both.digest() != single.digest()


def test_the_gallery_is_the_list_or_what_its_triplets_name(clothes: Path) -> None:
    for category in fashioniq.CATEGORIES:
        listed = json.loads((clothes / f"image_splits/split.{category}.val.json").read_text())
        rows = fashion_rows(clothes, category)
        named = {row[key] for row in rows for key in ("candidate", "target")}
        wide = fashioniq.load(clothes).tasks.galleries[f"val/{category}/split"]
        narrow = fashioniq.load(clothes, gallery="union").tasks.galleries[f"val/{category}/union"]
        assert wide.images == tuple(listed)
        assert narrow.images == tuple(i for i in listed if i in named)
        assert len(narrow.images) == 3 < len(wide.images) == 4
        assert wide.with_reference
        assert narrow.with_reference


def test_the_gallery_s_name_is_part_of_every_number(clothes: Path) -> None:
    for gallery in ("split", "union"):
        dataset = check_dataset(fashioniq.load(clothes, gallery=gallery))
        assert as_queries(dataset, "val").gallery_names == (f"val {gallery}",)
        assert (
            dataset.counts[f"val dress gallery {gallery}"] == {"split": "4", "union": "3"}[gallery]
        )


def test_test_has_no_union(clothes: Path) -> None:
    with pytest.raises(UnknownName, match=r"no gallery union for test.*ask for gallery=split"):
        fashioniq.load(clothes, splits="val,test", gallery="union")


def test_an_image_of_two_categories_is_encoded_once(clothes: Path) -> None:
    dataset = fashioniq.load(clothes)
    assert len(dataset.images) == 11
    both = [n for n, g in dataset.tasks.galleries.items() if "B0SHV0001" in g.images]
    assert both == ["val/shirt/split", "val/toptee/split"]


def test_images_that_can_no_longer_be_had_are_counted_and_named(clothes: Path) -> None:
    assert fashioniq.load(clothes).counts["images missing"] == "0 of 11"
    for name in ("B0DRV0002", "B0TOV0003"):
        (clothes / f"images/{name}.jpg").unlink()
    dataset = fashioniq.load(clothes)
    assert dataset.counts["images missing"] == "2 of 11, e.g. 'B0DRV0002', 'B0TOV0003'"
    lost = {i.id: i for i in dataset.images}["B0DRV0002"]
    with pytest.raises(FileNotFoundError, match=r"B0DRV0002\.jpg nor .*B0DRV0002\.png"):
        lost.open()
    told = fashioniq.load(clothes, require_images=False).counts
    assert told["images missing"] == "images not looked for"


def test_an_image_may_be_a_png(clothes: Path) -> None:
    (clothes / "images/B0DRV0002.jpg").unlink()
    Image.new("RGB", (9, 4)).save(clothes / "images/B0DRV0002.png")
    dataset = fashioniq.load(clothes)
    assert dataset.counts["images missing"] == "0 of 11"
    assert {i.id: i for i in dataset.images}["B0DRV0002"].open().size == (9, 4)


def test_an_empty_caption_is_counted_and_two_are_refused(clothes: Path) -> None:
    path = clothes / ANNOTATION["fashioniq"]
    change_row(path, 0, captions=[" . ", "Is Longer."])
    dataset = fashioniq.load(clothes)
    assert words(dataset, asked(dataset, "val")[0]) == ["and Is Longer", "Is Longer and"]
    assert dataset.counts["queries with an empty caption"] == "1"
    change_row(path, 0, captions=[".", "?,"])
    with pytest.raises(DatasetError, match=r"cap\.dress\.val\.json row 0: both captions are empty"):
        fashioniq.load(clothes)


@pytest.mark.parametrize("said", [["a"], ["a", "b", "c"], ["a", 3], "ab", None])
def test_captions_are_two_texts(clothes: Path, said: object) -> None:
    change_row(clothes / ANNOTATION["fashioniq"], 1, captions=said)
    with pytest.raises(DatasetError, match=r"cap\.dress\.val\.json row 1: captions"):
        fashioniq.load(clothes)


@pytest.mark.parametrize("key", ["candidate", "target"])
@pytest.mark.parametrize("name", ["B0GONE", None, 7, ""])
def test_both_ends_of_an_edit_are_in_the_gallery(clothes: Path, key: str, name: object) -> None:
    change_row(clothes / ANNOTATION["fashioniq"], 0, **{key: name})
    with pytest.raises(DatasetError, match=r"'B0GONE' of query 'dress/val/0'|must be a text"):
        fashioniq.load(clothes)
    if name == "B0GONE":
        with pytest.raises(DatasetError, match="'B0GONE' of query 'dress/val/0'"):
            fashioniq.load(clothes, gallery="union")


def test_an_edit_of_fashioniq_that_ends_where_it_starts_is_refused(clothes: Path) -> None:
    row = fashion_rows(clothes, "shirt")[0]
    change_row(clothes / "captions/cap.shirt.val.json", 0, target=row["candidate"])
    with pytest.raises(
        DatasetError, match=r"reference among the targets, e\.g\. query 'shirt/val/0'"
    ):
        fashioniq.load(clothes)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["../../etc/passwd"], "'..' component"),
        ([3], "it must be a text"),
        (["B0DRV0000", "B0DRV0000"], "occur twice"),
        ({"a": 1}, "not a list"),
    ],
)
def test_a_list_of_images_is_checked(clothes: Path, names: Any, message: str) -> None:
    (clothes / "image_splits/split.dress.val.json").write_text(json.dumps(names))
    with pytest.raises(DatasetError, match=message):
        fashioniq.load(clothes)


@pytest.mark.parametrize("gallery", ["split", "union"])
def test_counts_of_fashioniq_are_asserted_for_its_gallery(
    clothes: Path, monkeypatch: pytest.MonkeyPatch, gallery: str
) -> None:
    sizes = {"split": 4, "union": 3}
    counts = {c: dict.fromkeys(("train", "val", "test"), 2) for c in fashioniq.CATEGORIES}
    galleries = {g: dict.fromkeys(fashioniq.CATEGORIES, n) for g, n in sizes.items()}
    monkeypatch.setattr(fashioniq, "QUERIES", counts)
    monkeypatch.setattr(fashioniq, "GALLERIES", galleries)
    monkeypatch.setattr(fashioniq, "MARKS", {"val": ("B0DRV0000", "B0SHV0000")})
    told = fashioniq.load(clothes, gallery=gallery).counts
    assert told[f"val shirt gallery {gallery}"] == f"{sizes[gallery]} (published {sizes[gallery]})"
    galleries[gallery]["toptee"] = 9
    with pytest.raises(DatasetError, match=f"val toptee gallery {gallery}: 9 expected"):
        fashioniq.load(clothes, gallery=gallery)
    other = "union" if gallery == "split" else "split"
    assert fashioniq.load(clothes, gallery=other).counts["set"].startswith("the published one")


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(st.sampled_from("ab .?,!"), max_size=9))
def test_a_caption_is_cut_at_its_ends_alone(caption: str) -> None:
    at, end = 0, len(caption)
    while at < end and caption[at] in ".?, ":
        at += 1
    while end > at and caption[end - 1] in ".?, ":
        end -= 1
    assert fashioniq.clean(caption) == caption[at:end]


# --- the published files ---


@OFFICIAL
def test_the_published_cirr() -> None:
    dataset = cirr.load(official("cirr"), require_images=False)
    assert dataset.counts["set"] == "the published one, its counts asserted"
    assert (len(asked(dataset, "val")), len(asked(dataset, "test"))) == (4181, 4148)
    assert len(dataset.tasks.galleries["val"].images) == 2297
    assert len(dataset.tasks.galleries["test"].images) == 2315
    assert len(encoded(dataset)) == 2297 + 2315
    train = official("cirr") / "image_splits/split.rc2.train.json"
    pictures = cirr._read_images(official("cirr"), "train", Path("img_raw"))
    assert len(json.loads(train.read_text())) == len(pictures) == cirr.IMAGES["train"] == 16939
    assert set(cirr.MARKS["train"]) <= set(pictures)
    for split, name in (("val", "val"), ("test", "test1")):
        queries = as_queries(dataset, split)
        assert queries.answered == (split == "val")
        assert {len(few) for few in queries.subset} == {5}
        assert set(cirr.MARKS[split]) <= set(dataset.tasks.galleries[split].images)
        for row, e in zip(cirr_rows(official("cirr"), name), asked(dataset, split), strict=True):
            assert {*e.subset, e.reference} == set(row["img_set"]["members"])
            assert e.targets == ((row["target_hard"],) if split == "val" else ())
    softs = {v for row in cirr_rows(official("cirr")) for v in row["target_soft"].values()}
    assert softs == {1.0, 0.5, 0.2, -1.0}
    assert dataset.counts["blank captions"] == "1"


@OFFICIAL
@pytest.mark.parametrize(
    ("gallery", "sizes"), [("split", (3817, 6346, 5373)), ("union", (2628, 3089, 2902))]
)
def test_the_published_fashioniq(gallery: str, sizes: tuple[int, ...]) -> None:
    splits = ("train", "val", "test") if gallery == "split" else ("train", "val")
    root = official("fashioniq")
    dataset = fashioniq.load(root, splits=splits, gallery=gallery, require_images=False)
    assert dataset.counts["set"] == "the published one, its counts asserted"
    asked_of = Counter((e.split, e.categories[0]) for e in dataset.tasks.composed)
    table = {"train": (5985, 5988, 6027), "val": (2017, 2038, 1961), "test": (2024, 2038, 2056)}
    for split in splits:
        assert tuple(asked_of[split, c] for c in fashioniq.CATEGORIES) == table[split]
        assert as_queries(dataset, split).answered == (split != "test")
        assert set(fashioniq.MARKS[split]) <= {e.reference for e in asked(dataset, split)}
    found = dataset.tasks.galleries
    names = [f"val/{c}/{gallery}" for c in fashioniq.CATEGORIES]
    assert tuple(len(found[name].images) for name in names) == sizes
    assert encoded(dataset) == {i for g in found.values() for i in g.images}
