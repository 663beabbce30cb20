"""Score tables on disk: what goes in comes out, and what is damaged says so."""

from typing import Any

import numpy as np
import pytest
import zarr

from eval import score_io
from eval.composition import CompositionScores
from eval.errors import ScoreTableError, ScoreTableExists, ScoreTableNotFound
from eval.matching import MatchingScores
from eval.retrieval import RetrievalScores

RNG = np.random.default_rng(0)
CZSL = CompositionScores(
    np.where(RNG.random((5, 3)) < 0.2, -np.inf, RNG.normal(size=(5, 3))).astype(np.float32),
    np.array([0, 0, 2, 1, 0]),
    np.array([["red", "hüt"], ["=old", "hat"], ["red", "hat"]]),
    np.array([True, False, True]),
    "val",
    "logit",
    world="open",
    ids=[f"photo {i}" for i in range(5)],
    meta={"note": "ü"},
)
INDEXED = CompositionScores(
    np.zeros((2, 2)),
    np.array([0, 1]),
    np.array([[0, 1], [1, 1]]),
    np.array([True, False]),
    "test",
    "cosine",
)
TWO = MatchingScores(RNG.normal(size=(3, 2, 2)), np.array(["swap", "add", "swap"]), "cosine", "val")
ONE = MatchingScores(RNG.normal(size=(3, 2)).astype(np.float32), np.array(["x", "y", "y"]), "logit")
FIND = RetrievalScores(
    RNG.normal(size=(3, 4)), RNG.random((3, 4)) < 0.5, "probability", meta={"direction": "t2i"}
)
ALL = {"czsl": CZSL, "indexed": INDEXED, "two": TWO, "one": ONE, "find": FIND}


def read(path) -> Any:
    """A table, of whatever kind the test knows it to be."""
    return score_io.load(path)


@pytest.mark.parametrize("table", ALL.values(), ids=ALL)
def test_what_goes_in_comes_out(table, tmp_path):
    run = {"method": "tf_local", "seed": 3, "cache": {"fingerprint": "ab"}}
    path = score_io.save(table, tmp_path / "deep" / "scores.zarr", run=run)
    back: Any = score_io.load(path)
    assert type(back) is type(table)
    for name in ("scores", "target", "pairs", "seen", "category", "positives"):
        if hasattr(table, name):
            mine, theirs = np.asarray(getattr(table, name)), np.asarray(getattr(back, name))
            assert mine.dtype.kind == theirs.dtype.kind
            assert np.array_equal(mine, theirs), name
    assert back.scores.dtype == table.scores.dtype
    assert (back.split, back.space, back.ids) == (table.split, table.space, table.ids)
    assert (back.kind, back.shape, back.world) == (table.kind, table.shape, table.world)
    assert back.meta == {**table.meta, "run": run}
    assert sorted(p.name for p in path.parent.iterdir()) == ["scores.zarr"]


def test_a_table_says_its_kind_shape_and_world():
    """The kinds are names on disk: they stay."""
    assert list(score_io.KINDS) == ["czsl", "matching", "retrieval", "composed", "czsl_summary"]
    found = {name: (t.kind, t.shape, t.world) for name, t in ALL.items()}
    assert found == {
        "czsl": ("czsl", (5, 3), "open"),
        "indexed": ("czsl", (2, 2), "closed"),
        "two": ("matching", (3, 2, 2), ""),
        "one": ("matching", (3, 2), ""),
        "find": ("retrieval", (3, 4), ""),
    }


def test_a_loaded_table_saved_again_keeps_its_run(tmp_path):
    first = score_io.load(score_io.save(ONE, tmp_path / "a.zarr", run={"seed": 1}))
    assert score_io.load(score_io.save(first, tmp_path / "b.zarr")).meta == {"run": {"seed": 1}}


def test_a_table_can_be_read_with_zarr_alone(tmp_path):
    path = score_io.save(CZSL, tmp_path / "scores.zarr", run={})
    group = zarr.open_group(str(path), mode="r")
    pairs: Any = group.attrs["pairs"]
    assert pairs[0] == ["red", "hüt"]
    assert np.array_equal(np.asarray(group["scores"]), CZSL.scores)


def test_many_rows_are_stored_in_several_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(score_io, "CHUNK_CELLS", 6)
    path = score_io.save(CZSL, tmp_path / "scores.zarr")
    assert len(list((path / "scores" / "c").iterdir())) == 3
    assert np.array_equal(read(path).scores, CZSL.scores)


def test_a_table_is_not_overwritten_unless_asked(tmp_path):
    path = score_io.save(ONE, tmp_path / "scores.zarr")
    with pytest.raises(ScoreTableExists, match=r"scores\.zarr.*already there"):
        score_io.save(TWO, path)
    with pytest.raises(FileExistsError):
        score_io.save(TWO, path)
    score_io.save(TWO, path, overwrite=True)
    assert read(path).scores.shape == (3, 2, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.zarr"]


def test_a_failing_write_leaves_nothing_behind_and_the_old_table_whole(tmp_path, monkeypatch):
    path = score_io.save(ONE, tmp_path / "scores.zarr")

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(zarr.Group, "create_array", full)
    with pytest.raises(OSError, match="disk full"):
        score_io.save(TWO, path, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.zarr"]
    assert np.array_equal(read(path).scores, ONE.scores)


@pytest.mark.parametrize("run", [{"a": {1, 2}}, {"loss": float("nan")}])
def test_what_is_not_json_is_refused_before_anything_is_written(run, tmp_path):
    with pytest.raises(ScoreTableError, match="must be JSON"):
        score_io.save(ONE, tmp_path / "scores.zarr", run=run)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("table", "array"),
    [(CZSL, "scores"), (CZSL, "target"), (CZSL, "seen"), (TWO, "scores"), (FIND, "positives")],
)
def test_a_missing_chunk_is_an_error_and_never_zeros(table, array, tmp_path):
    path = score_io.save(table, tmp_path / "scores.zarr")
    for chunk in [p for p in (path / array / "c").rglob("*") if p.is_file()]:
        chunk.unlink()
    with pytest.raises(ScoreTableError, match=r"scores\.zarr does not hold a valid table"):
        score_io.load(path)


def test_a_flipped_byte_is_found(tmp_path):
    path = score_io.save(TWO, tmp_path / "scores.zarr")
    chunk = next(p for p in (path / "scores" / "c").rglob("*") if p.is_file())
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ScoreTableError, match="damaged or incomplete"):
        score_io.load(path)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"format": "headstart cache"}, "'headstart cache', not 'headstart scores'"),
        ({"version": 2}, "version 2.*reads version 1"),
        ({"kind": "triplets"}, "kind 'triplets'.*czsl, matching, retrieval, composed"),
        ({"split": ""}, "valid table: a table needs its split"),
    ],
)
def test_another_format_or_version_is_refused(attributes, message, tmp_path):
    path = score_io.save(ONE, tmp_path / "scores.zarr")
    zarr.open_group(str(path), mode="r+").attrs.update(attributes)
    with pytest.raises(ScoreTableError, match=message):
        score_io.load(path)


def test_a_table_without_a_part_is_refused(tmp_path):
    path = score_io.save(CZSL, tmp_path / "scores.zarr")
    zarr.open_group(str(path), mode="r+").__delitem__("target")
    with pytest.raises(ScoreTableError, match=r"damaged or incomplete.*target"):
        score_io.load(path)


def test_a_path_with_nothing_or_something_else_says_so(tmp_path):
    with pytest.raises(
        ScoreTableNotFound, match=r"no score table at .*nope\.zarr; `headstart score"
    ):
        score_io.load(tmp_path / "nope.zarr")
    with pytest.raises(FileNotFoundError):
        score_io.load(tmp_path / "nope.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ScoreTableError, match="not a score table"):
        score_io.load(tmp_path / "empty.zarr")
