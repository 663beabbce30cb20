"""The commands that run.json and score tables carry make the same run and table; costs are those of the cache."""

import json
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_builder import FeatureCache, build, load_backbone, load_dataset
from cache_builder.build_log import build_seconds, sessions, timed
from cache_builder.errors import CacheError
from cache_builder.place import Folder
from eval import score_io
from heads.cli import main
from heads.commands import score_command, train_command
from heads.config import read_settings
from heads.errors import ConfigError
from heads.run_files import read_run
from heads.runs import score_run, train_run

PLAIN = st.one_of(
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).map(str.strip),
)
NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True)
VALUES = st.one_of(PLAIN, st.lists(PLAIN, max_size=3))


@given(
    st.dictionaries(
        NAMES, st.one_of(VALUES, st.dictionaries(NAMES, VALUES, min_size=1, max_size=2)), max_size=4
    )
)
def test_a_command_s_settings_are_read_as_those_that_it_was_made_of(head: dict[str, Any]) -> None:
    settings = {"head": head, "train": {"seed": 3}}
    text = train_command(
        "csp", Path("/a b/run"), cache="/c.zarr", task="czsl", settings=settings, threads=1
    )
    words = shlex.split(text)
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert read_settings(None, sets) == settings


@pytest.fixture(scope="module")
def cache(fast_folder: Path) -> FeatureCache:
    dataset = load_dataset("toy_world", scale=0.01)
    return build(dataset, load_backbone("clip:demo"), fast_folder / "commands.zarr", progress=False)


def run_line(line: str, monkeypatch: pytest.MonkeyPatch, **replaced: str) -> None:
    words = shlex.split(line)
    if words[0].startswith("OMP_NUM_THREADS="):
        words = words[1:]
    assert words[0] == "headstart"
    for flag, value in replaced.items():
        words[words.index(f"--{flag}") + 1] = value
    assert main(words[1:]) == 0


def test_the_commands_of_a_run_make_it_again(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "head": {"layers": 1, "dim": 16, "heads": 2, "ffn": 16},
        "train": {"steps": 2, "seed": 4},
    }
    first = train_run(
        cache, "tf_local", tmp_path / "a", task="two_by_two", settings=settings, progress=False
    )
    (table,) = score_run(first.path, task="matching")
    run_line(first.record["command"], monkeypatch, out=str(tmp_path / "b"))
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (
        first.path / "model.safetensors"
    ).read_bytes()
    assert read_run(tmp_path / "b")["asked"] == first.record["asked"]
    line = score_io.load(table).meta["command"]
    assert score_io.load(table).meta["run"]["command"] == first.record["command"]
    run_line(line.replace(str(first.path), str(tmp_path / "b")), monkeypatch)
    tables: Any = [score_io.load(path) for path in (tmp_path / "b" / table.name, table)]
    again, before = (np.asarray(one.scores) for one in tables)
    np.testing.assert_array_equal(again, before)


@pytest.mark.parametrize("value", [None, float("inf"), [1, None], {"a": None}])
def test_where_no_command_line_can_say_a_setting_there_is_no_command(value: object) -> None:
    settings = {"head": {"a": value}}
    given: dict[str, Any] = {"cache": "/c.zarr", "task": "czsl", "threads": 1}
    assert train_command("csp", Path("/run"), settings=settings, **given) == ""


def test_a_none_that_is_the_default_is_no_word_of_the_command(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "head": {"layers": 1, "dim": 16, "heads": 2, "ffn": 16},
        "train": {"steps": 1, "order_seed": None},
    }
    run = train_run(
        cache, "tf_local", tmp_path / "a", task="two_by_two", settings=settings, progress=False
    )
    assert "order_seed" not in run.record["command"]
    run_line(run.record["command"], monkeypatch, out=str(tmp_path / "b"))


def test_a_table_s_command_says_all_that_was_asked_for(cache: FeatureCache, tmp_path: Path) -> None:
    run = train_run(cache, "zero_shot", tmp_path / "a", task="two_by_two", progress=False)
    (table,) = score_run(run.path, allow_missing=True)
    assert "--allow-missing" in shlex.split(score_io.load(table).meta["command"])
    line = score_command(
        run.path, split="test", world="closed", task=None, rerank=None, cache=None, dense=False, keep=None,
        backbone="clip:/my files",
    )  # fmt: skip
    assert shlex.split(line)[-2:] == ["--backbone", "clip:/my files"]


def test_costs_are_bytes_of_what_is_read_and_seconds_of_all_building(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run = train_run(
        cache, "tf_local", tmp_path / "a", task="two_by_two",
        settings={"head": {"layers": 1, "dim": 16, "heads": 2, "ffn": 16}, "train": {"steps": 1}}, progress=False,
    )  # fmt: skip
    read = set(run.head.needs(run.head.config).queries)
    assert read == {"image/patches"}
    assert run.record["costs"]["bytes_per_image"] == cache.read("image/patches")[0].nbytes
    spent = build_seconds(cache.place)
    assert spent is not None
    assert run.record["costs"]["build_seconds"] == spent > 0
    json.dumps(run.record["costs"])


def test_every_time_of_building_counts_and_a_torn_line_is_none(fast_path: Path) -> None:
    dataset = load_dataset("toy_world", scale=0.01)
    path = fast_path / "c.zarr"
    cache = build(
        dataset, load_backbone("clip:demo"), path, streams=["image/pooled"], progress=False
    )
    (only,) = sessions(cache.place)
    build(dataset, load_backbone("clip:demo"), path, streams=["image/pooled"], progress=False)
    assert sessions(cache.place) == [only], "nothing was built the second time"
    (path / "image" / "pooled" / "c" / "0" / "0").unlink()
    build(dataset, load_backbone("clip:demo"), path, streams=["image/pooled"], progress=False)
    first, second = sessions(cache.place)
    assert {first.seconds, second.seconds} >= {only.seconds}
    with (path / "builds.jsonl").open("a") as file:
        file.write('{"seconds": 1')
    assert build_seconds(cache.place) == pytest.approx(first.seconds + second.seconds)
    assert FeatureCache.open(path).verify().ok
    (path / "builds.jsonl").unlink()
    assert build_seconds(cache.place) is None
    assert FeatureCache.open(path).verify().ok


@pytest.mark.parametrize("error", [OSError("disk full"), CacheError("the bucket is gone")])
def test_a_log_that_cannot_be_written_changes_nothing_of_a_build(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Folder, "append", refuse)
    told = {"device": "cpu", "workers": 1, "helped": False}
    with timed(Folder(fast_path), time.monotonic(), **told):
        pass
    with (
        pytest.raises(RuntimeError, match="what went wrong itself"),
        timed(Folder(fast_path), time.monotonic(), **told),
    ):
        raise RuntimeError("what went wrong itself")


def test_settings_in_a_table_that_there_is_not_are_refused_before_training(fast_path: Path) -> None:
    dataset, path = load_dataset("toy_world", scale=0.01), fast_path / "c.zarr"
    cache = build(dataset, load_backbone("clip:demo"), path, progress=False)
    settings = {"trian": {"steps": 1}}
    with pytest.raises(ConfigError, match="settings of csp names 'trian'; did you mean 'train'"):
        train_run(cache, "csp", fast_path / "run", task="czsl", settings=settings, progress=False)
    assert not (fast_path / "run").exists()
