"""Caches for other programs: .npz and parquet hold what `read` gives, whole or not at all, and overwrite nothing."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_builds import ending, in_child
from pyarrow import parquet as pq
from small_caches import shaped
from stand_in import KeptStandIn, StandIn, WordStandIn, dataset

from cache_builder import FeatureCache, aside, exporting, npz, parquet_writing
from cache_builder.aside import PART
from cache_builder.cli import main
from cache_builder.errors import (
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    CacheLocked,
    CacheMismatch,
)
from cache_builder.foreign import import_features
from cache_builder.npz import export_npz
from cache_builder.parquet_writing import export_parquet

Make = Callable[..., FeatureCache]
STREAMS = sorted(StandIn.streams)
KINDS: dict[str, dict[str, Any]] = {
    **{mode: {"storage": mode} for mode in ("fp16", "fp32", "bf16", "int8-channel", "fp8-token")},
    "lossless": {"storage": "lossless"},
    "pixels and views": {"streams": [*STREAMS, "image/view_flip/pooled", "image/block_1"]},
    "bad": {"dataset": dataset(bad=(3, 8))},
    "crops": {
        "streams": [*STREAMS, "crop/pooled"],
        "crops": "fast",
        "dataset": dataset(5, bad=(1,)),
    },
    "words": {"backbone": WordStandIn()},
    "kept": {
        "backbone": KeptStandIn(),
        "dataset": shaped(),
        "streams": [*KeptStandIn.streams, "image/block_1", "image/view_flip/patches"],
    },
    "kept int8": {"backbone": KeptStandIn(), "dataset": shaped(), "storage": "int8-channel"},
    "no texts": {"dataset": dataset(n_texts=0)},
}
EXPORTS = {"npz": export_npz, "parquet": export_parquet}


@pytest.fixture(params=["at once", "row by row"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small caches fit one block; a limit of one byte puts every row into a block of its own."""
    if request.param == "row by row":
        monkeypatch.setattr(exporting, "BLOCK", 1)
        monkeypatch.setattr(npz, "STRINGS", 2)


def good(cache: FeatureCache) -> np.ndarray:
    """Rows of the images that are not in quarantine."""
    return np.array([r for r, i in enumerate(cache.image_ids) if i not in cache.quarantined], int)


def rows_of(cache: FeatureCache, stream: str) -> np.ndarray | None:
    return good(cache) if stream.startswith(("image/", "crop/")) else None


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("kind", KINDS)
def test_an_npz_holds_what_the_cache_gives(kind: str, make_cache: Make, fast_path: Path) -> None:
    cache = make_cache(**KINDS[kind])
    with np.load(export_npz(cache, fast_path / "c.npz")) as held:
        assert held["image/id"].tolist() == [cache.image_ids[r] for r in good(cache)]
        assert held["text/id"].tolist() == cache.text_ids
        assert held["text/string"].tolist() == cache.texts
        for stream in cache.streams:
            rows = rows_of(cache, stream)
            if cache.is_ragged(stream):
                values, offsets = cache.read_ragged(stream, rows)
                assert np.array_equal(held[f"{stream.rpartition('/')[0]}/offsets"], offsets)
            else:
                values = cache.read(stream, rows)
            assert held[stream].dtype == values.dtype
            assert held[stream].tobytes() == values.tobytes()
            assert held[stream].shape == values.shape
        for name, values in cache.readout().items():
            assert np.array_equal(held[f"readout/{name}"], values)
        assert json.loads(str(held["tasks"])) == json.loads(cache.tasks.to_json())
        assert json.loads(str(held["header"]))["digest"] == cache.header.digest
        left_out = {bad["id"]: bad["reason"] for bad in json.loads(str(held["quarantine"]))}
        assert left_out == cache.quarantined
        if "crop/pooled" in cache.streams:
            assert held["crop/box"].shape == (len(held["crop/pooled"]), 4)
            assert np.array_equal(
                held["crop/box"], cache.boxes()[np.isin(cache.crop_owners(), good(cache))]
            )
        if kind.startswith("kept"):
            grid = held["image/grid"]
            assert np.array_equal(grid.prod(1), np.diff(held["image/offsets"]))
        if kind == "words":
            assert held["word/id"].tolist() == cache.word_ids
            assert np.array_equal(held["word/parts"], cache.word_parts)
        if "text/tokens" in cache.streams:
            assert json.loads(str(held["vocabulary"])) == cache.vocabulary()
            assert np.array_equal(held["text/ids"], cache.read_ragged("text/ids")[0])
        assert len(set(held.files)) == len(held.files)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("kind", KINDS)
def test_parquet_tables_hold_what_the_cache_gives(
    kind: str, make_cache: Make, fast_path: Path
) -> None:
    cache = make_cache(**KINDS[kind])
    folder = export_parquet(cache, fast_path / "c.parquet")
    images, texts = (pq.read_table(folder / f"{name}.parquet") for name in ("images", "texts"))
    assert images["id"].to_pylist() == [cache.image_ids[r] for r in good(cache)]
    assert texts["string"].to_pylist() == cache.texts
    for stream in cache.streams:
        file = {"text": "texts", "word": "words"}.get(stream.partition("/")[0], "images")
        column = pq.read_table(folder / f"{file}.parquet", columns=[stream])
        shape = json.loads(column.schema.field(stream).metadata[b"shape"])
        cells = [np.array(cell, np.float32).reshape(shape) for cell in column[stream].to_pylist()]
        rows = rows_of(cache, stream)
        if cache.is_ragged(stream):
            assert shape[0] == -1
            values, offsets = cache.read_ragged(stream, rows)
            expected = np.split(values, offsets[1:-1])[: len(offsets) - 1]
        else:
            expected = cache.read(stream, rows)
        assert len(cells) == len(expected)
        for cell, value in zip(cells, expected, strict=True):
            assert np.array_equal(cell, value.astype(np.float32))
            assert cell.shape == value.shape
    if exporting.BLOCK == 1:
        assert pq.ParquetFile(folder / "images.parquet").num_row_groups == len(good(cache))
    assert json.loads((folder / "header.json").read_text())["digest"] == cache.header.digest
    assert len(json.loads((folder / "quarantine.json").read_text())) == len(cache.quarantined)
    assert json.loads((folder / "tasks.json").read_text()) == json.loads(cache.tasks.to_json())
    plain = {"images.parquet", "texts.parquet", "header.json", "tasks.json", "quarantine.json"}
    assert {p.name for p in folder.iterdir()} - {"words.parquet", "vocabulary.json"} == plain


def test_labels_stand_beside_the_ids(make_cache: Make, fast_path: Path) -> None:
    labelled, retrieval = (
        make_cache(),
        make_cache("r.zarr", dataset=shaped(), backbone=KeptStandIn()),
    )
    with np.load(export_npz(labelled, fast_path / "l.npz")) as held:
        assert {*held["image/split"]} == {"train"}
        assert {*held["image/pair"]} == {"red cube"}
        assert len(held["image/attr"]) == len(held["image/id"])
    folder = export_parquet(retrieval, fast_path / "r.parquet")
    table = pq.read_table(folder / "images.parquet")
    assert {*table["split"].to_pylist()} == {"test"}
    assert "attr" not in table.column_names


def test_an_export_does_not_depend_on_how_it_is_cut(
    make_cache: Make, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache()
    whole = export_npz(cache, fast_path / "whole.npz").read_bytes()
    monkeypatch.setattr(exporting, "BLOCK", 100)
    assert export_npz(cache, fast_path / "cut.npz").read_bytes() == whole


def test_one_long_text_among_short_ones_costs_little(make_cache: Make, fast_path: Path) -> None:
    texts = ["a", "b" * 50_000, *(f"c{i}" for i in range(98))]
    cache = make_cache(dataset=dataset(texts=texts))
    file = export_npz(cache, fast_path / "c.npz")
    with np.load(file) as held:
        assert held["text/string"].tolist() == texts
        assert held["text/string"].nbytes == 4 * 50_000 * 100
    assert file.stat().st_size < 1_000_000


@pytest.mark.parametrize("storage", ["fp16", "bf16", "int8-channel"])
def test_an_npz_comes_back_by_the_mapping_of_the_documents(
    storage: str, make_cache: Make, fast_path: Path
) -> None:
    cache = make_cache(storage=storage, dataset=dataset(bad=(3, 8)))
    export_npz(cache, fast_path / "photos.npz")
    page = (Path(__file__).parent.parent / "docs" / "exchange.md").read_text()
    mapping = page.partition("cat > photos.toml <<'END'\n")[2].partition("END\n")[0]
    (fast_path / "photos.toml").write_text(mapping)
    back = import_features(fast_path / "photos.toml", fast_path / "back.zarr")
    ids = [cache.image_ids[r] for r in good(cache)]
    for stream in ("image/pooled", "image/patches"):
        found = back.read(stream, back.rows("image", ids))
        assert np.array_equal(found, cache.read(stream, good(cache)))
    found, offsets = back.read_ragged("text/tokens", back.rows("text", cache.text_ids))
    expected = cache.read_ragged("text/tokens")
    assert np.array_equal(found, expected[0])
    assert np.array_equal(offsets, expected[1])


@pytest.mark.parametrize("form", EXPORTS)
def test_what_is_there_is_never_overwritten(form: str, make_cache: Make, fast_path: Path) -> None:
    cache, target = make_cache(), fast_path / "taken"
    target.write_text("mine")
    with pytest.raises(CacheMismatch, match="taken exists, so it is not overwritten"):
        EXPORTS[form](cache, target)
    assert target.read_text() == "mine"
    assert not (fast_path / f"taken{PART}").exists()


def dying(work: Callable[[], object], at: int) -> Callable[[], None]:
    """`work`, killed when it asks for the numbers of its `at`-th block."""

    def run() -> None:
        plain, seen = exporting.numbers, iter(range(1, 10**6))

        def numbers(*arguments: Any) -> Any:
            if next(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments)

        npz.numbers = parquet_writing.numbers = numbers
        exporting.BLOCK = 1
        work()

    return run


@pytest.mark.parametrize("form", EXPORTS)
@pytest.mark.parametrize("at", [1, 9, 23])
def test_a_killed_export_leaves_nothing_under_its_name_and_is_repeated(
    form: str, at: int, make_cache: Make, fast_path: Path
) -> None:
    cache, target = make_cache(), fast_path / "out"
    assert ending(in_child(dying(lambda: EXPORTS[form](cache, target), at))) == -signal.SIGKILL
    assert not target.exists()
    assert (fast_path / f"out{PART}").exists()
    EXPORTS[form](cache, target)
    assert not (fast_path / f"out{PART}").exists()
    made = (
        {p.name: p.read_bytes() for p in target.iterdir()}
        if target.is_dir()
        else {"": target.read_bytes()}
    )
    other = EXPORTS[form](cache, fast_path / "undisturbed")
    for name, data in made.items():
        assert data == (other / name if name else other).read_bytes()


@pytest.mark.parametrize("form", EXPORTS)
def test_a_damaged_chunk_or_a_full_disk_leaves_nothing(
    form: str, make_cache: Make, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, target = make_cache(), fast_path / "out"
    chunk = cache.path / cache.layout("image/patches").file(1)
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(CacheCorrupt, match="image/patches"):
        EXPORTS[form](cache, target)
    assert not [p for p in fast_path.iterdir() if p.name.startswith("out")]
    data[5] ^= 1
    chunk.write_bytes(data)

    def full(*_: Any) -> Iterator[Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules[EXPORTS[form].__module__], "numbers", full)
    with pytest.raises(OSError, match="No space left"):
        EXPORTS[form](cache, target)
    assert not [p for p in fast_path.iterdir() if p.name.startswith("out")]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("at", ["sync_folder", "_check_free"])
def test_two_exports_to_one_name_never_end_in_a_half_one(
    at: str, fails: bool, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another comes between the last file and the name, whatever becomes of the first."""
    target, plain, refused = fast_path / "out", getattr(aside, at), list[str]()

    def other(place: Path) -> None:
        if not refused:
            refused.append("")
            with pytest.raises(CacheLocked) as found, aside.new_folder(target):
                pass
            refused.append(str(found.value))
            if fails:
                raise OSError(28, "No space left on device")
        plain(place)

    monkeypatch.setattr(aside, at, other)
    with suppress(OSError), aside.new_folder(target) as part:
        for name in "ab":
            (part / name).write_text(name)
    assert "another process is exporting" in refused[1]
    assert [p.name for p in fast_path.iterdir()] == ([] if fails else ["out"])
    assert fails or {p.name for p in target.iterdir()} == {"a", "b"}


def test_a_cache_that_is_not_finished_is_refused(make_cache: Make, fast_path: Path) -> None:
    cache = make_cache()
    cache.unseal()
    for form, export in EXPORTS.items():
        with pytest.raises(CacheIncomplete, match="only a sealed cache is exported"):
            export(cache, fast_path / form)
        assert not (fast_path / form).exists()


def test_strings_that_numpy_would_cut_are_refused(make_cache: Make, fast_path: Path) -> None:
    cache = make_cache(dataset=dataset(texts=["plain", "ends\0"]))
    with pytest.raises(CacheError, match=r"text/string has strings that end in NUL.*\.h5"):
        export_npz(cache, fast_path / "c.npz")
    folder = export_parquet(cache, fast_path / "c.parquet")
    assert pq.read_table(folder / "texts.parquet")["string"].to_pylist() == ["plain", "ends\0"]


def test_the_shell_takes_a_form_or_the_end_of_a_name(
    make_cache: Make, fast_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(make_cache(dataset=dataset(bad=(3,))).path)
    given = {
        "c.h5": ["c.h5"],
        "d.npz": ["d.npz"],
        "e.parquet": ["e.parquet"],
        "f.out": ["--h5", "f.out"],
        "g.out": ["--npz", "g.out"],
        "h": ["--parquet", "h"],
    }
    for name, words in given.items():
        *option, last = words
        assert main(["export", cache, *option, str(fast_path / last)]) == 0
        said = capsys.readouterr().out
        assert f"{fast_path / name}: " in said
        assert ("left out 1 images" in said) == (name not in ("c.h5", "f.out"))
    assert (fast_path / "f.out").read_bytes() == (fast_path / "c.h5").read_bytes()
    assert (fast_path / "g.out").read_bytes() == (fast_path / "d.npz").read_bytes()
    assert {p.name for p in (fast_path / "h").iterdir()} == {
        p.name for p in (fast_path / "e.parquet").iterdir()
    }
    assert main(["export", cache, str(fast_path / "c.csv")]) == 1
    assert "c.csv does not end in .h5, .hdf5, .npz, .parquet" in capsys.readouterr().err
    for words in ([], ["c.h5", "--npz", "c.npz"]):
        with pytest.raises(SystemExit):
            main(["export", cache, *words])


def test_without_pyarrow_one_sentence(
    make_cache: Make, fast_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(make_cache().path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["export", cache, "--parquet", str(fast_path / "out")]) == 1
    assert "pip install 'headstart[parquet]'" in capsys.readouterr().err
    assert not (fast_path / "out").exists()
