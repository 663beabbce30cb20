"""The format: any content survives the way to disk and back, plain zarr reads it, and the page about it is true."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from stand_in import SPEC, dataset

from cache_builder import FeatureCache
from cache_builder import format as fmt
from cache_builder.cache import Contents
from cache_builder.codec import decode_strings, decompress, encode_chunk, encode_strings
from cache_builder.datasets.base import Tasks
from cache_builder.durable import crc32c
from cache_builder.errors import CacheCorrupt, UnknownName
from cache_builder.format import Entry, Layout
from cache_builder.journal import Journal
from cache_builder.metadata import metadata_problem
from cache_builder.place import Folder
from cache_builder.spec import BackboneSpec, CacheSpec, DatasetSpec

Make = Callable[..., FeatureCache]
ROOT = Path(__file__).parent.parent
LAYOUT: dict[str, Any] = {
    "name": "image/x",
    "shape": (8, 4),
    "chunk": 8,
    "dtype": "uint16",
    "dims": (),
}

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


def spec_of(dims: dict[str, int], n_images: int, n_texts: int, storage: str) -> CacheSpec:
    backbone = BackboneSpec(**{**SPEC.model_dump(), "dims": {"context": 9, **dims}})
    return CacheSpec(
        backbone=backbone,
        dataset=DatasetSpec(name="any", digest="d", decode="c", n_images=n_images, n_texts=n_texts),
        streams=("image/patches", "image/pooled", "text/pooled", "text/tokens"),
        storage=storage,
    )


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    image_ids=st.lists(words, unique=True, max_size=9),
    texts=st.lists(words, max_size=6),
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
    storage=st.sampled_from(["fp16", "fp32"]),
    chunk_bytes=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_any_content_survives_the_way_to_disk(
    fast_folder: Path,
    image_ids: list[str],
    texts: list[str],
    sizes: tuple[int, int, int, int],
    storage: str,
    chunk_bytes: int,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    patches, width, text_width, joint = sizes
    dims = {"patches": patches, "image_width": width, "text_width": text_width, "joint": joint}
    lengths = random.integers(0, 9, len(texts))
    spec = spec_of(dims, len(image_ids), len(texts), storage)
    text_ids = [f"{i}\N{SNOWMAN}" for i in range(len(texts))]
    token_ids = random.integers(0, 999, lengths.sum()).astype(np.int32)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    readout = {"a/b": random.random((2, 3), np.float32), "c": np.full((), 5, np.float32)}
    contents = Contents(
        Tasks(),
        {
            "image/id": image_ids,
            "text/id": text_ids,
            "text/string": texts,
            "text/ids": token_ids,
            "text/offsets": bounds,
            **{f"readout/{name}": tensor for name, tensor in readout.items()},
        },
    )
    path = Path(tempfile.mkdtemp(dir=fast_folder))
    cache = FeatureCache.create(path, spec, contents, chunk_bytes=chunk_bytes)
    values = {}
    for stream in spec.streams:
        layout = cache.layout(stream)
        values[stream] = random.standard_normal(layout.shape).astype(layout.dtype)
        for chunk in range(layout.n_chunks):
            start, stop = layout.bounds(chunk)
            full = np.zeros(layout.chunk_shape, layout.dtype)
            full[: stop - start] = values[stream][start:stop]
            cache.write_chunk(stream, chunk, full)
    cache.seal()
    found = FeatureCache.open(path, expected=spec, check="read")
    assert (found.image_ids, found.texts) == (image_ids, texts)
    assert found.text_ids == text_ids
    for stream in ("image/patches", "image/pooled", "text/pooled"):
        np.testing.assert_array_equal(found.read(stream), values[stream])
    tokens, offsets = found.read_ragged("text/tokens")
    np.testing.assert_array_equal(tokens, values["text/tokens"])
    np.testing.assert_array_equal(offsets, bounds)
    np.testing.assert_array_equal(found.read_ragged("text/ids")[0], token_ids)
    assert found.readout().keys() == readout.keys()
    for name, tensor in readout.items():
        np.testing.assert_array_equal(found.readout()[name], tensor, strict=True)
    assert found.verify().ok
    group: Any = zarr.open_group(str(path), mode="r")
    for name in found.header.arrays:
        group[name][...]
    assert list(group["image/id"][:]) == image_ids


@settings(derandomize=True, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=7))
def test_strings_survive(strings: list[str]) -> None:
    assert decode_strings(encode_strings(strings), len(strings)) == strings


@settings(derandomize=True, deadline=None)
@given(st.lists(words, min_size=1, max_size=4), st.data())
def test_damaged_strings_are_refused_or_read_as_what_they_say(
    strings: list[str], draw: st.DataObject
) -> None:
    """A changed byte may spell another text, which the checksum above notices; it never reads beyond the data."""
    data = bytearray(encode_strings(strings))
    at = draw.draw(st.integers(0, len(data) - 1))
    data[at] ^= draw.draw(st.integers(1, 255))
    with suppress(CacheCorrupt):
        assert encode_strings(decode_strings(bytes(data), len(strings))) == bytes(data)


def test_strings_of_another_count_or_length_are_refused() -> None:
    data = encode_strings(["a", "bc"])
    for broken, why in (
        (data[:3], "another count"),
        (b"\xff\xff\xff\x7f", "another count"),
        (data[:-1], "beyond the end"),
        (data + b"x", "behind the last string"),
        (data[:-1] + b"\xff", "invalid start byte"),
    ):
        with pytest.raises(CacheCorrupt, match=why):
            decode_strings(broken, 2 if broken[:1] != b"\xff" else 2**31 - 1)


def test_a_frame_that_lies_about_its_length_is_refused_before_it_is_unpacked() -> None:
    layout = Layout(**{**LAYOUT, "shape": (8, 400), "compressed": True})
    values = (np.arange(3200, dtype=np.uint16) // 100).reshape(8, 400)
    frame = bytes(encode_chunk(layout, values))
    out = np.zeros(values.nbytes, np.uint8)
    decompress(layout, frame, out)
    assert len(frame) < values.nbytes
    assert np.array_equal(out.view(np.uint16).reshape(8, 400), values)
    huge = frame[:4] + (2**31 - 1).to_bytes(4, "little") + frame[8:]
    for broken in (huge, frame[:-1], frame + b"x", b""):
        with pytest.raises(CacheCorrupt, match="is no frame of 6,400 bytes"):
            decompress(layout, broken, out)
    mangled = frame[:16] + bytes(b ^ 0xFF for b in frame[16:])
    with pytest.raises(CacheCorrupt, match=r"cannot be decompressed|holds"):
        decompress(layout, mangled, out)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"shape": (2**40, 2**30)}, "more than can be addressed"),
        ({"shape": (2**40,), "chunk": 1}, "chunks, more than"),
        ({"inner": 3}, "shards of 8 rows in parts of 3"),
        ({"dtype": "string"}, "strings along 2 axes"),
    ],
)
def test_impossible_layouts_are_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Layout(**(LAYOUT | change))


def test_plain_zarr_reads_every_array_with_its_axes_named(make_cache: Make) -> None:
    cache = make_cache(dataset=dataset(texts=["", "a 🐙", "ü"]))
    group: Any = zarr.open_group(str(cache.path), mode="r")
    assert list(group["image/id"][:]) == cache.image_ids
    assert list(group["text/string"][:]) == ["", "a 🐙", "ü"]
    for name, layout in cache.header.arrays.items():
        assert group[name].metadata.dimension_names == (layout.dims or None)
        assert metadata_problem(cache.place, layout) is None
    assert group["image/patches"].metadata.dimension_names == ("image", "patch", "width")
    assert group["text/tokens"].metadata.dimension_names == ("token", "width")
    np.testing.assert_array_equal(group["image/patches"][:], cache.read("image/patches"))
    assert group.attrs["state"] == "sealed"


def test_the_last_chunk_has_full_size_and_zeros_behind_its_rows(make_cache: Make) -> None:
    cache = make_cache()
    layout = cache.layout("image/patches")
    last = layout.n_chunks - 1
    data = np.fromfile(cache.chunks.file("image/patches", last), "<f2").reshape(layout.chunk_shape)
    rows = layout.bounds(last)[1] - layout.bounds(last)[0]
    assert 0 < rows < layout.chunk
    assert not data[rows:].any()
    np.testing.assert_array_equal(data[:rows], cache.read("image/patches")[-rows:])


def test_chunks_of_patches_hold_whole_samples_of_16_to_32_megabytes() -> None:
    dims = {"patches": 196, "image_width": 768, "prefix": 1, "text_width": 512, "joint": 512}
    layouts = fmt.plan(spec_of(dims, 10**6, 5000, "fp16"), {}, {"text": 80_000})
    patches, pooled = layouts["image/patches"], layouts["image/pooled"]
    assert 16e6 <= patches.chunk * patches.row_bytes <= 32e6
    assert pooled.chunk == 16 * patches.chunk
    assert layouts["text/tokens"].chunk * layouts["text/tokens"].row_bytes <= 32e6


def test_a_spec_without_a_dimension_or_of_an_unknown_stream_is_refused() -> None:
    with pytest.raises(
        UnknownName, match=r"'image/patches' needs patches, image_width .* has joint"
    ):
        fmt.row_shape("image/patches", {"joint": 3})
    with pytest.raises(UnknownName, match=r"no stream 'image/depth'.*known: image/pooled"):
        fmt.row_shape("image/depth", {})


def test_a_torn_line_of_a_journal_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "manifest.jsonl"
    line = Entry(array="a", chunk=2, bytes=3, crc32c=crc32c(b"abc")).model_dump_json()
    file.write_text(f"{line}\n{line[:-4]}")
    place = Folder(tmp_path)
    assert [e.chunk for e in Journal(place, "manifest", Entry).lines()] == [2]
    place.heal("manifest.jsonl")
    assert file.read_text() == f"{line}\n"
    place.heal("manifest.jsonl")
    assert file.read_text() == f"{line}\n"


def test_a_journal_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    """A cache that was built again at the same place: nothing of the lines before is kept."""
    file = tmp_path / "manifest.jsonl"
    lines = [Entry(array="a", chunk=i, bytes=3, crc32c=crc32c(b"abc")) for i in range(4)]
    journal = Journal(Folder(tmp_path), "manifest", Entry)
    for now in (lines[:2], lines[:3], lines[2:]):
        file.write_text("".join(line.model_dump_json() + "\n" for line in now))
        assert journal.lines() == now


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789") == "e3069283"  # the check value of RFC 3720, appendix B.4


def test_the_page_reads_a_cache_with_zarr_alone(make_cache: Make) -> None:
    page = (ROOT / "docs/cache-format.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (block,) = [b for b in blocks if "import zarr" in b]
    assert len([line for line in block.splitlines() if line.strip()]) == 5
    assert "cache_builder" not in block
    cache = make_cache("caches/demo.zarr")
    code = f"{block}\nprint(patches.shape, len(ids), ids[0], first.shape)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cache.path.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0].startswith(f"(13, 5, 3) 13 {cache.image_ids[0]} (")


def test_the_page_names_every_array_error_and_attribute() -> None:
    page = (ROOT / "docs/cache-format.md").read_text()
    streams = {f"{s}/{k}" for s, kinds in fmt.OFFERED.items() for k in kinds if k != "block"}
    streams |= {"image/block_<k>", "image/view_<view>/…"}
    small = {"image/id", "image/offsets", "image/grid", "crop/offsets", "crop/box"}
    small |= {f"text/{name}" for name in ("id", "string", "offsets", "ids", "vocabulary")}
    small |= {f"word/{name}" for name in ("id", "parts", "string", "offsets", "ids")}
    fields = {"schema_version", "fingerprint", "batch_size", "tasks_sha256", "digest", "arrays"}
    errors = {"CacheTooOld", "CacheTooNew", "CacheNotFound", "CacheIncomplete", "CacheMismatch"}
    for name in (
        streams
        | small
        | fields
        | errors
        | {"manifest.jsonl", "quarantine.jsonl", "tasks.json", "lock"}
    ):
        assert f"`{name}`" in page, name


def test_a_line_that_could_not_be_written_is_taken_back(tmp_path: Path) -> None:
    """A full disk: what follows, when there is room again, must not stand behind half a line."""
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom cache_builder.place import Folder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "place = Folder(Path(sys.argv[1]))\nplace.append('j.jsonl', b'first')\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9, hard))\n"
        "try: place.append('j.jsonl', b'second')\nexcept OSError: print('refused')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))\nplace.append('j.jsonl', b'third')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "refused\n", done.stderr
    assert (tmp_path / "j.jsonl").read_bytes() == b"first\nthird\n"
