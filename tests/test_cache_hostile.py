"""A cache or data set from a stranger: refused in one sentence, within little memory and time, and never run."""

import json
import os
import pickle
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import count
from forged import forge, layout_of, linked, look, numbers, piped, sparse, strings, tasks
from kill_builds import ending, in_child
from small_caches import compressed, fixed

from cache_builder import FeatureCache
from cache_builder.errors import CacheCorrupt


def attributes(value: object) -> Callable[[Path], object]:
    text = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": value})
    return lambda path: (path / "zarr.json").write_text(text)


def raw(text: str) -> Callable[[Path], object]:
    return lambda path: (path / "zarr.json").write_text(text)


def claim(**values: Any) -> dict[str, Any]:
    return {"header": lambda claims: claims.update(values)}


def version_2(path: Path) -> None:
    """An array of zarr v2 whose codec is a pickle, in place of one of v3."""
    home, ran = path / "image/pooled", path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(ran),)

    (home / "zarr.json").unlink()
    codecs = {"filters": [{"id": "vlen-utf8"}], "compressor": {"id": "pickle"}}
    array = {"zarr_format": 2, "shape": [13, 7], "chunks": [7, 7], "dtype": "|O", "order": "C"}
    text = json.dumps({**array, **codecs, "fill_value": None, "dimension_separator": "/"})
    (home / ".zarray").write_text(text)
    for chunk in "01":
        (home / chunk).mkdir()
        (home / chunk / "0").write_bytes(pickle.dumps(Payload()))


def led_out(path: Path) -> None:
    """A chunk that is a link to the same bytes elsewhere."""
    chunk = path / "image/pooled/c/0/0"
    chunk.rename(path.parent / "y")
    chunk.symlink_to(path.parent / "y")


def folder_led_out(path: Path) -> None:
    """The folder of chunks is a link to the same elsewhere."""
    (path / "image/pooled/c").rename(path.parent / "y")
    (path / "image/pooled/c").symlink_to(path.parent / "y")


def outside(name: str) -> dict[str, Any]:
    """An array of the readout that lies beside the cache, all of its claims consistent."""
    old = "readout/image/proj"

    def rename(claims: dict[str, Any]) -> None:
        claims["arrays"][name] = {**claims["arrays"].pop(old), "name": name}

    def move(path: Path) -> None:
        (path / old).rename(path.parent / "x")
        text = (path / "manifest.jsonl").read_text()
        assert f'"{old}"' in text
        (path / "manifest.jsonl").write_text(text.replace(f'"{old}"', json.dumps(name)))

    return {"header": rename, "journals": move}


# What is forged → how, and what every refusal says: it is about the forged thing, not that something was edited.
FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "attributes are a list": (
        {"files": attributes([])},
        "is not the header of a zarr group .*'list'",
    ),
    "attributes are a number": (
        {"files": attributes(5)},
        "is not the header of a zarr group .*'int'",
    ),
    "attributes are nothing": (
        {"files": attributes(None)},
        "is not the header of a zarr group .*'NoneType'",
    ),
    "the header is a list": (
        {"files": raw("[]")},
        "is not the header of a zarr group .*list indices",
    ),
    "the header is nested deeply": (
        {"files": raw("[" * 100_000)},
        "is not the header of a zarr group .*recursion",
    ),
    "the header holds a huge number": (
        {"files": raw('{"attributes": ' + "9" * 5_000 + "}")},
        "is not the header of a zarr group .*5000 digits",
    ),
    "schema_version is a text": (
        claim(schema_version="3"),
        "schema_version '3', which is no number",
    ),
    "schema_version is NaN": (
        claim(schema_version=float("nan")),
        "schema_version nan, which is no number",
    ),
    "schema_version is nothing": (
        claim(schema_version=None),
        "schema_version None, which is no number",
    ),
    "schema_version is huge": (claim(schema_version=10**400), "has schema 1000.* reads up to 4"),
    "an attribute more": (claim(more=1), "not understood: more: Extra"),
    "batch_size is NaN": (claim(batch_size=float("nan")), "not understood: batch_size: .*finite"),
    "an array outside, by ..": (outside("readout/../../x"), "x.name: String should match"),
    "an array outside, by its absolute name": (outside("/tmp/x"), "x.name: String should match"),
    "an array under another name": (
        {"header": layout_of("text/id", name="text/string")},
        "misnames the array text/id",
    ),
    "chunk is 0": ({"header": layout_of("image/pooled", chunk=0)}, "pooled.chunk: .*equal to 1"),
    "chunk is negative": (
        {"header": layout_of("image/pooled", chunk=-7)},
        "pooled.chunk: .*equal to 1",
    ),
    "a negative shape": (
        {"header": layout_of("image/pooled", shape=[-13, 7])},
        "pooled.shape.0: .*equal to 0",
    ),
    "10**12 rows in one chunk": (
        {"header": layout_of("image/pooled", shape=[10**12, 7], chunk=10**12)},
        "with 98 bytes, but it has 14000000000000",
    ),
    "10**12 chunks": (
        {"header": layout_of("image/pooled", shape=[10**12, 7], chunk=1)},
        "1000000000000 chunks, more than",
    ),
    "a shape whose product overflows": (
        {"header": layout_of("image/pooled", shape=[13, 2**40, 2**40])},
        "more than can be addressed",
    ),
    "an axis more": (
        {"header": layout_of("image/pooled", shape=[13, 7, 1])},
        r"says shape = \[13, 7\], but the header",
    ),
    "shards of a part and a half": (
        {"header": layout_of("image/pooled", inner=2)},
        "shards of 7 rows in parts of 2",
    ),
    "strings along two axes": (
        {"header": layout_of("text/id", shape=[9, 1])},
        "strings along 2 axes",
    ),
    "dtype object": ({"header": layout_of("image/pooled", dtype="object")}, "pooled.dtype: Input"),
    "dtype object in the readout": (
        {"header": layout_of("readout/image/proj", dtype="object")},
        "proj.dtype: Input",
    ),
    "dtype unknown": (
        {"header": layout_of("image/pooled", dtype="nonsense")},
        "pooled.dtype: Input",
    ),
    "another dtype of the same size": (
        {"header": layout_of("image/pooled", dtype="uint16")},
        "says data_type = float16, but the header",
    ),
    "compressed, and is not": (
        {"header": layout_of("image/pooled", compressed=True)},
        "says codecs = .*but the header",
    ),
    "4 thousand million strings": ({"chunks": {"text/id": strings(2**32 - 1, 1)}}, "another count"),
    "a string beyond the end": (
        {"chunks": {"text/id": strings(9, *[2**32 - 1] * 9)}},
        "a string beyond the end",
    ),
    "fewer strings than rows": ({"chunks": {"text/id": strings(1, 2)}}, "another count"),
    "bytes behind the strings": (
        {"chunks": {"text/id": strings(9, *[2] * 9) + b"x"}},
        "bytes behind the last string",
    ),
    "strings that are no UTF-8": (
        {"chunks": {"text/id": strings(9, *[2] * 9).replace(b"ab", b"\xff\xfe")}},
        "can't decode byte 0xff",
    ),
    "offsets that fall": (
        {"chunks": {"text/offsets": numbers(0, 90, 5, 6, 7, 8, 9, 9, 9, 9)}},
        "does not count from 0 to 93",
    ),
    "offsets that are negative": (
        {"chunks": {"text/offsets": numbers(*range(-5, 5))}},
        "does not count from 0 to 93",
    ),
    "offsets beyond the end": (
        {"chunks": {"text/offsets": numbers(*[0] * 9, 2**50)}},
        "does not count from 0 to 93",
    ),
    "tasks that are no JSON": (tasks(b"{"), "not understood .JSONDecodeError"),
    "tasks that are no UTF-8": (tasks(b'{"\xff": 1}'), "is no UTF-8"),
    "tasks of other fields": (tasks(b'{"czsl": {"a": 1}}'), "not understood .KeyError"),
    "tasks nested deeply": (tasks(b"[" * 100_000), "not understood .RecursionError"),
    "a chunk listed twice": (
        {"line": {"array": "image/pooled", "chunk": 0}},
        "with 9 bytes, but it has 98",
    ),
    "a chunk too many": (
        {"line": {"array": "image/pooled", "chunk": 77}},
        "chunk 77 of image/pooled, which this cache does not have",
    ),
    "a chunk before the first": (
        {"line": {"array": "image/pooled", "chunk": -1}},
        "chunk -1 of image/pooled, which this cache does not have",
    ),
    "a chunk of an array outside": (
        {"line": {"array": "../../x", "chunk": 0}},
        "x, which this cache does not have",
    ),
    "a chunk is a pipe": ({"files": piped("image/pooled/c/0/0")}, "0/0 is no regular file"),
    "a chunk is a link out of the folder": ({"files": led_out}, "0/0 is a link"),
    "a folder is a link out of the folder": (
        {"files": folder_led_out},
        "0/0 is no regular file inside",
    ),
    "a chunk of 20 GB": (
        {"files": sparse("image/pooled/c/0/0", 20 << 30)},
        "has 21,474,836,480 bytes, 98 were written",
    ),
    "an array's metadata without end": (
        {"files": linked("image/pooled/zarr.json", "/dev/zero")},
        "pooled/zarr.json is a link",
    ),
    "a journal is a pipe": (
        {"files": piped("quarantine.jsonl")},
        "quarantine.jsonl is no regular file",
    ),
    "a helper's journal is a pipe": (
        {"files": lambda p: os.mkfifo(p / "manifest-x.jsonl")},
        "manifest-x.jsonl is no regular file",
    ),
    "a journal without end": (
        {"files": linked("manifest.jsonl", "/dev/zero")},
        "manifest.jsonl is a link",
    ),
    "a header without end": (
        {"files": linked("zarr.json", "/dev/zero")},
        "a.zarr/zarr.json is a link",
    ),
    "tasks of 20 GB": (
        {"files": sparse("tasks.json", 20 << 30)},
        "tasks.json has 21,474,836,480 bytes, more than",
    ),
    "a manifest of 20 GB": (
        {"files": sparse("manifest.jsonl", 20 << 30)},
        "manifest.jsonl has 21,474,836,480 bytes, more than",
    ),
    "an array of zarr v2 with a pickle": ({"files": version_2}, "pooled.*No such file"),
}


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory is limited as Linux does it"
)
@pytest.mark.parametrize("name", FORGED)
def test_a_forged_cache_is_refused_within_memory_and_time(name: str, fast_path: Path) -> None:
    path, note = fast_path / "a.zarr", fast_path / "note"
    fixed(path)
    how, why = FORGED[name]
    forge(path, **how)
    for item, message in refusals(path, note).items():
        assert re.search(why, message), (item, message)
    assert not (path / "ran").exists()
    count("forged cache", "clear error")


def refusals(path: Path, note: Path) -> dict[str, str]:
    """What a child refuses to read of a cache, and how it says so."""
    pid = in_child(lambda: look(path, note))
    until = time.monotonic() + 30
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:  # waits for something that never comes
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    assert os.waitstatus_to_exitcode(done[1]) == 0
    found = json.loads(note.read_text())
    assert not found["unclear"]
    assert found["refused"]
    return found["refused"]


FRAMES: dict[str, Callable[[bytes], bytes]] = {
    "unpacked to 2 GB": lambda d: d[:4] + (2**31 - 1).to_bytes(4, "little") + d[8:],
    "packed beyond its end": lambda d: d[:12] + (2**31 - 1).to_bytes(4, "little") + d[16:],
    "cut": lambda d: d[:20],
    "a part of a header": lambda d: d[:9],
    "empty": lambda d: b"",
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_compressed_chunk_is_not_believed(name: str, fast_path: Path) -> None:
    path, note = fast_path / "a.zarr", fast_path / "note"
    compressed(path)
    data = (path / "image/pooled/c/0/0").read_bytes()
    forge(path, chunks={"image/pooled": FRAMES[name](data)})
    found = refusals(path, note)
    assert set(found) == {"image/pooled"}
    assert "is no frame of" in found["image/pooled"]
    count("forged cache", "clear error")


def test_a_forged_cache_without_a_change_is_one_that_opens(fast_path: Path) -> None:
    """Whatever is refused above is refused for what was forged."""
    fixed(fast_path / "a.zarr")
    forge(fast_path / "a.zarr")
    assert FeatureCache.open(fast_path / "a.zarr", check="read").verify().ok


PATHS = ("../../../etc/passwd", "/etc/passwd", "..\\..\\x", "C:\\x", "a\x00b", "x/../../y", "")


def with_line(journal: str, line: dict[str, Any]) -> Callable[[Path], object]:
    """One line more in a journal."""

    def add(path: Path) -> None:
        with (path / f"{journal}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    return add


def watched(work: Callable[[], object]) -> int:
    """How a child ends that must open nothing outside."""

    def run() -> None:
        sys.addaudithook(lambda event, a: os._exit(9) if "passwd" in str(a[:1]) else None)
        work()

    return ending(in_child(run))


@pytest.mark.parametrize("name", PATHS)
def test_an_array_of_the_manifest_that_the_header_lacks_is_refused(
    name: str, fast_path: Path
) -> None:
    path = fast_path / "a.zarr"
    fixed(path)
    line = {"array": name, "chunk": 0, "bytes": 9, "crc32c": "0"}
    forge(path, journals=with_line("manifest", line))

    def work() -> None:
        for use in (FeatureCache.open, fixed):
            with pytest.raises(CacheCorrupt, match="which this cache does not have"):
                use(path)

    assert watched(work) == 0
    count("path in a journal", "clear error", times=2)


@pytest.mark.parametrize("name", PATHS)
def test_an_id_in_quarantine_is_shown_and_never_opened(name: str, fast_path: Path) -> None:
    path = fast_path / "a.zarr"
    fixed(path)
    line = {"id": name, "reason": name, "row": 10**30}
    forge(path, journals=with_line("quarantine", line))

    def work() -> None:
        assert name in FeatureCache.open(path).quarantined
        assert FeatureCache.open(path).verify().ok
        assert name in fixed(path).quarantined

    assert watched(work) == 0
    count("path in a journal", "same result", times=3)


def test_a_builder_follows_no_link_and_waits_for_no_pipe(fast_path: Path) -> None:
    """Whoever repeats the build of a stranger's cache writes into that cache, or nowhere."""
    mine = fast_path / "mine"
    for i, (spoil, message) in enumerate(SPOILED):
        path = fast_path / f"{i}.zarr"
        fixed(path)
        mine.write_text("precious")
        spoil(path, mine)

        def work(path: Path = path, message: str = message) -> None:
            signal.alarm(20)
            with pytest.raises(CacheCorrupt, match=message):
                fixed(path)

        assert ending(in_child(work)) == 0, message
        assert mine.read_text() == "precious"
        count("link or pipe for a builder", "clear error")


def link_lock(path: Path, mine: Path) -> None:
    (path / "lock").unlink()
    (path / "lock").symlink_to(mine)


def pipe_lock(path: Path, mine: Path) -> None:
    (path / "lock").unlink()
    os.mkfifo(path / "lock")


def link_folder(path: Path, mine: Path) -> None:
    """Chunks that are missing would be written beside `mine`, over what is called `0`."""
    (path / "image/patches/c").rename(path / "old")
    (path / "image/patches/c").symlink_to(mine.parent)


SPOILED = (
    (link_lock, "lock is no regular file"),
    (pipe_lock, "lock is no regular file"),
    (link_folder, "leads out of"),
)
