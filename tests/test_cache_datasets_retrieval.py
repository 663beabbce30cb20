"""Readers of `coco` and `flickr30k` on miniatures in the exact layouts and on the published lists; `folder`'s rules."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cache_builder import load_dataset, plugins
from cache_builder.datasets import coco, flickr30k, folder, karpathy
from cache_builder.datasets.base import Dataset
from cache_builder.datasets.karpathy_files import Layout, read_rows
from cache_builder.errors import CacheError, UnknownName
from cache_builder.records import DatasetError, DatasetNotFound
from cache_builder.testing import check_dataset

BOTH = pytest.mark.parametrize("module", [coco, flickr30k], ids=["coco", "flickr30k"])

OFFICIAL = pytest.mark.skipif(
    "HEADSTART_OFFICIAL_DATA" not in os.environ,
    reason="set HEADSTART_OFFICIAL_DATA to a folder with karpathy/coco_test.json (data/coco_test.json of "
    "data-ming-and-application/CVLR-RD) and karpathy/flickr30k_test.json (Artanic30/MacCap)",
)


@pytest.fixture
def mscoco(tmp_path: Path) -> Path:
    return coco.miniature(tmp_path / "coco")


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    return flickr30k.miniature(tmp_path / "flickr", kind="lines")


def rewrite(root: Path, change: Callable[[list[dict[str, Any]]], object]) -> Path:
    """Change the rows of dataset_coco.json in place."""
    path = root / "dataset_coco.json"
    held = json.loads(path.read_text())
    change(held["images"])
    path.write_text(json.dumps(held))
    return root


def captions(dataset: Dataset) -> dict[str, list[str]]:
    """Image → its captions, through the task."""
    texts = {t.id: t.text for t in dataset.texts}
    return {e.image: [texts[c] for c in e.captions] for e in dataset.tasks.retrieval}


def splits(dataset: Dataset) -> dict[str, str]:
    return {e.image: e.split for e in dataset.tasks.retrieval}


@BOTH
def test_a_miniature_conforms(module, tmp_path: Path) -> None:
    dataset = check_dataset(module, tmp_path)
    assert dataset.tasks.kinds == ("retrieval",)
    assert all(image.size() == image.open().size for image in dataset.images)


@pytest.mark.parametrize(
    ("module", "kind"), [(coco, "lists"), (flickr30k, "lists"), (flickr30k, "lines")]
)
def test_every_layout_says_the_same_of_the_same_images(module, kind: str, tmp_path: Path) -> None:
    whole = module.load(module.miniature(tmp_path / "whole"))
    parts = check_dataset(module.load(module.miniature(tmp_path / "parts", kind=kind)))
    assert captions(parts) == captions(whole)
    assert splits(parts) == splits(whole)


def test_the_shared_files_are_no_data_sets() -> None:
    assert {"coco", "flickr30k"} <= set(plugins.names("cache_builder.datasets"))
    assert not {"karpathy", "karpathy_files"} & set(plugins.names("cache_builder.datasets"))


def test_captions_are_the_raw_strings_without_outer_blanks(mscoco: Path) -> None:
    found = captions(coco.load(mscoco))
    assert found["train2014/COCO_train2014_000000000009.jpg"][0] == "A red mug."
    assert found["val2014/COCO_val2014_000000000042.jpg"][:2] == ["A dog, and a ball.", 'a "dog"']
    assert found["val2014/COCO_val2014_000000000073.jpg"][0] == "A blue bus."
    assert {image: len(of) for image, of in found.items() if len(of) != 5} == {
        "val2014/COCO_val2014_000000000074.jpg": 6
    }


def test_inner_blanks_and_line_ends_stay(mscoco: Path) -> None:
    rewrite(mscoco, lambda rows: rows[0]["sentences"][0].update(raw=" A  red\nmug .\u00a0"))
    assert coco.load(mscoco).texts[0].text == "A  red\nmug ."


def test_text_ids_are_sentence_numbers_or_places(mscoco: Path, flickr: Path) -> None:
    assert [t.id for t in coco.load(mscoco).texts[:2]] == ["7000", "7001"]
    assert [t.id for t in flickr30k.load(flickr).texts[:2]] == ["1001.jpg#0", "1001.jpg#1"]


def test_equal_captions_of_two_images_are_two_texts(mscoco: Path) -> None:
    dataset = coco.load(mscoco)
    same = [t.id for t in dataset.texts if t.text == "two"]
    owners = [e.image for e in dataset.tasks.retrieval if set(same) & set(e.captions)]
    assert len(same) == len(owners) == 2


def test_restval_trains_unless_it_is_left_out(mscoco: Path) -> None:
    restval = "val2014/COCO_val2014_000000000042.jpg"
    with_it, without = coco.load(mscoco), coco.load(mscoco, with_restval=False)
    assert splits(with_it)[restval] == "train"
    assert splits(without) == {i: s for i, s in splits(with_it).items() if i != restval}
    assert restval not in {image.id for image in without.images}
    assert len(without.texts) == len(with_it.texts) - 5
    assert without.counts["restval"] == "left out of train"
    assert without.counts["restval images"] == "1"


def test_a_list_of_train_cannot_leave_out_restval(tmp_path: Path) -> None:
    root = coco.miniature(tmp_path / "m", kind="lists")
    with pytest.raises(
        DatasetError, match=r"does not say which images are restval; put dataset_coc"
    ):
        coco.load(root, with_restval=False)
    (root / "coco_train.json").unlink()
    assert set(splits(coco.load(root, with_restval=False)).values()) == {"val", "test"}


def test_the_first_five_captions_are_a_choice_that_is_told(mscoco: Path) -> None:
    dataset = load_dataset("coco", mscoco, captions="first5")
    assert Counter(len(of) for of in captions(dataset).values()) == {5: 6}
    assert captions(dataset)["val2014/COCO_val2014_000000000074.jpg"][-1] == "A cat"
    assert dataset.options == {"captions": "first5"}
    assert dataset.counts["captions"] == "the first five of an image: 30"
    assert dataset.counts["test captions"] == "11"


def test_captions_are_read_without_images_if_asked(mscoco: Path) -> None:
    before = coco.load(mscoco)
    for image in before.images:
        (mscoco / image.id).unlink()
    with pytest.raises(DatasetNotFound, match=r"none of its 2 images of .*train2014"):
        coco.load(mscoco)
    dataset = coco.load(mscoco, require_images=False)
    assert dataset.digest() == before.digest()
    assert dataset.counts["images missing"] == "images not looked for"
    assert "images missing" not in before.counts
    with pytest.raises(FileNotFoundError):
        dataset.images[0].open()


def test_a_half_downloaded_set_names_the_folder_and_where_to_get_it(mscoco: Path) -> None:
    for path in (mscoco / "val2014").iterdir():
        path.unlink()
    message = r"none of its 4 images of \S*val2014: .*COCO_val2014_0{10}42"
    with pytest.raises(DatasetNotFound, match=message) as caught:
        coco.load(mscoco)
    assert "val2014.zip" in str(caught.value)


def test_one_missing_image_is_left_to_the_build(mscoco: Path) -> None:
    (mscoco / "val2014/COCO_val2014_000000000073.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="000000000073"):
        coco.load(mscoco).images[2].open()


@BOTH
def test_missing_files_are_named_with_their_source(module, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound, match=rf"{module.LAYOUT.name} needs the folder .*--root"):
        module.load(None)
    with pytest.raises(DatasetNotFound, match=r"there is no folder .*caption_datasets\.zip"):
        module.load(tmp_path / "gone")
    with pytest.raises(FileNotFoundError) as caught:
        module.load(tmp_path)
    told = str(caught.value)
    assert f"dataset_{module.LAYOUT.name}.json" in told
    assert f"{module.LAYOUT.name}_{{train,val,test}}.json" in told
    assert "caption_datasets.zip" in told


def test_an_image_folder_may_be_a_link_but_not_an_image_in_it(mscoco: Path, tmp_path: Path) -> None:
    (mscoco / "val2014").rename(tmp_path / "elsewhere")
    (mscoco / "val2014").symlink_to(tmp_path / "elsewhere")
    assert coco.load(mscoco).images[1].open().size == (43, 36)
    inside = tmp_path / "elsewhere/COCO_val2014_000000000042.jpg"
    Image.new("RGB", (3, 3)).save(tmp_path / "outside.png")
    inside.unlink()
    inside.symlink_to(tmp_path / "outside.png")
    with pytest.raises(CacheError, match="is a link that leaves"):
        coco.load(mscoco).images[1].open()
    assert coco.load(mscoco, follow_links=True).images[1].open().size == (3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filepath": "../etc"}, "'..' component"),
        ({"filepath": "test2014"}, "lies in test2014/, which is not one of train2014, val2014"),
        ({"filepath": "val2014/deeper"}, "lies in val2014/deeper/"),
        ({"filepath": None}, "filepath is None; it must be the name"),
        ({"filename": ""}, "filename: image name '' is empty"),
        ({"filename": "/etc/passwd"}, "is an absolute path"),
        ({"filename": "a\\b.jpg"}, "holds a backslash"),
        ({"cocoid": True}, "cocoid is True, not an integer"),
        ({"cocoid": -1}, "cocoid is -1"),
        ({"cocoid": 10**12}, "cocoid is 1000000000000"),
        ({"cocoid": "9"}, "cocoid is '9'"),
        ({"split": "dev"}, "split is 'dev', not one of train, restval, val, test"),
        ({"split": []}, "split is []"),
        ({"sentences": ["a"]}, "not a list of objects"),
        ({"sentences": [{"tokens": ["a"]}]}, "raw is None; it must be a text"),
        ({"sentences": [{"raw": "a", "sentid": 1.5}]}, "sentid is 1.5"),
    ],
)
def test_a_malformed_image_is_named_by_its_row(
    mscoco: Path, change: dict[str, Any], message: str
) -> None:
    rewrite(mscoco, lambda rows: rows[3].update(change))
    with pytest.raises(DatasetError, match=r"dataset_coco\.json row 3: ") as caught:
        coco.load(mscoco)
    assert message in str(caught.value)


def test_one_sentence_number_for_two_captions_is_refused(mscoco: Path) -> None:
    rewrite(mscoco, lambda rows: rows[1]["sentences"][2].update(sentid=7000))
    with pytest.raises(DatasetError, match=r"sentid 7000 .* of image 'val2014/COCO_val2014_0+42"):
        coco.load(mscoco)


def test_an_image_in_two_splits_is_refused(mscoco: Path) -> None:
    rewrite(mscoco, lambda rows: rows.append({**rows[0], "split": "test", "sentences": []}))
    with pytest.raises(
        DatasetError, match=r"1 images are in two splits: .*is in train and in test"
    ):
        coco.load(mscoco)


def test_an_empty_caption_is_dropped_and_counted(mscoco: Path) -> None:
    rewrite(mscoco, lambda rows: rows[3]["sentences"][1].update(raw=" \n"))
    dataset = check_dataset(coco.load(mscoco))
    assert len(captions(dataset)["val2014/COCO_val2014_000000000074.jpg"]) == 5
    assert dataset.counts["empty captions dropped"] == "1"


def test_an_image_without_captions_stays_in_the_gallery(mscoco: Path) -> None:
    rewrite(mscoco, lambda rows: rows[3].update(sentences=[]))
    assert captions(check_dataset(coco.load(mscoco)))["val2014/COCO_val2014_000000000074.jpg"] == []


def test_the_file_of_another_set_is_refused(mscoco: Path) -> None:
    (mscoco / "dataset_coco.json").rename(mscoco / "dataset_flickr30k.json")
    with pytest.raises(DatasetError, match="says that it is of 'coco', not of flickr30k"):
        flickr30k.load(mscoco)


@pytest.mark.parametrize("text", ["[]", "7", '{"images": {}}', '{"dataset": "coco"}'])
def test_a_file_without_rows_is_refused(mscoco: Path, text: str) -> None:
    (mscoco / "dataset_coco.json").write_text(text)
    with pytest.raises(
        DatasetError, match=r'dataset_coco\.json holds no list of rows under "images"'
    ):
        coco.load(mscoco)


def test_no_image_at_all_is_refused(mscoco: Path) -> None:
    rewrite(mscoco, lambda rows: rows.clear())
    with pytest.raises(DatasetError, match=r"dataset_coco\.json list no image"):
        coco.load(mscoco)


@pytest.mark.parametrize(
    ("option", "value"),
    [("captions", "all5"), ("check", "maybe")],
)
def test_an_unknown_option_lists_the_known(mscoco: Path, option: str, value: object) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(UnknownName, match=f"{option}={value!r} is not known; choose one of"):
        coco.load(mscoco, **options)


def test_a_word_for_a_switch_is_refused_where_no_test_checks_types(mscoco: Path) -> None:
    code = "import sys; from cache_builder import load_dataset; load_dataset('coco', sys.argv[1], with_restval='no')"
    done = subprocess.run([sys.executable, "-c", code, mscoco], capture_output=True, text=True)
    assert "UnknownName: with_restval='no' is not known; choose one of true, false" in done.stderr


# --- lists and lines of one split ---


def test_a_list_may_have_one_row_a_caption(tmp_path: Path) -> None:
    root = coco.miniature(tmp_path / "m", kind="lists")
    before = coco.load(root)
    rows = json.loads((root / "coco_test.json").read_text())
    single = [{"image": r["image"], "caption": c} for r in rows for c in r["caption"]]
    (root / "coco_test.json").unlink()
    (root / "coco_karpathy_test.json").write_text(json.dumps(single))
    assert coco.load(root).digest() == before.digest()


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    root = flickr30k.miniature(tmp_path / "m", kind="lists")
    (root / "flickr30k_val_karpathy.txt").write_text("image,caption\n1001.jpg,a\n")
    with pytest.raises(DatasetError, match=r"holds flickr30k_val\.json and flickr30k_val_karpathy"):
        flickr30k.load(root)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"split": "val"}, "split is 'val', in a file of test"),
        ({"captions": {"a": 1}}, "not a list of texts"),
        ({"captions": ["a", 3]}, "captions is 3; it must be a text"),
        ({"image_name": "../x.jpg"}, "'..' component"),
        ({"image_name": 5}, "image_name is 5; it must be the name"),
    ],
)
def test_a_malformed_row_of_a_list_is_named(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    root = flickr30k.miniature(tmp_path / "m", kind="lists")
    rows = json.loads((root / "flickr30k_test.json").read_text())
    (root / "flickr30k_test.json").write_text(json.dumps([rows[0], {**rows[1], **row}]))
    with pytest.raises(DatasetError, match=r"flickr30k_test\.json row 1: ") as caught:
        flickr30k.load(root)
    assert message in str(caught.value)


def test_the_archive_s_own_folder_is_read_under_its_own_paths(tmp_path: Path) -> None:
    root = flickr30k.miniature(tmp_path / "m", kind="lists")
    (root / "images").rename(root / "flickr30k-images")
    for split in ("train", "val", "test"):
        path = root / f"flickr30k_{split}.json"
        rows = json.loads(path.read_text())
        renamed = [
            {"image": f"flickr30k-images/{r['image_name']}", "caption": r["captions"]} for r in rows
        ]
        path.write_text(json.dumps(renamed))
    dataset = check_dataset(flickr30k.load(root))
    assert dataset.images[0].id == "flickr30k-images/1001.jpg"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1003.jpg,no header\n", "line 1 is a row; the first line must be the header"),
        ("image,caption\n\n1003.png,a\n", "line 3: '1003.png,a' is not of the form name.jpg,caption"),
        ("image,caption\n../1003.jpg,a\n", "line 2: image name '../1003.jpg' holds a '..'"),
        ("image,caption\nval2014/1003.jpg,a\n", "line 2: image 'val2014/1003.jpg' lies in val2014/"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named(flickr: Path, text: str, message: str) -> None:
    (flickr / "flickr30k_test_karpathy.txt").write_text(text)
    with pytest.raises(DatasetError, match=r"flickr30k_test_karpathy\.txt ") as caught:
        flickr30k.load(flickr)
    assert message in str(caught.value)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.text(st.sampled_from("a \",.jpg'é#\t"), max_size=12), min_size=1, max_size=6))
def test_a_line_is_cut_at_its_first_name(
    tmp_path_factory: pytest.TempPathFactory, told: list[str]
) -> None:
    path = tmp_path_factory.mktemp("lines") / "flickr30k_test_karpathy.txt"
    text = "".join(f"12.jpg,{caption}\r\n" for caption in told)
    path.write_text(f"\ufeffimage,caption\r\n{text}", encoding="utf-8")
    rows, empty = karpathy._joined(read_rows(path, "test", flickr30k.LAYOUT))
    stripped = [caption.strip() for caption in told]
    assert [s.text for s in rows[0].sentences] == [caption for caption in stripped if caption]
    assert empty == stripped.count("")


# --- counts ---


SMALL = {"val images": 1, "test images": 2, "test captions": 11, "test images with 6 captions": 1}


def small(**official: int) -> Layout:
    """COCO's layout with the counts of the miniature."""
    marks = frozenset({"COCO_val2014_000000000074.jpg"})
    return replace(
        coco.LAYOUT, official={**SMALL, **official}, papers={"train images": 9}, marks=marks
    )


def read(root: Path, layout: Layout, **options: Any) -> Dataset:
    usual = {"captions": "all", "check": "auto", "follow_links": False, "require_images": True}
    return karpathy.read_karpathy(root, layout, **{**usual, **options})


def test_the_miniature_is_not_the_published_set(mscoco: Path) -> None:
    assert coco.load(mscoco).counts["set"] == "another set in this layout"
    with pytest.raises(DatasetError, match="val images: 5,000 expected, 1 found") as caught:
        coco.load(mscoco, check="official")
    assert "test images with 5 captions: 4,990 expected, 1 found" in str(caught.value)
    assert "113" not in str(caught.value)  # counts from papers are never asserted


@pytest.mark.parametrize("taken", ["all", "first5"])
def test_counts_of_the_published_set_are_asserted_by_what_the_file_holds(
    mscoco: Path, taken: str
) -> None:
    counts = read(mscoco, small(), captions=taken).counts
    assert counts["set"] == "the published one, its counts asserted"
    assert counts["test captions"] == "11 (published 11)"
    assert counts["train images"] == "2 (papers 9)"
    with pytest.raises(DatasetError, match=r'6 captions: 2 expected, 1 found.*check="none"'):
        read(mscoco, small(**{"test images with 6 captions": 2}), captions=taken)


def test_a_damaged_copy_is_recognised_and_can_still_be_read(mscoco: Path) -> None:
    rewrite(mscoco, lambda rows: rows.pop())
    with pytest.raises(DatasetError, match="test images: 2 expected, 1 found"):
        read(mscoco, small())
    counts = read(mscoco, small(), check="none").counts
    assert counts["set"] == "published names, counts not asserted"


def test_a_split_that_is_lost_from_the_whole_file_is_missed(mscoco: Path) -> None:
    rewrite(mscoco, lambda rows: rows.pop(2))
    with pytest.raises(DatasetError, match="val images: 1 expected, 0 found"):
        read(mscoco, small())


def test_a_list_of_the_test_split_asserts_that_split_alone(tmp_path: Path) -> None:
    root = coco.miniature(tmp_path / "m", kind="lists")
    (root / "coco_train.json").unlink()
    (root / "coco_val.json").unlink()
    counts = read(root, small()).counts
    assert counts["set"] == "the published one, its counts asserted"
    assert not [name for name in counts if name.startswith(("train", "restval", "val"))]
    with pytest.raises(DatasetError, match="test captions: 12 expected, 11 found"):
        read(root, small(**{"test captions": 12}))


@OFFICIAL
@pytest.mark.parametrize(
    ("module", "n", "shape"),
    [(coco, 5000, {5: 4990, 6: 10}), (flickr30k, 1000, {5: 1000})],
    ids=["coco", "flickr30k"],
)
def test_the_published_test_split_has_the_published_counts(module, n: int, shape: dict) -> None:
    root = Path(os.environ["HEADSTART_OFFICIAL_DATA"]) / "karpathy"
    dataset = module.load(root, require_images=False)
    assert dataset.counts["set"] == "the published one, its counts asserted"
    assert Counter(len(e.captions) for e in dataset.tasks.retrieval) == shape
    assert len(dataset.images) == n
    raw = json.loads((root / f"{module.LAYOUT.name}_test.json").read_text(encoding="utf-8"))
    plain = {
        r.get("image") or r["image_name"]: [c.strip() for c in r.get("caption") or r["captions"]]
        for r in raw
    }
    assert captions(dataset) == plain
    assert len(module.load(root, require_images=False, captions="first5").texts) == 5 * n


@OFFICIAL
def test_the_marks_are_of_the_published_test_split() -> None:
    root = Path(os.environ["HEADSTART_OFFICIAL_DATA"]) / "karpathy"
    for module in (coco, flickr30k):
        names = {i.id.rpartition("/")[2] for i in module.load(root, require_images=False).images}
        assert module.LAYOUT.marks < names


# --- folder ---


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return folder.miniature(tmp_path / "own")


def table(root: Path, *lines: str) -> Path:
    (root / "data.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return root


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from(["mugs/blue.jpg", "mugs/orange.webp"]), st.sampled_from("xyz")),
        min_size=1,
        max_size=9,
    )
)
def test_a_repeated_row_counts_where_it_came_first(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    root = folder.miniature(tmp_path_factory.mktemp("own") / "m")
    dataset = folder.load(table(root, "image,caption", *(f"{i},{c}" for i, c in rows)))
    expected: dict[str, list[str]] = {}
    for image, caption in rows:
        if caption not in expected.setdefault(image, []):
            expected[image].append(caption)
    assert captions(dataset) == expected
    assert [i.id for i in dataset.images] == list(expected)
    kept = sum(len(of) for of in expected.values())
    assert dataset.counts["duplicate rows dropped"] == str(len(rows) - kept)


def test_all_malformed_rows_are_told_of_by_their_first_three(own: Path) -> None:
    rows = [f"{i}.jpg,,mug,train" for i in range(5)]
    with pytest.raises(DatasetError, match="5 malformed rows") as caught:
        folder.load(table(own, "image,attr,obj,split", "mugs/blue.jpg,blue,mug,train", *rows))
    assert str(caught.value).count("attr is ''") == 3
    assert "line 3" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('"caption": "a", "captions": ["b"]', "has both caption and captions"),
        ('"caption": "a", "split": 0', "split 0 is not one of"),
        ('"caption": "a", "split": false', "split False is not one of"),
    ],
)
def test_a_row_that_leaves_a_doubt_is_refused(own: Path, row: str, message: str) -> None:
    (own / "data.csv").unlink()
    (own / "data.jsonl").write_text(f'{{"image": "mugs/blue.jpg", {row}}}\n')
    with pytest.raises(DatasetError) as caught:
        folder.load(own)
    assert message in str(caught.value)


def test_a_split_of_null_is_no_split(own: Path) -> None:
    (own / "data.csv").unlink()
    (own / "data.jsonl").write_text('{"image": "mugs/blue.jpg", "caption": "a", "split": null}\n')
    assert splits(folder.load(own)) == {"mugs/blue.jpg": "test"}


def test_more_pairs_cannot_make_a_pair_seen(own: Path) -> None:
    (own / "pairs.csv").write_text("attr,obj,split\nred,mug,train\nold,mug,train\n")
    message = r"1 train pairs without a train image: old mug in pairs\.csv line 3"
    with pytest.raises(DatasetError, match=message):
        folder.load(own)


def test_columns_of_the_pairs_that_are_ignored_are_told(own: Path) -> None:
    (own / "pairs.csv").write_text("attr,obj,split,note\nold,mug,val,x\n")
    assert folder.load(own).counts["columns ignored in pairs.csv"] == "'note'"


def test_pairs_beside_captions_are_told_of(own: Path) -> None:
    (own / "pairs.csv").write_text("attr,obj,split\nold,mug,val\n")
    table(own, "image,caption", "mugs/blue.jpg,hi")
    assert folder.load(own).counts["pairs.csv"].startswith("not read")
