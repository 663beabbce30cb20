"""Readers of matching data: what holds for all three, SugarCrepe's traps, and the counts of the published files."""

import csv
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_builder import load_dataset, plugins
from cache_builder.cli_build import options_of
from cache_builder.datasets import bivlc, sugarcrepe, two_by_two
from cache_builder.datasets.base import Dataset
from cache_builder.errors import UnknownName
from cache_builder.images import UnsafeName
from cache_builder.records import DatasetError, DatasetNotFound
from cache_builder.testing import check_dataset

OFFICIAL = pytest.mark.skipif(
    "HEADSTART_OFFICIAL_DATA" not in os.environ,
    reason="set HEADSTART_OFFICIAL_DATA to a folder with sugarcrepe/*.json (the folder data of "
    "github.com/RAIVNLab/sugar-crepe) and bivlc_results/BiVLC_ViT-B-32.csv (results of github.com/IMirandaM/BiVLC)",
)
FOLDER = Path(os.environ.get("HEADSTART_OFFICIAL_DATA", ""))

ROOT = Path(__file__).parent.parent
READERS = pytest.mark.parametrize(
    "module", [sugarcrepe, bivlc, two_by_two], ids=lambda m: m.__name__.split(".")[-1]
)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture
def crepe(tmp_path: Path) -> Path:
    return sugarcrepe.miniature(tmp_path / "crepe")


def rewrite(root: Path, subset: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the items of one SugarCrepe file in place."""
    path = root / f"{subset}.json"
    items = json.loads(path.read_text())
    change(items)
    path.write_text(json.dumps(items))
    return root


def words(dataset: Dataset) -> dict[str, str]:
    return {t.id: t.text for t in dataset.texts}


# --- all three ---


@READERS
def test_a_miniature_conforms(module, tmp_path: Path) -> None:
    dataset = check_dataset(module, tmp_path)
    examples = (*dataset.tasks.matching, *dataset.tasks.two_by_two)
    assert {e.split for e in examples} == {"test"}
    assert {len(e.images) for e in examples} == {1 if module is sugarcrepe else 2}
    assert [c for e in examples for c in e.captions] == [t.id for t in dataset.texts]
    assert dataset.counts["images missing"] == "none"


@READERS
def test_records_measure_what_they_open_and_travel_to_other_processes(
    module, tmp_path: Path
) -> None:
    for record in module.load(module.miniature(tmp_path / "m")).images:
        again = pickle.loads(pickle.dumps(record))
        assert record.measure is not None
        assert again.size() == record.open().size


def test_the_shared_files_are_no_data_sets() -> None:
    known = set(plugins.names("cache_builder.datasets"))
    assert {"sugarcrepe", "bivlc", "two_by_two"} <= known
    assert not {"matching", "two_images"} & known


@READERS
def test_texts_alone_are_the_same_samples(module, tmp_path: Path) -> None:
    root = module.miniature(tmp_path / "m")
    whole = module.load(root)
    (root / ("val2017" if module is sugarcrepe else "images")).rename(tmp_path / "away")
    alone = load_dataset(module.__name__.split(".")[-1], root, require_images=False)
    assert alone.digest() == whole.digest()
    assert alone.options == {"require_images": False}
    assert alone.counts["images missing"] == "images not looked for"
    with pytest.raises(FileNotFoundError, match="no such file"):
        alone.images[0].open()


@READERS
def test_one_missing_picture_is_told_and_left_to_the_build(module, tmp_path: Path) -> None:
    root = module.miniature(tmp_path / "m")
    record = module.load(root).images[0]
    assert record.path is not None
    record.path().unlink()
    dataset = module.load(root)
    assert dataset.counts["images missing"] == f"1: {record.id!r}"
    with pytest.raises(FileNotFoundError):
        dataset.images[0].open()


@READERS
def test_a_folder_without_any_of_the_pictures_is_not_found(module, tmp_path: Path) -> None:
    root = module.miniature(tmp_path / "m")
    for record in module.load(root).images:
        assert record.path is not None
        record.path().unlink()
    with pytest.raises(
        DatasetNotFound, match=r"found none of its \d+ images: of the first, no such file"
    ):
        module.load(root)


@READERS
def test_a_link_out_of_the_pictures_is_refused_unless_allowed(module, tmp_path: Path) -> None:
    root = module.miniature(tmp_path / "m")
    record = module.load(root).images[0]
    assert record.path is not None
    path = record.path()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeName, match="is a link that leaves"):
        module.load(root).images[0].open()
    assert module.load(root, follow_links=True).images[0].open().mode == "RGB"


@READERS
def test_the_root_must_be_named_and_there(module, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFound, match=r"needs the folder it lies in \(--root\)"):
        module.load(None)
    with pytest.raises(DatasetNotFound, match=r"there is no folder .*/nowhere; "):
        module.load(tmp_path / "nowhere")


@READERS
def test_a_switch_is_true_or_false(module, tmp_path: Path) -> None:
    """In a process of its own: the type checks of these tests would stop the value on its way."""
    code = (
        f"from {module.__name__} import load\n"
        "for option in ('require_images', 'follow_links'):\n"
        f"    try: load({str(tmp_path)!r}, **{{option: 'maybe'}})\n"
        "    except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == [
        f"UnknownName {option}='maybe' is not known; choose one of true, false"
        for option in ("require_images", "follow_links")
    ]
    name = module.__name__.split(".")[-1]
    assert options_of(name, ["follow_links=true"]) == {"follow_links": True}


@pytest.mark.parametrize("module", [sugarcrepe, bivlc], ids=["sugarcrepe", "bivlc"])
def test_an_unknown_check_lists_the_known(module, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="check='oficial' is not known; choose one of auto, off"):
        module.load(tmp_path, check="oficial")


# --- SugarCrepe ---


def test_the_true_caption_comes_first_and_the_file_is_the_category(crepe: Path) -> None:
    dataset = sugarcrepe.load(crepe)
    text = words(dataset)
    assert [(e.id, e.images, e.category) for e in dataset.tasks.matching][-3:] == [
        ("swap_att/1", ("000000000003.jpg",), "swap_att"),
        ("swap_obj/0", ("000000000002.jpg",), "swap_obj"),
        ("swap_obj/2", ("000000000004.jpg",), "swap_obj"),
    ]
    last = dataset.tasks.matching[-1]
    assert [text[c] for c in last.captions] == ["A child pulls a goat.", "A goat pulls a child."]
    assert last.captions == ("swap_obj/2/caption", "swap_obj/2/negative_caption")
    assert dataset.tasks.kinds == ("matching",)
    assert Counter(e.category for e in dataset.tasks.matching) == dict.fromkeys(
        sugarcrepe.SUBSETS, 2
    )


def test_captions_lose_outer_blanks_and_nothing_else(crepe: Path) -> None:
    odd = {"caption": "\t A  Red\ncup .\u00a0\n", "negative_caption": " a  red cup  !! "}
    rewrite(crepe, "add_obj", lambda items: items["0"].update(odd))
    text = words(sugarcrepe.load(crepe))
    assert text["add_obj/0/caption"] == "A  Red\ncup ."
    assert text["add_obj/0/negative_caption"] == "a  red cup  !!"
    assert text["add_att/0/caption"] == "A cup on a table."
    assert text["replace_obj/0/caption"] == "A bird on a wire."


def test_a_gap_in_the_keys_loses_nothing_and_order_is_that_of_the_file(crepe: Path) -> None:
    (item,) = [json.loads((crepe / "swap_obj.json").read_text())["0"]]
    keys = ["7", "107", "109", "0", "x"]
    (crepe / "swap_obj.json").write_text(json.dumps(dict.fromkeys(keys, item)))
    found = [e.id for e in sugarcrepe.load(crepe).tasks.matching if e.category == "swap_obj"]
    assert found == [f"swap_obj/{key}" for key in keys]


def test_the_files_may_lie_in_data(crepe: Path) -> None:
    before = sugarcrepe.load(crepe)
    (crepe / "data").mkdir()
    for subset in sugarcrepe.SUBSETS:
        (crepe / f"{subset}.json").rename(crepe / "data" / f"{subset}.json")
    assert sugarcrepe.load(crepe).digest() == before.digest()


def test_files_in_both_places_are_an_error(crepe: Path) -> None:
    (crepe / "data").mkdir()
    (crepe / "data/swap_att.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"crepe and .*crepe/data both hold files of sugarcrepe"):
        sugarcrepe.load(crepe)


def test_a_missing_file_is_named_with_its_place_and_source(crepe: Path) -> None:
    (crepe / "swap_att.json").unlink()
    with pytest.raises(DatasetNotFound, match=r"looked in .*/crepe for swap_att\.json and found"):
        sugarcrepe.load(crepe)
    with pytest.raises(
        DatasetNotFound, match=r"crepe/val2017 and .*/data for add_att\.json and"
    ) as e:
        sugarcrepe.load(crepe / "val2017")
    assert "github.com/RAIVNLab/sugar-crepe" in str(e.value)


@pytest.mark.parametrize("place", ["images/val2017", "../coco/val2017", "../coco"])
def test_one_copy_of_coco_serves_all(place: str, crepe: Path) -> None:
    before = sugarcrepe.load(crepe)
    (crepe / place).parent.mkdir(exist_ok=True)
    (crepe / "val2017").rename(crepe / place)
    given: dict[str, Any] = (
        {} if place == "images/val2017" else {"images": str(crepe.parent / "coco")}
    )
    assert check_dataset(sugarcrepe.load(crepe, **given)).digest() == before.digest()


def test_pictures_that_are_named_win_over_those_below_the_root(crepe: Path, tmp_path: Path) -> None:
    for folder in ("val2017", "other/val2017"):
        (tmp_path / "new" / folder).mkdir(parents=True)
    for picture in (crepe / "val2017").iterdir():
        (tmp_path / "new/other/val2017" / picture.name).write_bytes(picture.read_bytes())
    record = sugarcrepe.load(crepe, images=str(tmp_path / "new/other")).images[0]
    assert record.path is not None
    assert record.path().parent == tmp_path / "new/other/val2017"


def test_absent_pictures_are_called_coco_val2017_with_the_places_looked_in(crepe: Path) -> None:
    (crepe / "val2017").rename(crepe / "elsewhere")
    with pytest.raises(DatasetNotFound) as caught:
        sugarcrepe.load(crepe)
    message = str(caught.value)
    assert f"looked for the pictures in {crepe}/val2017 and {crepe}/images/val2017" in message
    assert "COCO's val2017.zip from images.cocodataset.org/zips" in message
    assert "require_images=false" in message
    with pytest.raises(DatasetNotFound, match=r"in /nowhere/val2017 and /nowhere and found no suc"):
        sugarcrepe.load(crepe, images="/nowhere")


def test_an_lfs_pointer_is_called_by_its_name(crepe: Path) -> None:
    (crepe / "replace_rel.json").write_text(POINTER)
    with pytest.raises(DatasetError, match=r"replace_rel\.json is a Git LFS pointer, not the data"):
        sugarcrepe.load(crepe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": {}, "0": {}}', r"add_att\.json: not valid JSON: key '0' occurs twice"),
        ('{"0": {"caption": "a", "caption": "b"}}', "key 'caption' occurs twice"),
        ("[]", "holds a list, not an object of items by their index"),
        ('{"0": ["a.jpg"]}', "item '0' is a list, not an object"),
        ('{"0": NaN}', "NaN is not a JSON number"),
    ],
)
def test_a_malformed_file_is_refused(text: str, message: str, crepe: Path) -> None:
    (crepe / "add_att.json").write_text(text)
    with pytest.raises(DatasetError, match=message):
        sugarcrepe.load(crepe)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("caption", " \n", r"caption is ' \\n'; it must be a text that is not blank"),
        ("negative_caption", None, "negative_caption is None; it must be a text"),
        ("caption", ["a"], r"caption is \['a'\]; it must be a text"),
        ("filename", 222235, "filename is 222235; it must be the name of an image file"),
        (
            "filename",
            "../val2017/x.jpg",
            r"filename: image name '\.\./val2017/x\.jpg' holds a '\.\.'",
        ),
    ],
)
def test_a_malformed_item_is_refused_by_file_and_key(
    key: str, value: object, message: str, crepe: Path
) -> None:
    rewrite(crepe, "swap_obj", lambda items: items["2"].update({key: value}))
    with pytest.raises(DatasetError, match=rf"swap_obj\.json item '2': {message}"):
        sugarcrepe.load(crepe)


def test_captions_alike_are_kept_and_listed(crepe: Path) -> None:
    assert sugarcrepe.load(crepe).counts["unsolvable items"] == "none"
    same = {"caption": "A goat. ", "negative_caption": "A goat."}
    rewrite(crepe, "swap_obj", lambda items: items["2"].update(same))
    dataset = sugarcrepe.load(crepe)
    assert dataset.counts["unsolvable items"] == "1: 'swap_obj/2'"
    assert dataset.tasks.matching[-1].id == "swap_obj/2"


def test_an_older_copy_of_swap_obj_gives_notice(crepe: Path) -> None:
    def fill(items: dict[str, Any]) -> None:
        items |= {str(k): items["0"] for k in range(246)}

    assert "older copy" not in sugarcrepe.load(crepe).counts
    dataset = sugarcrepe.load(rewrite(crepe, "swap_obj", fill))
    assert dataset.counts["older copy"].startswith("swap_obj has key '108', which the release has")
    with pytest.raises(DatasetError) as caught:
        sugarcrepe.load(crepe, check="official")
    assert "items: 7,512 expected, 258 found; images: 1,561 expected, 5 found" in str(caught.value)
    assert "swap_obj 24" not in str(caught.value)
    rewrite(crepe, "swap_obj", lambda items: items.update({"900": items.pop("108")}))
    assert "older copy" not in sugarcrepe.load(crepe).counts
    with pytest.raises(DatasetError, match="swap_obj: 245 expected, 246 found"):
        sugarcrepe.load(crepe, check="official")


def test_a_part_of_the_published_set_is_known_by_one_picture(crepe: Path) -> None:
    assert sugarcrepe.load(crepe).counts["set"] == "another set in this layout"
    mark = sorted(sugarcrepe.MARKS)[3]
    (crepe / "val2017/000000000004.jpg").rename(crepe / "val2017" / mark)
    for subset in sugarcrepe.SUBSETS:
        path = crepe / f"{subset}.json"
        path.write_text(path.read_text().replace("000000000004.jpg", mark))
    with pytest.raises(DatasetError) as caught:
        sugarcrepe.load(crepe)
    message = str(caught.value)
    assert (
        "is not the published sugarcrepe: add_att: 692 expected, 2 found; add_obj: 2,062" in message
    )
    assert "items: 7,511 expected, 14 found; images: 1,560 expected, 5 found" in message
    assert 'check="none"' in message
    counts = sugarcrepe.load(crepe, check="none").counts
    assert counts["set"] == "published names, counts not asserted"
    assert counts["items"] == "14 (published 7,511)"


# --- the published files ---


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A copy of SugarCrepe's files that can be changed."""
    for subset in sugarcrepe.SUBSETS:
        (tmp_path / f"{subset}.json").write_bytes(
            (FOLDER / f"sugarcrepe/{subset}.json").read_bytes()
        )
    return tmp_path


@OFFICIAL
def test_sugarcrepe_is_as_published() -> None:
    root = FOLDER / "sugarcrepe"
    dataset = sugarcrepe.load(root, require_images=False)
    assert dataset.counts["set"] == "the published one, its counts asserted"
    assert list(Counter(e.category for e in dataset.tasks.matching).items()) == [
        *(("add_att", 692), ("add_obj", 2062), ("replace_att", 788), ("replace_obj", 1652)),
        *(("replace_rel", 1406), ("swap_att", 666), ("swap_obj", 245)),
    ]
    assert (len(dataset.tasks.matching), len(dataset.images)) == (7511, 1560)
    assert dataset.counts["unsolvable items"] == "none"
    raw = {s: json.loads((root / f"{s}.json").read_text()) for s in sugarcrepe.SUBSETS}
    text, blanks = words(dataset), Counter[str]()
    for example in dataset.tasks.matching:
        subset, key = example.id.split("/")
        item = raw[subset][key]
        assert example.images == (item["filename"],)
        for column, text_id in zip(("caption", "negative_caption"), example.captions, strict=True):
            assert text[text_id] == item[column].strip()
            blanks[column] += text[text_id] != item[column]
    assert blanks == {"caption": 1074, "negative_caption": 0}
    assert "108" not in raw["swap_obj"]
    assert {i.id for i in dataset.images} >= sugarcrepe.MARKS


@OFFICIAL
def test_sugarcrepe_with_the_removed_item_is_an_older_copy(published: Path) -> None:
    removed = {"filename": "000000310622.jpg", "caption": "a", "negative_caption": "b"}
    rewrite(published, "swap_obj", lambda items: items.update({"108": removed}))
    counts = sugarcrepe.load(published, require_images=False).counts
    assert "older copy" in counts
    assert counts["swap_obj"] == "246 (published 246)"
    assert counts["items"] == "7,512 (published 7,512)"
    assert counts["images"] == "1,561 (published 1,561)"


@OFFICIAL
def test_sugarcrepe_short_of_items_is_refused_with_every_count(published: Path) -> None:
    for subset in sugarcrepe.SUBSETS:
        rewrite(published, subset, lambda items: items.popitem())
    with pytest.raises(DatasetError) as caught:
        sugarcrepe.load(published, require_images=False)
    for subset, n in sugarcrepe.SUBSETS.items():
        assert f"{subset}: {n:,} expected, {n - 1:,} found" in str(caught.value)
    assert "items: 7,511 expected, 7,504 found" in str(caught.value)
    counts = sugarcrepe.load(published, require_images=False, check="none").counts
    assert counts["items"] == "7,504 (published 7,511)"


@OFFICIAL
def test_bivlc_has_the_published_counts(tmp_path: Path) -> None:
    """The captions and kinds of the released results, with invented names of pictures."""
    with (FOLDER / "bivlc_results/BiVLC_ViT-B-32.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("caption", "negative_caption", "type", "subtype")
    lines = [
        json.dumps(
            {"image": f"{i}.jpg", "negative_image": f"{i}n.jpg", **{c: row[c] for c in columns}}
        )
        for i, row in enumerate(rows)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    dataset = bivlc.load(tmp_path, require_images=False)
    assert dataset.counts["set"] == "the published one, its counts asserted"
    assert Counter(e.category for e in dataset.tasks.two_by_two) == {
        "replace_obj": 1200, "replace_rel": 462, "replace_att": 437,
        "add_obj": 399, "add_att": 76, "swap_att": 278, "swap_obj": 81,
    }  # fmt: skip
    shown = {k: dataset.counts[k] for k in ("replace", "add", "swap", "rows")}
    assert shown == {
        "replace": "2,099 (published 2,099)",
        "add": "475 (published 475)",
        "swap": "359 (published 359)",
        "rows": "2,933 (published 2,933)",
    }
    assert (len(dataset.images), len(dataset.texts)) == (5866, 5866)
    assert set(bivlc.marks(dataset.texts)) >= bivlc.MARKS
    assert dataset.counts["unsolvable: captions alike"] == "none"
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(DatasetError, match="rows: 2,933 expected, 2,932 found"):
        bivlc.load(tmp_path, require_images=False)
