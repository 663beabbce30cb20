"""Readers of `folder` and of the shared composition layout, on miniatures in the exact layouts."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cache_builder.datasets import folder, mit_states
from cache_builder.datasets.base import CompositionExample, CompositionTask, Dataset, Pair
from cache_builder.datasets.compositions import METADATA, PAIR_FOLDER, pair_id, prompt
from cache_builder.errors import CacheError, UnknownName
from cache_builder.records import DatasetError, DatasetNotFound
from cache_builder.testing import NonConformance, check_dataset

NAMES = st.text(st.sampled_from("ab+%2B _."), min_size=1, max_size=5)


@pytest.fixture
def mit(tmp_path: Path) -> Path:
    return mit_states.miniature(tmp_path / "mit")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return folder.miniature(tmp_path / "own")


def rewrite(root: Path, change: Callable[[list[dict[str, Any]]], object]) -> Path:
    """Change the metadata rows of a miniature in place."""
    path = root / f"{METADATA}.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))
    return root


@pytest.mark.parametrize("module", [folder, mit_states], ids=["folder", "mit_states"])
def test_a_miniature_conforms(module, tmp_path: Path) -> None:
    assert len(check_dataset(module, tmp_path).images) == 6


@pytest.mark.parametrize("module", [folder, mit_states], ids=["folder", "mit_states"])
def test_a_record_measures_what_it_opens(module, tmp_path: Path) -> None:
    for record in module.load(module.miniature(tmp_path / "m")).images:
        assert record.measure is not None
        assert record.size() == record.open().size


def test_checking_a_set_lists_the_candidates_of_a_split_once(
    mit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    whole = CompositionTask.candidates

    def counted(task: CompositionTask, split: str, world: str = "closed") -> tuple[Pair, ...]:
        asked.append(split)
        return whole(task, split, world)

    monkeypatch.setattr(CompositionTask, "candidates", counted)
    check_dataset(mit_states.load(mit))
    assert sorted(asked) == ["test", "train", "val"]


def test_the_open_world_lists_the_objects_once(mit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = mit_states.load(mit).tasks.czsl
    assert task
    expected = [(attr, obj) for attr in task.attrs for obj in task.objs]
    asked: list[CompositionTask] = []
    objs = task.objs
    monkeypatch.setattr(CompositionTask, "objs", property(lambda t: asked.append(t) or objs))
    assert task.candidates("test", "open") == tuple(expected)
    assert len(asked) == 1


def test_captions_conform_too(tmp_path: Path) -> None:
    dataset = check_dataset(folder.load(folder.miniature(tmp_path / "m", kind="captions")))
    assert dataset.tasks.kinds == ("retrieval",)
    assert len(dataset.texts) == 12


# --- the shared composition layout, through mit_states ---


def test_rows_that_are_na_or_of_no_listed_pair_are_dropped_and_counted(mit: Path) -> None:
    dataset = mit_states.load(mit)
    assert [i.id for i in dataset.images][:2] == ["ancient_building/a 1.jpg", "moldy_bread/b.jpg"]
    assert dataset.counts["rows dropped"].startswith("2 of 8")


@pytest.mark.parametrize("key", ["attr", "set"])
def test_na_drops_a_row_even_if_its_pair_is_listed(mit: Path, key: str) -> None:
    (mit / PAIR_FOLDER / "train_pairs.txt").write_text("NA building\nancient building\n")
    rewrite(mit, lambda rows: rows[0].update({key: "NA"}))
    assert "ancient_building/a 1.jpg" not in [i.id for i in mit_states.load(mit).images]


def test_a_folder_with_spaces_is_found_under_a_name_with_underscores(mit: Path) -> None:
    sizes = {i.id: i.open().size for i in mit_states.load(mit).images}
    assert (mit / "images/ancient building").is_dir()
    assert (mit / "images/moldy_bread").is_dir()
    assert sizes["ancient_building/a 1.jpg"] == (40, 36)
    assert sizes["moldy_bread/b.jpg"] == (43, 36)


def test_the_metadata_decides_the_split_and_other_values_are_test(mit: Path) -> None:
    rewrite(mit, lambda rows: rows[0].update(set="holdout"))
    dataset = mit_states.load(mit)
    assert dataset.tasks.czsl is not None
    first = dataset.tasks.czsl.examples[0]
    assert first == CompositionExample("ancient_building/a 1.jpg", "ancient", "building", "test")
    assert "'holdout'" in dataset.counts["test images"]


def test_vocabularies_are_the_sorted_union_of_the_pair_files(mit: Path) -> None:
    task = mit_states.load(mit).tasks.czsl
    assert task is not None
    assert task.attrs == ("ancient", "moldy", "ripe")
    assert task.objs == ("bread", "building", "orange")
    assert task.pairs["val"] == (("ancient", "building"), ("moldy", "bread"), ("ripe", "bread"))


def test_the_world_decides_which_prompts_exist(mit: Path) -> None:
    closed, wide = mit_states.load(mit), mit_states.load(mit, world="open")
    assert [t.text for t in closed.texts][:2] == [
        "a photo of ancient building",
        "a photo of moldy bread",
    ]
    assert (len(closed.texts), len(wide.texts)) == (5, 9)
    assert [t.id for t in wide.texts][:4] == [
        "ancient+bread",
        "ancient+building",
        "ancient+orange",
        "moldy+bread",
    ]


@pytest.mark.parametrize("suffix", [".t7", ".jsonl"])
def test_the_same_rows_in_another_container_are_the_same_data_set(mit: Path, suffix: str) -> None:
    before = mit_states.load(mit)
    path = mit / f"{METADATA}.json"
    rows = json.loads(path.read_text())
    if suffix == ".t7":
        torch.save(rows, path.with_suffix(suffix))
    else:
        path.with_suffix(suffix).write_text("".join(json.dumps(r) + "\n" for r in rows))
    path.unlink()
    after = mit_states.load(mit)
    assert after.digest() == before.digest()
    assert after.counts["read from"] == f"{METADATA}{suffix}"


class Payload:
    """What a hostile pickle does: run something when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_a_t7_that_would_run_code_is_refused_and_runs_nothing(mit: Path, tmp_path: Path) -> None:
    (mit / f"{METADATA}.json").unlink()
    torch.save([Payload(tmp_path / "ran")], mit / f"{METADATA}.t7")
    with pytest.raises(DatasetError, match=r"without running what is in it.*\.json"):
        mit_states.load(mit)
    assert not (tmp_path / "ran").exists()


def test_an_lfs_pointer_is_called_by_its_name(mit: Path) -> None:
    path = mit / f"{METADATA}.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(DatasetError, match="is a Git LFS pointer, not the data"):
        mit_states.load(mit)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        (f"{PAIR_FOLDER}/val_pairs.txt", r"\S*val_pairs\.txt"),
        (f"{METADATA}.json", r"metadata_compositional-split-natural\.t7 \(or \.json, \.jsonl\)"),
    ],
)
def test_a_half_downloaded_set_says_what_is_missing_and_how_to_get_it(
    mit: Path, missing: str, named: str
) -> None:
    (mit / missing).unlink()
    with pytest.raises(DatasetNotFound, match=f"looked in .* for {named}.*release_dataset.zip"):
        mit_states.load(mit)


def test_a_set_without_any_of_its_images_is_not_found(mit: Path) -> None:
    rewrite(mit, lambda rows: [r.update(image=f"gone/{i}.jpg") for i, r in enumerate(rows)])
    with pytest.raises(FileNotFoundError, match=r"none of its 6 images.*gone/0\.jpg"):
        mit_states.load(mit)


def test_one_missing_image_is_left_to_the_build(mit: Path) -> None:
    (mit / "images/moldy_bread/b.jpg").unlink()
    record = mit_states.load(mit).images[1]
    with pytest.raises(FileNotFoundError, match=r"moldy_bread/b\.jpg nor .*moldy bread/b\.jpg"):
        record.open()


def test_without_a_root_the_message_names_the_option() -> None:
    with pytest.raises(DatasetNotFound, match=r"mit_states needs the folder .*--root"):
        mit_states.load(None)
    with pytest.raises(DatasetNotFound, match=r"folder needs the folder .*--root"):
        folder.load(None)


def test_a_line_that_is_no_pair_is_named(mit: Path) -> None:
    (mit / PAIR_FOLDER / "val_pairs.txt").write_text("ripe bread\n\nvery ripe bread\n")
    with pytest.raises(DatasetError, match=r"val_pairs\.txt line 3: 'very ripe bread' is not"):
        mit_states.load(mit)


@pytest.mark.parametrize("image", ["../../etc/passwd", "/etc/passwd", "a\\b.jpg", ""])
def test_a_hostile_image_name_in_the_metadata_is_refused(mit: Path, image: str) -> None:
    rewrite(mit, lambda rows: rows[2].update(image=image))
    with pytest.raises(CacheError, match="image name"):
        mit_states.load(mit)


def test_a_row_without_texts_is_named_by_its_number(mit: Path) -> None:
    rewrite(mit, lambda rows: rows[3].update(obj=7))
    with pytest.raises(DatasetError, match="row 3"):
        mit_states.load(mit)


def test_another_set_in_the_layout_is_read_without_counts_being_asserted(mit: Path) -> None:
    assert mit_states.load(mit).counts["set"] == "another set in this layout"


def test_the_published_counts_can_be_demanded(mit: Path) -> None:
    with pytest.raises(DatasetError, match="attrs: 115 expected, 3 found") as caught:
        mit_states.load(mit, check="official")
    assert "train images: 30,338 expected, 3 found" in str(caught.value)


def test_a_damaged_copy_of_the_published_set_is_recognised_by_its_names(mit: Path) -> None:
    attrs = [word for role, word in sorted(mit_states.MARKS) if role == "attr"]
    lines = "".join(f"{attr} bread\n" for attr in attrs)
    (mit / PAIR_FOLDER / "train_pairs.txt").write_text("ancient building\n" + lines)
    with pytest.raises(DatasetError, match=r'not the published mit_states.*check="none"'):
        mit_states.load(mit)
    counts = mit_states.load(mit, check="none").counts
    assert counts["set"] == "published names, counts not asserted"
    assert counts["attrs"].endswith("(published 115)")


@pytest.mark.parametrize(
    ("option", "value"), [("world", "flat"), ("names", "short"), ("check", "maybe")]
)
def test_an_unknown_option_lists_the_known(mit: Path, option: str, value: str) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(UnknownName, match=f"{option}={value!r} is not known; choose one of"):
        mit_states.load(mit, **options)


def test_names_are_cleaned_for_prompts_by_a_named_rule() -> None:
    assert prompt("Faux.Leather", "chain_link") == "a photo of faux leather chain link"
    assert prompt("Faux.Leather", "chain_link", names="csp") == "a photo of faux leather chain_link"


def test_the_separator_inside_a_name_does_not_confuse_ids() -> None:
    assert len({pair_id("a+", "b"), pair_id("a%2B", "b"), pair_id("a", "+b")}) == 3


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.tuples(NAMES, NAMES), st.tuples(NAMES, NAMES))
def test_different_pairs_have_different_ids(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert (pair_id(*one) == pair_id(*other)) == (one == other)


@pytest.mark.skipif(
    "HEADSTART_OFFICIAL_DATA" not in os.environ,
    reason="set HEADSTART_OFFICIAL_DATA to a folder with czsl_pairs/mit-states.tsv.gz (attr, obj, seen flag; "
    "reconstructed from bighuang624/Troika and BatsResearch/csp)",
)
def test_the_published_pairs_have_the_published_counts(mit: Path) -> None:
    import gzip

    table = Path(os.environ["HEADSTART_OFFICIAL_DATA"]) / "czsl_pairs/mit-states.tsv.gz"
    rows = [line.split("\t") for line in gzip.decompress(table.read_bytes()).decode().splitlines()]
    for split, flag in (("train", "1"), ("val", "0"), ("test", "0")):
        lines = "".join(f"{a} {o}\n" for a, o, seen in rows if seen == flag)
        (mit / PAIR_FOLDER / f"{split}_pairs.txt").write_text(lines)
    rewrite(mit, lambda table: table[0].update(attr=rows[0][0], obj=rows[0][1]))
    with pytest.raises(DatasetError, match="train images: 30,338 expected") as caught:
        mit_states.load(mit)
    assert str(caught.value).count("expected,") == 1  # every count but that of the images agrees


# --- folder ---


def test_labels_become_a_composition_task_with_names_taken_whole(own: Path) -> None:
    dataset = folder.load(own)
    task = dataset.tasks.czsl
    assert task is not None
    assert task.examples[3] == CompositionExample(
        "fruit/blaue Pflaume ü.jpg", "blue", "plum", "val"
    )
    assert "orange" in task.attrs
    assert "orange" in task.objs
    assert task.candidates("val") == (
        ("red", "mug"),
        ("blue", "mug"),
        ("orange", "orange"),
        ("blue", "plum"),
    )
    assert len(folder.load(own, world="open").texts) == len(task.attrs) * len(task.objs)


def test_more_pairs_add_candidates_without_images(own: Path) -> None:
    (own / "pairs.csv").write_text("attr,obj,split\nNA,plum,test\n")
    task = folder.load(own).tasks.czsl
    assert task is not None
    assert ("NA", "plum") in task.candidates("test")
    assert task.prompts["NA", "plum"] == "NA+plum"


def table(root: Path, *lines: str) -> Path:
    (root / "data.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return root


def test_captions_of_a_repeated_image_are_joined_in_file_order(own: Path) -> None:
    table(
        own,
        "\ufeffimage,caption,photographer",
        'mugs/blue.jpg,"a blue mug, on a desk ",ann',
        "mugs/orange.webp,two,bob",
        "mugs/blue.jpg,blue cup,ann",
        "mugs/blue.jpg,blue cup,eve",
    )
    dataset = check_dataset(folder.load(own))
    texts = {t.id: t.text for t in dataset.texts}
    assert texts["mugs/blue.jpg#0"] == "a blue mug, on a desk"
    assert dataset.tasks.retrieval[0].captions == ("mugs/blue.jpg#0", "mugs/blue.jpg#1")
    assert dataset.tasks.retrieval[0].split == "test"
    assert dataset.counts["columns ignored"] == "'photographer'"
    assert dataset.counts["duplicate rows dropped"] == "1"
    assert dataset.counts["images without a row"] == "4"


def test_pictures_without_a_table_can_still_be_embedded(own: Path) -> None:
    (own / "data.csv").unlink()
    (own / "images/notes.txt").write_text("not a picture")
    dataset = check_dataset(folder.load(own))
    assert len(dataset.images) == 6
    assert dataset.texts == ()
    assert dataset.tasks.kinds == ()
    assert "images only" in dataset.counts["table"]


LABELS = "image,attr,obj,split"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,attr,obj"], "has no rows"),
        (["image,attr,obj", "mugs/blue.jpg,blue,mug"], "line 2: split '' is not one of train"),
        ([LABELS, "mugs/blue.jpg,blue,mug,dev"], "split 'dev' is not one of train, val, test"),
        ([LABELS, "mugs/blue.jpg,,mug,train"], "line 2: attr is ''"),
        (["image,caption", "mugs/blue.jpg, "], "line 2: caption is ''"),
        ([LABELS, "mugs/blue.jpg,blue,mug,test"], "no row with split train"),
        ([LABELS, "mugs/blue.jpg,blue,mug,train", "mugs/blue.jpg,red,mug,train"], "1 images with two pairs"),
        ([LABELS, "mugs/blue.jpg,blue,mug,train", "mugs/blue.jpg,blue,mug,test"], "1 images in two splits"),
        (["image,attr,obj,split,caption", "mugs/blue.jpg,blue,mug,train,hi"], "needs either attr, obj"),
        (["picture,caption", "mugs/blue.jpg,hi"], "image is None"),
        (["image,caption", "mugs/blue.jpg,a,b"], "3 cells under 2 columns"),
        (["image,image,caption", "a,b,c"], "repeated column"),
        (["image,caption", '"mugs/blue.jpg,hi'], "line"),
        (["image,caption", "../../secret.jpg,hi"], "'..' component"),
    ],
)  # fmt: skip
def test_a_table_that_contradicts_itself_is_refused(
    own: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(DatasetError) as caught:
        folder.load(table(own, *lines))
    assert message in str(caught.value)


def test_the_first_three_offenders_are_shown(own: Path) -> None:
    rows = [f"{i}.jpg,blue,mug,train\n{i}.jpg,red,mug,train" for i in range(5)]
    with pytest.raises(DatasetError, match="5 images with two pairs") as caught:
        folder.load(table(own, LABELS, "mugs/blue.jpg,blue,mug,train", *rows))
    assert str(caught.value).count(".jpg' is ") == 3


def test_json_lines_keep_unicode_and_refuse_what_json_does_not_allow(own: Path) -> None:
    (own / "data.csv").unlink()
    path = own / "data.jsonl"
    path.write_text(
        '{"image": "mugs/blue.jpg", "captions": ["eins\u2028zwei", "日本"]}\n', encoding="utf-8"
    )
    assert [t.text for t in folder.load(own).texts] == ["eins\u2028zwei", "日本"]
    for bad, message in {
        '{"image": "a", "image": "b"}': "'image' occurs twice",
        '{"image": NaN}': "NaN is not a JSON number",
        "[1]": "line 1: a list, not a JSON object",
        '{"image": "a", "captions": "one"}': "captions is 'one', not a list",
        "[" * 100_000: "line 1",
    }.items():
        path.write_text(bad + "\n")
        with pytest.raises(DatasetError) as caught:
            folder.load(own)
        assert message in str(caught.value)


def test_two_tables_and_mixed_kinds_are_refused(own: Path) -> None:
    (own / "data.jsonl").write_text('{"image": "mugs/blue.jpg", "caption": "hi"}\n')
    with pytest.raises(DatasetError, match=r"both data\.csv and data\.jsonl"):
        folder.load(own)
    (own / "data.csv").unlink()
    with (own / "data.jsonl").open("a") as file:
        file.write('{"image": "mugs/blue.jpg", "attr": "blue", "obj": "mug", "split": "train"}\n')
    with pytest.raises(DatasetError, match=r"mixes captions and labels .*line 1 against .*line 2"):
        folder.load(own)


def test_a_missing_image_folder_says_where_to_put_the_pictures(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetNotFound, match=r"put the pictures below ROOT/images and the table at"
    ):
        folder.load(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(DatasetNotFound, match="found no picture below"):
        folder.load(tmp_path)


def test_own_photos_are_turned_upright_unless_told_otherwise(own: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 37)).save(own / "images/mugs/blue.jpg", exif=exif)

    def size(dataset: Dataset) -> tuple[int, int]:
        blue = next(i for i in dataset.images if i.id == "mugs/blue.jpg")
        assert blue.size() == blue.open().size
        return blue.size()

    upright, stored = folder.load(own), folder.load(own, upright=False)
    assert (size(upright), size(stored)) == ((37, 40), (40, 37))
    assert upright.decode != stored.decode


def test_a_link_that_leaves_the_folder_cannot_be_opened(own: Path, tmp_path: Path) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "outside.png")
    (own / "images/mugs/blue.jpg").unlink()
    (own / "images/mugs/blue.jpg").symlink_to(tmp_path / "outside.png")
    blue = folder.load(own).images[1]
    with pytest.raises(CacheError, match="is a link that leaves"):
        blue.open()
    assert folder.load(own, follow_links=True).images[1].open().size == (3, 3)


# --- the conformance suite can fail ---


def test_the_suite_catches_an_id_that_no_record_has(own: Path) -> None:
    good = folder.load(own)
    broken = Dataset(
        name="folder",
        images=good.images[1:],
        texts=good.texts,
        tasks=good.tasks,
        decode=good.decode,
    )
    with pytest.raises(NonConformance, match=r"image 'mugs/red 1\.png' is not in the data set"):
        check_dataset(broken)


def test_the_suite_catches_a_repeated_id(own: Path) -> None:
    good = folder.load(own)
    broken = Dataset(
        name="folder",
        images=good.images,
        texts=(*good.texts, good.texts[0]),
        tasks=good.tasks,
        decode=good.decode,
    )
    with pytest.raises(NonConformance, match=r"text id 'blue\+mug' occurs twice"):
        check_dataset(broken)
