"""Readers of two images and two captions a row, `bivlc` and `two_by_two`: layouts, traps, parquet and other tables."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_pictures import saved
from PIL import Image

from cache_builder.datasets import bivlc, two_by_two
from cache_builder.datasets.base import Dataset, TextRecord
from cache_builder.errors import UnknownName
from cache_builder.images import BadImage
from cache_builder.parquet import ParquetTable
from cache_builder.records import DatasetError, DatasetNotFound
from cache_builder.testing import check_dataset

PYARROW = "needs pyarrow, which reads parquet: pip install 'headstart[parquet]'"
KEYS = ("image_0", "image_1", "caption_0", "caption_1")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return bivlc.miniature(tmp_path / "pairs")


def relines(root: Path, change: Callable[[list[dict[str, Any]]], object]) -> Path:
    """Change the rows of a BiVLC table of JSON lines in place."""
    path = root / "data/test.jsonl"
    rows = lines_of(root)
    change(rows)
    write_lines(path, rows)
    return root


def lines_of(root: Path) -> list[dict[str, Any]]:
    (path,) = (p for p in (root / "data.jsonl", root / "data/test.jsonl") if p.exists())
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pa = pytest.importorskip("pyarrow", reason=PYARROW)
    pq = pytest.importorskip("pyarrow.parquet", reason=PYARROW)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


TABLES = {".jsonl": write_lines, ".csv": write_csv, ".parquet": write_parquet}


def picture(width: int) -> bytes:
    """An encoded picture of so many pixels by five."""
    return saved(Image.new("RGB", (width, 5), (width, 9, 9)), "PNG")


def own_row(**cells: Any) -> dict[str, Any]:
    """A row in the columns of `two_by_two`, without an id."""
    return {"image_0": "l.png", "image_1": "r.png", "caption_0": "a b", "caption_1": "b a", **cells}


def words(dataset: Dataset) -> dict[str, str]:
    return {t.id: t.text for t in dataset.texts}


# --- BiVLC as JSON lines ---


def test_caption_i_is_of_image_i(pairs: Path) -> None:
    dataset = bivlc.load(pairs)
    example, text = dataset.tasks.two_by_two[6], words(dataset)
    assert dataset.tasks.kinds == ("two_by_two",)
    assert (example.id, example.category) == ("6", "swap_obj")
    assert example.images == ("6/image", "6/negative_image")
    assert example.captions == ("6/caption", "6/negative_caption")
    assert [text[c] for c in example.captions] == [
        "A horse behind a cart.",
        "A cart behind a horse.",
    ]
    reds = [i.open().getpixel((0, 0)) for i in dataset.images[-2:]]
    assert reds == [(180, 90, 20), (75, 90, 20)]


def test_rows_go_by_their_number_whatever_else_they_have(pairs: Path) -> None:
    before = bivlc.load(pairs).digest()
    relines(pairs, lambda rows: [row.update(id="same", category="c") for row in rows])
    dataset = bivlc.load(pairs)
    assert dataset.digest() == before
    assert dataset.counts["columns ignored"] == "'category', 'id'"


def test_one_picture_for_both_captions_is_listed_by_name_or_bytes(pairs: Path) -> None:
    assert bivlc.load(pairs).counts["unsolvable: images alike"] == "none"
    (pairs / "images/2-negative.png").write_bytes((pairs / "images/2.png").read_bytes())
    relines(
        pairs,
        lambda rows: rows[4].update(negative_image="4.png", caption=rows[4]["negative_caption"]),
    )
    dataset = check_dataset(bivlc.load(pairs))
    assert dataset.counts["unsolvable: images alike"] == "2: '2', '4'"
    assert dataset.counts["unsolvable: captions alike"] == "1: '4'"
    assert len(dataset.tasks.two_by_two) == 7
    by_name = bivlc.load(pairs, require_images=False).counts["unsolvable: images alike"]
    assert by_name.endswith("by name; their bytes not compared")


def test_the_table_is_found_at_the_root_too(pairs: Path) -> None:
    before = bivlc.load(pairs).digest()
    (pairs / "data/test.jsonl").rename(pairs / "test.jsonl")
    assert bivlc.load(pairs).digest() == before
    (pairs / "data/test.jsonl").write_bytes((pairs / "test.jsonl").read_bytes())
    with pytest.raises(DatasetError, match=r"several tables, data/test\.jsonl, test\.jsonl; keep"):
        bivlc.load(pairs)


def test_an_absent_table_says_where_it_was_looked_for_and_how_to_get_it(pairs: Path) -> None:
    (pairs / "data/test.jsonl").unlink()
    with pytest.raises(DatasetNotFound) as caught:
        bivlc.load(pairs)
    assert f"looked in {pairs}/data and {pairs} for test-*.parquet, or test.jsonl" in str(
        caught.value
    )
    assert "hf download imirandam/BiVLC" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["00000-of-00002"], r"2 parts test-\*-of-00002\.parquet and found 1"),
        (["00000-of-00002", "00002-of-00002"], r"and found 2"),
        (["00000-of-00001", "00000-of-00001-0a1b"], "holds parts of several downloads"),
        (["00000-of-00002", "00001-of-00003"], "holds parts of several downloads"),
        (["00000-of-00001", "backup"], "holds parts of several downloads"),
    ],
)
def test_parts_missing_or_of_two_downloads_are_an_error_before_they_are_read(
    names: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / f"data/test-{name}.parquet").write_bytes(b"")
    with pytest.raises(DatasetError, match=message):
        bivlc.load(tmp_path)


def test_parquet_beside_json_lines_is_an_error(pairs: Path) -> None:
    (pairs / "data/test-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"data/test-00000-of-00001\.parquet, data/test\.jsonl"):
        bivlc.load(pairs)


def test_bivlc_is_known_by_its_captions(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bivlc.load(pairs).counts["set"] == "another set in this layout"
    known = bivlc.mark("A small boat.", "A large boat.")
    monkeypatch.setattr(bivlc, "MARKS", bivlc.MARKS | {known})
    with pytest.raises(DatasetError) as caught:
        bivlc.load(pairs)
    message = str(caught.value)
    assert "replace_obj: 1,200 expected, 1 found" in message
    assert "rows: 2,933 expected, 7 found" in message
    counts = bivlc.load(pairs, check="none").counts
    assert counts["replace"] == "3 (published 2,099)"
    assert counts["rows"] == "7 (published 2,933)"


def test_marks_are_of_pairs_of_captions() -> None:
    texts = [TextRecord(str(i), t) for i, t in enumerate("abcd")]
    assert list(bivlc.marks(texts)) == [bivlc.mark("a", "b"), bivlc.mark("c", "d")]
    assert len(bivlc.MARKS) == 10


# --- BiVLC as parquet ---


def test_parquet_is_the_same_data_set_as_json_lines(pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason=PYARROW)
    lines = bivlc.load(pairs)
    parquet = check_dataset(bivlc.load(bivlc.miniature(tmp_path / "parquet", kind="parquet")))
    assert parquet.digest() == lines.digest()
    assert parquet.counts["read from"] == "test-00000-of-00002.parquet, test-00001-of-00002.parquet"
    for one, other in zip(parquet.images, lines.images, strict=True):
        assert one.open().tobytes() == other.open().tobytes()
        assert one.path is None


@pytest.mark.parametrize("kind", ["bytes", "struct", "struct, path first"])
def test_image_cells_are_bytes_or_a_struct_with_bytes(kind: str, pairs: Path) -> None:
    before = bivlc.load(pairs)
    rows = lines_of(pairs)
    for row in rows:
        for column in bivlc.COLUMNS.images:
            data = (pairs / "images" / row[column]).read_bytes()
            cell = {"bytes": data, "path": row[column]}
            row[column] = {"bytes": data, "struct": cell}.get(kind, dict(reversed(cell.items())))
    (pairs / "data/test.jsonl").unlink()
    shutil.rmtree(pairs / "images")  # nothing is looked for among files
    write_parquet(pairs / "data/test-all.parquet", rows)
    dataset = check_dataset(bivlc.load(pairs))
    assert dataset.digest() == before.digest()
    assert dataset.images[13].open().getpixel((0, 0)) == (75, 90, 20)
    assert dataset.counts["unsolvable: images alike"] == "none"


def test_embedded_pictures_alike_are_listed(tmp_path: Path) -> None:
    rows = [
        own_row(image_0=picture(9), image_1=picture(9)),
        own_row(image_0=picture(8), image_1=picture(9)),
    ]
    write_parquet(tmp_path / "data.parquet", rows)
    dataset = check_dataset(two_by_two.load(tmp_path))
    assert dataset.counts["unsolvable: images alike"] == "1: '0'"
    assert [i.id for i in dataset.images] == ["0/image_0", "0/image_1", "1/image_0", "1/image_1"]


@pytest.mark.parametrize("cell", [None, b"", b"no picture"])
def test_a_cell_without_a_picture_is_left_to_the_build(cell: bytes | None, tmp_path: Path) -> None:
    rows = [
        own_row(image_0=picture(7), image_1=cell),
        own_row(image_0=picture(8), image_1=picture(9)),
    ]
    write_parquet(tmp_path / "data.parquet", rows)
    dataset = two_by_two.load(tmp_path)
    with pytest.raises(BadImage):
        dataset.images[1].open()
    assert [dataset.images[i].open().size for i in (0, 2, 3)] == [(7, 5), (8, 5), (9, 5)]


def test_texts_of_parquet_are_read_without_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = bivlc.miniature(tmp_path / "m", kind="parquet")

    def refuse(*_: object) -> None:
        raise AssertionError("an image column was read")

    monkeypatch.setattr(ParquetTable, "_chunk", refuse)
    dataset = bivlc.load(root, require_images=False)
    assert len(dataset.images) == 14
    with pytest.raises(AssertionError, match="was read"):
        bivlc.load(root)


def test_parquet_without_pyarrow_is_one_clear_sentence(
    pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert len(bivlc.load(pairs).images) == 14
    (pairs / "data/test.jsonl").unlink()
    path = pairs / "data/test-00000-of-00001.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(DatasetError) as caught:
        bivlc.load(pairs)
    assert str(caught.value) == (
        f"{path} is a parquet file, and pyarrow, which reads them, is not installed: "
        "pip install 'headstart[parquet]', or put the same columns into JSON lines with the names of image files"
    )


def test_nothing_but_parquet_imports_pyarrow(pairs: Path) -> None:
    """Pyarrow takes a while to import, and is not there everywhere."""
    code = (
        "import sys; from cache_builder.datasets import bivlc, two_by_two; "
        f"bivlc.load({str(pairs)!r}); assert 'pyarrow' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr


# --- two_by_two ---


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return two_by_two.miniature(tmp_path / "own")


def test_ids_categories_and_shared_pictures(own: Path) -> None:
    dataset = two_by_two.load(own)
    assert [(e.id, e.images, e.category) for e in dataset.tasks.two_by_two] == [
        ("0", ("a/0.png", "a/1.png"), "relation"),
        ("b 1", ("b.jpg", "c.jpg"), "attribute"),
        ("c", ("b.jpg", "d.png"), "object"),
        ("d", ("d.png", "e.png"), "object"),
    ]
    assert [i.id for i in dataset.images] == [
        *("a/0.png", "a/1.png", "b.jpg", "c.jpg", "d.png", "e.png")
    ]
    assert words(dataset)["b 1/caption_0"] == "a red hat, a blue coat"
    assert dataset.counts["categories"] == "'attribute' 1, 'object' 2, 'relation' 1"
    assert dataset.counts["columns ignored"] == "none"


def test_rows_that_cannot_be_solved_are_kept_and_listed(own: Path) -> None:
    assert two_by_two.load(own).counts["unsolvable: captions alike"] == "1: 'd'"
    rows = lines_of(own)
    rows[2]["image_1"] = "b.jpg"
    (own / "images/c.jpg").write_bytes((own / "images/b.jpg").read_bytes())
    write_lines(own / "data.jsonl", rows)
    dataset = two_by_two.load(own)
    assert dataset.counts["unsolvable: images alike"] == "2: 'b 1', 'c'"
    assert [e.id for e in dataset.tasks.two_by_two] == ["0", "b 1", "c", "d"]
    assert dataset.tasks.two_by_two[2].images == ("b.jpg", "b.jpg")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_every_kind_of_table_is_the_same_data_set(suffix: str, own: Path) -> None:
    before = two_by_two.load(own)
    rows = [{**row, "id": str(row["id"])} for row in lines_of(own)]
    (own / "data.jsonl").unlink()
    TABLES[suffix](own / f"data{suffix}", rows)
    dataset = check_dataset(two_by_two.load(own))
    assert dataset.digest() == before.digest()
    assert dataset.counts["read from"] == f"data{suffix}"


def test_rows_go_by_their_number_where_there_is_no_id_or_category(own: Path) -> None:
    rows = lines_of(own)
    write_lines(own / "data.jsonl", [{k: row[k] for k in KEYS} for row in rows])
    dataset = two_by_two.load(own)
    assert [e.id for e in dataset.tasks.two_by_two] == ["0", "1", "2", "3"]
    assert {e.category for e in dataset.tasks.two_by_two} == {"all"}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_columns_may_have_other_names(suffix: str, own: Path) -> None:
    before = two_by_two.load(own)
    names = {
        "image_0": "left",
        "image_1": "right.1",
        "caption_0": "says left",
        "caption_1": "cr",
        "id": "key",
    }
    rows = [
        {
            **{names[k]: str(v) for k, v in row.items() if k in names},
            "kind": row["category"],
            "sub": "x",
        }
        for row in lines_of(own)
    ]
    (own / "data.jsonl").unlink()
    TABLES[suffix](own / f"data{suffix}", rows)
    dataset = two_by_two.load(own, columns={**names, "category": "kind"})
    shown = [(e.id, e.images, e.category) for e in dataset.tasks.two_by_two]
    assert shown == [(e.id, e.images, e.category) for e in before.tasks.two_by_two]
    assert [t.text for t in dataset.texts] == [t.text for t in before.texts]
    assert dataset.counts["columns ignored"] == "'sub'"
    two = two_by_two.load(own, columns={**names, "category": ["kind", "sub"]})
    assert two.tasks.two_by_two[0].category == "relation_x"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"picture": "left"},
            "it names the table's columns for some of image_0, image_1, caption_0",
        ),
        ({"image_0": ["a", "b"]}, r"image_0 is \"\['a', 'b'\]\"; it must be the name of a column"),
        ({"category": []}, r"category is '\[\]'; it must be the name of a column"),
        ({"id": ""}, "id is ''; it must be the name of a column"),
        (
            {"caption_0": "caption_1"},
            "images and captions are four columns, not image_0, image_1, c",
        ),
    ],
)
def test_columns_that_make_no_sense_are_refused(
    columns: dict[str, Any], message: str, own: Path
) -> None:
    with pytest.raises(UnknownName, match=message):
        two_by_two.load(own, columns=columns)


def test_a_column_that_is_not_there_is_named_with_those_that_are(own: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        two_by_two.load(own, columns={"image_1": "right", "id": "key"})
    assert "data.jsonl line 1: there is no column 'right', 'key'; it has 'id', 'image_0'" in str(
        caught.value
    )
    assert "columns={…}" in str(caught.value)


def test_winoground_is_read_as_released(own: Path) -> None:
    """Bare stems of .png files, no column `category`, a number as id."""
    row = {
        "id": 7,
        "image_0": "ex_7_img_0",
        "image_1": "ex_7_img_1",
        "caption_0": "a b",
        "caption_1": "b a",
    }
    (own / "data.jsonl").unlink()
    write_lines(own / "examples.jsonl", [{**row, "tag": "Noun", "collapsed_tag": "Object"}])
    for i in (0, 1):
        (own / f"images/ex_7_img_{i}.png").write_bytes(picture(40 + i))
    dataset = check_dataset(two_by_two.load(own, preset="winoground"))
    (example,) = dataset.tasks.two_by_two
    assert (example.id, example.category) == ("7", "Object")
    assert example.images == ("ex_7_img_0", "ex_7_img_1")
    assert dataset.counts["rows"] == "1 (published 400, not asserted)"
    assert dataset.counts["columns ignored"] == "'tag'"
    (own / "images/ex_7_img_0").write_bytes(picture(99))  # the name as it stands wins
    assert dataset.images[0].open().size == (99, 5)


def test_the_preset_of_bivlc_reads_its_columns(pairs: Path) -> None:
    dataset = check_dataset(two_by_two.load(pairs, preset="bivlc"))
    rows = [(e.id, e.category) for e in dataset.tasks.two_by_two]
    assert rows == [(e.id, e.category) for e in bivlc.load(pairs).tasks.two_by_two]
    assert dataset.images[1].id == "0-negative.png"
    assert dataset.counts["rows"] == "7 (published 2,933, not asserted)"
    own = two_by_two.load(pairs, preset="bivlc", columns={"category": "type"})
    assert own.tasks.two_by_two[0].category == "add"


def test_an_unknown_preset_lists_the_known(own: Path) -> None:
    with pytest.raises(UnknownName, match="choose one of own, winoground, bivlc"):
        two_by_two.load(own, preset="biscor")


def test_the_table_may_be_named(own: Path) -> None:
    before = two_by_two.load(own).digest()
    (own / "sub").mkdir()
    (own / "data.jsonl").rename(own / "sub/mine.jsonl")
    assert two_by_two.load(own, table="sub/mine.jsonl").digest() == before
    with pytest.raises(
        DatasetNotFound, match=r"looked in .*own for data\.jsonl, data\.csv, data\.pa"
    ):
        two_by_two.load(own)
    with pytest.raises(DatasetNotFound, match=r"there is no table .*own/sub/other\.csv"):
        two_by_two.load(own, table="sub/other.csv")
    with pytest.raises(DatasetError, match=r"'mine\.txt' is none of \.jsonl, \.csv, \.parquet"):
        two_by_two.load(own, table="mine.txt")
    with pytest.raises(DatasetError, match=r"table='\.\./x\.csv': .*holds a '\.\.' component"):
        two_by_two.load(own, table="../x.csv")


def test_several_tables_are_an_error_unless_one_is_named(own: Path) -> None:
    write_csv(own / "data.csv", [{**own_row(), "image_0": "b.jpg", "image_1": "c.jpg"}])
    with pytest.raises(DatasetError, match=r"holds data\.jsonl and data\.csv; keep the one"):
        two_by_two.load(own)
    assert len(two_by_two.load(own, table="data.csv").tasks.two_by_two) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "id",
            "c",
            "1 ids occur twice: 'c' in data.jsonl line 2 and data.jsonl line 3; an id is of",
        ),
        ("id", " ", "line 2: id is ' '; an id is a text that is not blank, or a whole number"),
        ("id", True, "line 2: id is 'True'; an id is"),
        ("id", 1.5, "line 2: id is '1.5'; an id is"),
        ("category", "", "line 2: category is ''; it must be a text that is not blank"),
        ("caption_1", "\n", "line 2: caption_1 is "),
        (
            "image_1",
            "../../etc/passwd",
            "line 2: image_1: image name '../../etc/passwd' holds a '..' comp",
        ),
        ("image_0", 3, "line 2: image_0 is 3; it must be the name of an image file"),
    ],
)
def test_a_malformed_row_is_refused_by_its_line(
    key: str, value: object, message: str, own: Path
) -> None:
    rows = lines_of(own)
    rows[1][key] = value
    write_lines(own / "data.jsonl", rows)
    with pytest.raises(DatasetError, match=re.escape(message)):
        two_by_two.load(own)


@pytest.mark.parametrize("key", ["id", "category"])
def test_an_optional_column_is_of_all_rows_or_none(key: str, own: Path) -> None:
    rows = lines_of(own)
    del rows[0][key]
    write_lines(own / "data.jsonl", rows)
    with pytest.raises(
        DatasetError, match=rf"line 2 has a column '{key}' and data\.jsonl line 1 has"
    ):
        two_by_two.load(own)
    rows = [*rows[1:], rows[0]]
    write_lines(own / "data.jsonl", rows)
    with pytest.raises(DatasetError, match=rf"line 4: there is no column '{key}'"):
        two_by_two.load(own)


def test_a_number_and_its_digits_are_one_id(own: Path) -> None:
    rows = lines_of(own)
    rows[1]["id"] = "0"
    write_lines(own / "data.jsonl", rows)
    with pytest.raises(DatasetError, match="'0' in data"):
        two_by_two.load(own)


def test_a_key_twice_in_a_line_an_empty_table_and_a_pointer_are_refused(own: Path) -> None:
    (own / "data.jsonl").write_text('{"id": "a", "id": "b"}')
    with pytest.raises(DatasetError, match=r"data\.jsonl line 1: .*key 'id' occurs twice"):
        two_by_two.load(own)
    (own / "data.jsonl").write_text("\n")
    with pytest.raises(DatasetError, match=r"data\.jsonl has no rows"):
        two_by_two.load(own)
    for name in ("data.jsonl", "data.csv", "data.parquet"):
        for old in own.glob("data.*"):
            old.unlink()
        (own / name).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
        )
        with pytest.raises(DatasetError, match=rf"{re.escape(name)} is a Git LFS pointer, not the"):
            two_by_two.load(own)


def test_no_folder_of_images_says_so(own: Path) -> None:
    (own / "images").rename(own / "pictures")
    with pytest.raises(
        DatasetNotFound, match=r"looked for pictures in .*own/images and found no such"
    ):
        two_by_two.load(own)


def test_an_embedded_picture_and_a_file_of_one_id_are_told_apart_or_refused(own: Path) -> None:
    """The file "0/image_1" would have the id of the first row's embedded picture."""
    pytest.importorskip("pyarrow", reason=PYARROW)
    (own / "data.jsonl").unlink()
    (own / "images/0").mkdir()
    (own / "images/0/image_1").write_bytes(picture(7))
    write_parquet(own / "data.parquet", [own_row(image_0="0/image_1", image_1=picture(8))])
    with pytest.raises(DatasetError, match="'0/image_1' is the id of two pictures; rename the id"):
        two_by_two.load(own)


def test_a_column_of_pictures_is_no_id(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data.parquet", [own_row(image_0=picture(7), image_1=picture(8))])
    with pytest.raises(DatasetError, match="row 0: image_0 is 'None'; an id is a text"):
        two_by_two.load(tmp_path, columns={"id": "image_0"})
    with pytest.raises(DatasetError, match="row 0: image_1 is None; it must be a text"):
        two_by_two.load(tmp_path, columns={"category": "image_1"})


@pytest.mark.parametrize("column", ["image_0", "caption_1", "category", "id"])
def test_a_parquet_column_of_an_unread_type_is_named(column: str, own: Path) -> None:
    rows = [{**row, "id": str(row["id"]), column: [1.5]} for row in lines_of(own)]
    (own / "data.jsonl").unlink()
    write_parquet(own / "data.parquet", rows)
    with pytest.raises(
        DatasetError, match=rf"data\.parquet: column '{column}' holds neither texts, wh"
    ):
        two_by_two.load(own)


def test_a_parquet_column_that_nobody_asked_for_may_be_of_any_type(own: Path) -> None:
    before = two_by_two.load(own).digest()
    rows = [{**row, "id": str(row["id"]), "boxes": [[1.5]]} for row in lines_of(own)]
    (own / "data.jsonl").unlink()
    write_parquet(own / "data.parquet", rows)
    dataset = two_by_two.load(own)
    assert dataset.digest() == before
    assert dataset.counts["columns ignored"] == "'boxes'"
