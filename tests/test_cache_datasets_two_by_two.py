"""Readers of two images and two captions a row, `bivlc` and `two_by_two`: layouts, traps, parquet and other tables."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_builder.datasets import bivlc, two_by_two
from cache_builder.datasets.base import Dataset, TextRecord
from cache_builder.records import DatasetError, DatasetNotFound
from cache_builder.testing import check_dataset


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return bivlc.miniature(tmp_path / "pairs")


def relines(root: Path, change: Callable[[list[dict[str, Any]]], object]) -> Path:
    """Change the rows of a BiVLC table of JSON lines in place."""
    path = root / "data/test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


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
    assert "replace_obj 1,200 expected, 1 found" in message
    assert "rows 2,933 expected, 7 found" in message
    counts = bivlc.load(pairs, check="none").counts
    assert counts["replace"] == "3 (published 2,099)"
    assert counts["rows"] == "7 (published 2,933)"


def test_marks_are_of_pairs_of_captions() -> None:
    texts = [TextRecord(str(i), t) for i, t in enumerate("abcd")]
    assert list(bivlc.marks(texts)) == [bivlc.mark("a", "b"), bivlc.mark("c", "d")]
    assert len(bivlc.MARKS) == 10
