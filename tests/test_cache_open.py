"""Opening and verifying: a cache is refused unless it is whole, of a known version, intact, and what was asked for."""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_in import StandIn, dataset

from cache_builder import FeatureCache
from cache_builder.cli import add_verbs
from cache_builder.errors import (
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    CacheMismatch,
    CacheNotFound,
    CacheTooNew,
    CacheTooOld,
    UnknownIds,
    UnknownName,
)
from cache_builder.header import header_checksum
from cache_builder.spec import CacheSpec, DatasetSpec, Spec

Make = Callable[..., FeatureCache]


def edit_header(
    cache: FeatureCache, change: Callable[[dict[str, Any]], None], *, honest: bool = False
) -> None:
    """Change attributes; an honest change mends their checksum."""
    file = cache.path / "zarr.json"
    root = json.loads(file.read_text())
    change(root["attributes"])
    if honest:
        del root["attributes"]["crc32c"]
        root["attributes"]["crc32c"] = header_checksum(root["attributes"])
    file.write_text(json.dumps(root))


def leaves(spec: Spec, prefix: str = "") -> list[tuple[str, ...]]:
    """The path of every field, entries of dictionaries included."""
    found: list[tuple[str, ...]] = []
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        if isinstance(value, Spec):
            found += [(name, *rest) for rest in leaves(value)]
        elif isinstance(value, dict):
            found += [(name, key) for key in value]
        else:
            found.append((name,))
    return found


def flipped(spec: CacheSpec, path: tuple[str, ...]) -> CacheSpec:
    raw = spec.model_dump(mode="json")
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]]
    inner[path[-1]] = (
        old + 1
        if isinstance(old, int)
        else (old[:-1] or [[1, 1, 0]])
        if isinstance(old, list)
        else f"{old}?"
    )
    return CacheSpec.model_validate(raw)


def test_a_missing_cache_is_not_found_and_says_how_to_make_one(tmp_path: Path) -> None:
    for path in (tmp_path / "none.zarr", tmp_path):
        with pytest.raises(CacheNotFound, match=r"no feature cache at .* headstart build") as info:
            FeatureCache.open(path)
        assert isinstance(info.value, FileNotFoundError)


def test_a_newer_schema_is_refused_before_anything_else(make_cache: Make) -> None:
    cache = make_cache()
    edit_header(cache, lambda a: a.update(schema_version=5, wonders=True, state="odd"))
    with pytest.raises(CacheTooNew, match=r"schema 5, this headstart reads up to 4"):
        FeatureCache.open(cache.path)


def test_an_unfinished_cache_says_how_far_it_is_and_how_to_go_on(make_cache: Make) -> None:
    cache = make_cache()
    lines = (cache.path / "manifest.jsonl").read_text().splitlines(keepends=True)
    (cache.path / "manifest.jsonl").write_text("".join(lines[:-3]))
    total = len(lines)
    with pytest.raises(
        CacheIncomplete,
        match=rf"{total - 3} of {total} chunks .* headstart build --backbone stand_in:none "
        r"--dataset stand_in --root nowhere --streams image/patches .* --store fp16 --out ",
    ):
        FeatureCache.open(cache.path)
    assert len(FeatureCache.open(cache.path, allow_building=True).pending()) == 3


def test_the_command_in_messages_says_again_what_was_asked(make_cache: Make) -> None:
    backbone = StandIn()
    compute = "bfloat16, nn.MultiheadAttention"
    backbone.spec = backbone.spec.model_copy(update={"compute": compute})
    data = replace(dataset(), root="my photos", options={"world": "open", "scale": 0.5})
    cache = make_cache(
        "a cache.zarr",
        dataset=data,
        backbone=backbone,
        order_seed=7,
        storage="fp32",
        backbone_name="stand_in:../my models/x@a file",
    )
    words = shlex.split(FeatureCache.open(cache.path).chunks.command)
    parser = argparse.ArgumentParser()
    add_verbs(parser.add_subparsers())
    assert words.pop(0) == "headstart"
    args = parser.parse_args(words)
    assert args.backbone == "stand_in:../my models/x@a file"
    assert (args.dataset, args.root) == ("stand_in", Path("my photos"))
    assert args.set == ['world="open"', "scale=0.5"]
    assert (args.dtype, args.order_seed, args.store) == ("bfloat16", 7, "fp32")
    assert (tuple(args.streams), args.out) == (cache.streams, cache.path)
    unnamed = make_cache("b.zarr", dataset=data, backbone=backbone, order_seed=7, storage="fp32")
    assert unnamed.digest() == cache.digest()


EXAMPLE = CacheSpec(
    backbone=StandIn().spec,
    dataset=DatasetSpec(name="n", digest="d", decode="c", n_images=1, n_texts=1),
    streams=("image/pooled", "text/pooled"),
)


NAME = ("backbone", "checkpoint")
"""What a backbone is called cannot change a number: the only field that is not a claim."""


def test_a_backbone_called_otherwise_is_no_mismatch(make_cache: Make) -> None:
    cache = make_cache()
    renamed = flipped(cache.spec, NAME)
    assert renamed != cache.spec
    assert FeatureCache.open(cache.path, expected=renamed).fingerprint == renamed.fingerprint()


@pytest.mark.parametrize("path", [p for p in leaves(EXAMPLE) if p != NAME], ids=".".join)
def test_any_single_differing_field_is_refused_by_name(
    make_cache: Make, path: tuple[str, ...]
) -> None:
    cache = make_cache()
    expected = flipped(cache.spec, path)
    assert FeatureCache.open(cache.path, expected=cache.spec).fingerprint == cache.fingerprint
    with pytest.raises(CacheMismatch) as info:
        FeatureCache.open(cache.path, expected=expected)
    assert f"{'.'.join(path)}: expected " in str(info.value)
    assert str(info.value).count(": expected ") == 1


def test_an_edited_header_is_refused(make_cache: Make) -> None:
    cache = make_cache()
    edit_header(cache, lambda a: a["spec"].update(order_seed=5))
    with pytest.raises(CacheCorrupt, match="was edited or damaged"):
        FeatureCache.open(cache.path)
    edit_header(cache, lambda a: a.update(colour="red"), honest=True)
    with pytest.raises(CacheCorrupt, match="not understood: colour"):
        FeatureCache.open(cache.path)
    edit_header(cache, lambda a: a.pop("colour"), honest=True)
    with pytest.raises(CacheCorrupt, match=r"was edited: its fields have the fingerprint"):
        FeatureCache.open(cache.path)
    edit_header(cache, lambda a: a.update(colour="blue"), honest=True)
    with pytest.raises(CacheCorrupt, match="not understood: colour"):
        FeatureCache.open(cache.path)
    (cache.path / "zarr.json").write_text('{"attrib')
    with pytest.raises(CacheCorrupt, match="not the header of a zarr group"):
        FeatureCache.open(cache.path)


def test_unknown_ids_are_named_and_counted(make_cache: Make) -> None:
    cache = make_cache()
    with pytest.raises(
        UnknownIds, match=r"4 of the 5 .*\(4 unknown, 0 quarantined\): 'a', 'b', 'c', …"
    ):
        cache.rows("text", ["a", "t1", "b", "c", "d", "a"])
    assert str(UnknownIds("plain")) == "plain"
    np.testing.assert_array_equal(cache.rows("text", ["t4", "t0", "t4"]), [4, 0, 4])


def test_a_stream_is_read_as_what_it_is(make_cache: Make) -> None:
    cache = make_cache()
    with pytest.raises(UnknownName, match="use read_ragged"):
        cache.read("text/tokens")
    with pytest.raises(UnknownName, match="use read"):
        cache.read_ragged("image/pooled")
    with pytest.raises(IndexError, match=r"rows 0 … 12, asked for 4 … 13"):
        cache.read("image/pooled", np.array([4, 13]))
    with pytest.raises(IndexError, match=r"numbers, in one axis, not int64\[1, 2\]"):
        cache.read("image/pooled", np.array([[4, 12]]))
    assert cache.shape("text/tokens") == (11, 4)
    assert cache.shape("image/patches") == (5, 3)


def test_an_unfinished_cache_is_read_as_far_as_it_goes_and_not_sealed(make_cache: Make) -> None:
    """The file of the chunk is there: only what the manifest lists is finished."""
    whole = make_cache()
    expected = whole.read("image/patches")
    whole.unseal()
    manifest = whole.path / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    kept = [li for li in lines if not li.startswith(b'{"array":"image/patches","chunk":1,')]
    assert len(kept) == len(lines) - 1
    manifest.write_bytes(b"".join(kept))
    cache = FeatureCache.open(whole.path, allow_building=True)
    first = np.arange(cache.layout("image/patches").chunk)
    np.testing.assert_array_equal(cache.read("image/patches", first), expected[first])
    with pytest.raises(CacheIncomplete, match=r"chunk 1 of image/patches is missing .* repeat the"):
        cache.read("image/patches")
    assert cache.pending() == [("image/patches", 1)]
    with pytest.raises(CacheIncomplete, match=r"1 chunks of .* the first is chunk 1 of image/patc"):
        cache.seal()
    problems = "; ".join(cache.verify().problems)
    assert "chunk 1 of image/patches was never finished" in problems
    assert "was never sealed; repeat the build: headstart build" in problems
    assert cache.state == "building"


def test_metadata_that_is_no_object_is_named(make_cache: Make) -> None:
    cache = make_cache()
    (cache.path / "image/patches/zarr.json").write_text("[]")
    with pytest.raises(CacheCorrupt, match=r"image/patches/zarr\.json is no object; restore"):
        cache.read("image/patches")
    assert any("zarr.json is no object" in problem for problem in cache.verify().problems)


def test_a_flipped_byte_in_any_chunk_is_found(make_cache: Make) -> None:
    cache = make_cache()
    assert cache.verify().ok
    for (array, chunk), entry in cache.chunks.manifest.items():
        file = cache.chunks.file(array, chunk)
        good = file.read_bytes()
        at = (chunk * 7 + 3) % len(good)
        file.write_bytes(good[:at] + bytes([good[at] ^ 16]) + good[at + 1 :])
        (problem,) = cache.verify().problems
        assert f"chunk {chunk} of {array} is damaged" in problem
        assert entry.crc32c in problem
        checking = FeatureCache.open(cache.path, check="read")
        with pytest.raises(CacheCorrupt, match=f"chunk {chunk} of {array} is damaged"):
            read_everything(checking)
        file.write_bytes(good)
    assert cache.verify().ok
    read_everything(FeatureCache.open(cache.path, check="read"))


def read_everything(cache: FeatureCache) -> None:
    _ = cache.image_ids, cache.text_ids, cache.texts, cache.vocabulary(), cache.readout()
    for stream in ("text/ids", "text/tokens"):
        cache.read_ragged(stream)
    for stream in cache.streams:
        if stream != "text/tokens":
            cache.read(stream)


def test_a_flipped_byte_in_a_small_array_is_found_without_asking(make_cache: Make) -> None:
    cache = make_cache()
    file = cache.chunks.file("text/offsets", 0)
    data = bytearray(file.read_bytes())
    data[8] ^= 1
    file.write_bytes(data)
    with pytest.raises(CacheCorrupt, match="text/offsets is damaged"):
        FeatureCache.open(cache.path).read_ragged("text/ids")


def test_a_cut_chunk_is_found_at_read_even_without_checksums(make_cache: Make) -> None:
    cache = make_cache()
    file = cache.chunks.file("image/patches", 1)
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(
        CacheCorrupt, match=r"chunk 1 of image/patches has 88 bytes, 90 were written"
    ):
        FeatureCache.open(cache.path).read("image/patches")
    assert len(cache.verify().problems) == 1


def test_a_deleted_chunk_is_an_error_never_zeros(make_cache: Make) -> None:
    cache = make_cache()
    cache.chunks.file("text/tokens", 3).unlink()
    with pytest.raises(CacheIncomplete, match="chunk 3 of text/tokens is missing"):
        FeatureCache.open(cache.path).read_ragged("text/tokens")
    assert "chunk 3 of text/tokens is missing" in cache.verify().problems[0]


def test_a_torn_manifest_line_is_no_line_and_is_healed(make_cache: Make) -> None:
    cache = make_cache()
    manifest = cache.path / "manifest.jsonl"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole[:-9])
    with pytest.raises(CacheIncomplete):
        FeatureCache.open(cache.path)
    assert make_cache().digest() == cache.digest()
    assert manifest.read_bytes() == whole
    manifest.write_bytes(whole[:40] + b"#" + whole[41:])
    with pytest.raises(CacheCorrupt, match=r"manifest\.jsonl has a line that is not"):
        FeatureCache.open(cache.path)


@pytest.mark.parametrize("journal", ["manifest.jsonl", "quarantine.jsonl"])
def test_a_lost_journal_is_named(make_cache: Make, journal: str) -> None:
    cache = make_cache()
    (cache.path / journal).unlink()
    with pytest.raises(
        CacheCorrupt, match=rf"{journal} is (gone|not the file that was sealed); restore it"
    ):
        FeatureCache.open(cache.path).verify()


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        ("tasks.json", b"red", b"rad", "tasks.json is not the file that was written"),
        ("image/patches/zarr.json", b"float16", b"float32", "zarr.json says data_type"),
        ("text/tokens/zarr.json", b"little", b"big", "zarr.json says codecs"),
        (
            "quarantine.jsonl",
            b"",
            b'{"id":"i1","reason":"r","row":1}\n',
            "the file that was sealed",
        ),
    ],
)
def test_verify_looks_at_all_other_files_too(
    make_cache: Make, file: str, before: bytes, after: bytes, message: str
) -> None:
    cache = make_cache()
    data = (cache.path / file).read_bytes()
    (cache.path / file).write_bytes(data.replace(before, after) if before else after)
    problems = FeatureCache.open(cache.path, allow_building=True).verify().problems
    assert any(message in problem for problem in problems)
    assert len(problems) == (2 if file == "quarantine.jsonl" else 1)  # the digest too
    if file == "quarantine.jsonl":
        with pytest.raises(CacheCorrupt, match=message):
            FeatureCache.open(cache.path)


def test_edited_or_lost_tasks_are_never_used(make_cache: Make) -> None:
    cache = make_cache()
    file = cache.path / "tasks.json"
    file.write_bytes(file.read_bytes().replace(b"red", b"rad"))
    with pytest.raises(
        CacheCorrupt, match=r"tasks\.json is not the file that was written; restore"
    ):
        _ = FeatureCache.open(cache.path).tasks
    file.unlink()
    with pytest.raises(CacheCorrupt, match=r"tasks\.json is gone; restore"):
        _ = FeatureCache.open(cache.path).tasks


def test_other_pixels_under_the_same_names_change_the_digest_not_the_fingerprint(
    make_cache: Make,
) -> None:
    data = dataset()
    swapped = tuple(
        replace(r, open=o.open) for r, o in zip(data.images, reversed(data.images), strict=True)
    )
    one, other = make_cache("a.zarr"), make_cache("b.zarr", dataset=replace(data, images=swapped))
    assert one.fingerprint == other.fingerprint
    assert one.digest() != other.digest()


def test_the_digest_tells_contents_apart_and_places_not(make_cache: Make) -> None:
    cache = make_cache()
    digest = cache.digest()
    moved = cache.path.rename(cache.path.with_name("moved.zarr"))
    assert FeatureCache.open(moved).digest() == digest == cache.header.digest
    assert make_cache(dataset=dataset(texts=["other", "words"])).digest() != cache.digest()


def test_opening_a_cache_imports_no_torch(make_cache: Make) -> None:
    code = (
        "import sys\nfrom cache_builder import FeatureCache\nc = FeatureCache.open(sys.argv[1])\n"
        "c.read('image/patches'), c.tasks, c.verify()\n"
        "assert not {'torch', 'open_clip', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code, str(make_cache().path)], check=True, cwd=root)


def test_build_stays_a_function_whatever_is_imported_first() -> None:
    code = (
        "import cache_builder.build\nfrom cache_builder.request import cache_spec\n"
        "from cache_builder import build\nassert build.__name__ == 'build' and callable(build)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_every_error_is_a_cache_error() -> None:
    for kind in (CacheCorrupt, CacheIncomplete, CacheMismatch, CacheNotFound, UnknownIds):
        assert issubclass(kind, CacheError)
    for kind in (CacheTooNew, CacheTooOld):
        assert issubclass(kind, CacheError)
