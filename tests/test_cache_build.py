"""Building: what is stored, at once or in pieces, bad pictures, bad numbers, and one builder at a time."""

import errno
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stand_in import StandIn, dataset
from torch import Tensor

from cache_builder import FeatureCache, build
from cache_builder.backbones import clip
from cache_builder.datasets.base import Dataset
from cache_builder.errors import (
    BadInput,
    BadOutput,
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    CacheLocked,
    CacheMismatch,
    CacheNotFound,
    UnknownName,
)
from cache_builder.images import BadImage, UnsafeName
from cache_builder.lock import locked
from cache_builder.place import Folder
from cache_builder.request import cache_spec

Make = Callable[..., FeatureCache]


class Stop(Exception):
    """Stands for whatever ends a build early."""


def stopping_after(n: int) -> StandIn:
    """A backbone that fails in its n-th batch."""
    backbone = StandIn()

    def change(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(backbone.encoded) > n:
            raise Stop
        return outputs

    backbone.change = change
    return backbone


def test_every_stream_holds_what_the_backbone_gives_for_that_id(make_cache: Make) -> None:
    data, backbone = dataset(), StandIn()
    cache = make_cache(storage="fp32")
    pixels = torch.stack([backbone.preprocess(r.open()) for r in data.images])
    rows = cache.rows("image", [r.id for r in data.images])
    for name, values in backbone.encode_images(pixels).items():
        np.testing.assert_allclose(cache.read(f"image/{name}", rows), values.numpy(), rtol=1e-6)
    ids = backbone.tokenize([t.text for t in data.texts])
    texts = backbone.encode_texts(ids)
    np.testing.assert_allclose(cache.read("text/pooled"), texts["pooled"].numpy(), rtol=1e-6)
    real = torch.arange(ids.shape[1]) < texts["length"][:, None]
    for stream, expected in (("text/tokens", texts["tokens"][real]), ("text/ids", ids[real])):
        values, offsets = cache.read_ragged(stream)
        np.testing.assert_array_equal(values, expected.numpy())
        np.testing.assert_array_equal(np.diff(offsets), texts["length"].numpy())
    assert cache.texts == [t.text for t in data.texts]
    assert cache.tasks == data.tasks


def test_rows_are_a_permutation_that_the_seed_decides(make_cache: Make) -> None:
    ids = [r.id for r in dataset().images]
    first, again, other = (make_cache(f"{i}.zarr", order_seed=s) for i, s in enumerate((0, 0, 1)))
    assert sorted(first.image_ids) == sorted(ids) != first.image_ids
    assert first.image_ids == again.image_ids != other.image_ids
    assert first.digest() == again.digest() != other.digest()


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 6])
def test_building_in_two_pieces_is_building_at_once(make_cache: Make, after: int) -> None:
    whole = make_cache("whole.zarr")
    with pytest.raises(Stop):
        make_cache("pieces.zarr", backbone=stopping_after(after))
    assert make_cache("pieces.zarr").digest() == whole.digest()


def test_a_resumed_build_encodes_only_what_is_missing(make_cache: Make) -> None:
    with pytest.raises(Stop):
        make_cache(backbone=stopping_after(6))
    rest = StandIn()
    make_cache(backbone=rest)
    assert 0 < len(rest.encoded) < 7  # of 3 text and 4 image batches


def test_a_finished_cache_is_left_alone(make_cache: Make, caplog: pytest.LogCaptureFixture) -> None:
    before = make_cache().digest()
    untouched = StandIn()
    with caplog.at_level(logging.INFO):
        assert make_cache(backbone=untouched).digest() == before
    assert untouched.encoded == []
    assert "nothing to do" in caplog.text


def test_a_lost_chunk_of_a_finished_cache_is_filled_in_again(make_cache: Make) -> None:
    cache = make_cache()
    before = cache.digest()
    cache.chunks.file("image/patches", 2).unlink()
    with pytest.raises(CacheIncomplete, match=r"chunk 2 of image/patches .* repeat the build"):
        cache.read("image/patches")
    assert make_cache().digest() == before
    assert not FeatureCache.open(cache.path).verify().problems


def test_a_cut_chunk_of_a_finished_cache_is_written_again(make_cache: Make) -> None:
    cache = make_cache()
    file = cache.chunks.file("image/patches", 2)
    file.write_bytes(file.read_bytes()[:-2])
    assert make_cache().digest() == cache.digest()
    assert FeatureCache.open(cache.path).verify().ok


def test_a_cache_that_lost_its_header_is_not_built_over(make_cache: Make) -> None:
    cache = make_cache()
    header = (cache.path / "zarr.json").read_bytes()
    (cache.path / "zarr.json").unlink()
    before = {p: p.stat().st_size for p in cache.path.rglob("*") if p.name != "lock"}
    for use in (make_cache, lambda: FeatureCache.open(cache.path)):
        with pytest.raises(CacheCorrupt, match=r"header .*zarr\.json is lost.* restore .* remove"):
            use()
    assert {p: p.stat().st_size for p in cache.path.rglob("*") if p.name != "lock"} == before
    (cache.path / "zarr.json").write_bytes(header)
    assert make_cache().digest() == cache.digest()


def test_a_copy_without_the_lock_is_a_cache_to_the_builder_too(make_cache: Make) -> None:
    cache = make_cache()
    (cache.path / "lock").unlink()
    cache.chunks.file("image/patches", 1).unlink()
    assert make_cache().digest() == cache.digest()
    assert FeatureCache.open(cache.path).verify().ok


def test_a_lost_small_array_needs_a_new_cache(make_cache: Make) -> None:
    make_cache().chunks.file("text/string", 0).unlink()
    with pytest.raises(CacheIncomplete, match=r"text/string .*remove the cache"):
        make_cache()


def test_a_resume_keeps_the_recorded_batches_and_says_so(
    make_cache: Make, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_cache("whole.zarr")
    with pytest.raises(Stop):
        make_cache(backbone=stopping_after(5))
    rest = StandIn()
    assert make_cache(backbone=rest, batch_size=5).digest() == whole.digest()
    assert max(rest.encoded) == 4
    assert "batches of 4 and keeps them, not 5" in caplog.text


def test_only_the_streams_asked_for_are_stored(make_cache: Make) -> None:
    cache = make_cache(streams=["text/pooled", "image/pooled"])
    assert cache.streams == ("image/pooled", "text/pooled")
    assert not (cache.path / "image/patches").exists()
    assert not (cache.path / "text/offsets").exists()
    with pytest.raises(UnknownName, match=r"image/patches.*image/pooled, text/pooled"):
        cache.read("image/patches")


def test_a_stream_that_is_not_offered_is_refused(make_cache: Make) -> None:
    with pytest.raises(UnknownName, match=r"stand_in does not offer .*image/depth; it offers"):
        make_cache(streams=["image/depth"])


def test_a_data_set_without_images_or_texts_builds(make_cache: Make) -> None:
    words = make_cache("words.zarr", dataset=dataset(0, 3))
    pictures = make_cache("pictures.zarr", dataset=dataset(5, 2, texts=()))
    assert words.read("image/patches").shape == (0, 5, 3)
    assert words.read_ragged("text/tokens")[1].shape == (4,)
    assert words.verify().ok
    assert pictures.verify().ok


def test_a_picture_that_cannot_be_used_is_quarantined(make_cache: Make) -> None:
    cache, clean = make_cache(dataset=dataset(bad=(3, 8))), make_cache("clean.zarr")
    assert cache.quarantined == {f"i{i}": f"picture {i} is cut off" for i in (3, 8)}
    good = [i for i in cache.image_ids if i not in cache.quarantined]
    bad = [cache.image_ids.index(i) for i in cache.quarantined]
    for stream in ("image/pooled", "image/patches", "image/prefix"):
        assert np.isnan(cache.read(stream, np.array(bad))).all()
        np.testing.assert_array_equal(
            cache.read(stream, cache.rows("image", good)),
            clean.read(stream, clean.rows("image", good)),
        )
    with pytest.raises(KeyError, match=r"'i8' \(picture 8 is cut off\)"):
        cache.rows("image", ["i1", "i8"])
    assert cache.verify().ok


def failing(image: int, error: Exception) -> Dataset:
    """Pictures of which one raises `error` when it is opened."""
    data = dataset()

    def fail() -> Image.Image:
        raise error

    images = [replace(r, open=fail) if r.id == f"i{image}" else r for r in data.images]
    return replace(data, images=tuple(images))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO])
def test_a_failing_machine_stops_the_build_and_condemns_no_picture(
    make_cache: Make, fast_path: Path, number: int
) -> None:
    with pytest.raises(CacheError, match=r"image 'i3' could not be read \(.*repeat") as info:
        make_cache(dataset=failing(3, OSError(number, os.strerror(number))))
    assert os.strerror(number) in str(info.value)
    assert FeatureCache.open(fast_path / "demo.zarr", allow_building=True).quarantined == {}
    assert make_cache().digest() == make_cache("whole.zarr").digest()


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(n, "no") for n in (errno.ENOENT, errno.EISDIR, errno.EACCES, errno.ELOOP)),
        OSError("image file is truncated"),
        BadImage("not a picture"),
        UnsafeName("leads out"),
    ],
    ids=repr,
)
def test_what_is_wrong_with_the_file_itself_condemns_it(make_cache: Make, error: Exception) -> None:
    assert make_cache(dataset=failing(3, error)).quarantined == {"i3": str(error)}


def test_a_picture_repaired_between_two_halves_stays_in_quarantine(make_cache: Make) -> None:
    first = int(np.random.default_rng(0).permutation(13)[1])  # row 1, in the first batch
    broken = dataset(bad=(first,))
    whole = make_cache("whole.zarr", dataset=broken)
    with pytest.raises(Stop):
        make_cache(dataset=broken, backbone=stopping_after(4))  # 3 batches of texts, 1 of images
    cache = make_cache(dataset=dataset())
    assert list(cache.quarantined) == [f"i{first}"]
    for stream in ("image/pooled", "image/patches", "image/prefix"):
        assert np.isnan(cache.read(stream, np.array([1]))).all(), stream
    assert cache.digest() == whole.digest()


def test_a_chunk_is_synced_then_named_then_listed(
    make_cache: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache()
    manifest, folder = cache.path / "manifest.jsonl", cache.path / "image/pooled/c/0"
    values = np.frombuffer((folder / "0").read_bytes(), "<f2").reshape(
        cache.layout("image/pooled").chunk_shape
    )
    listed = len(manifest.read_bytes().splitlines())
    events: list[tuple[str, str, int]] = []
    real_sync, real_rename = os.fsync, os.rename

    def note(what: str, name: str) -> None:
        events.append((what, name, len(manifest.read_bytes().splitlines()) - listed))

    def sync(handle: int) -> None:
        places = (manifest, folder, *folder.iterdir())
        (place,) = [p for p in places if os.path.samestat(p.stat(), os.fstat(handle))]
        note("fsync", re.sub(r"\.\w{8}\.", ".….", place.name))
        if place.suffix == ".part":
            assert place.read_bytes() == values.tobytes()  # nothing is left in a buffer
        real_sync(handle)

    def rename(old: Path, new: Path) -> None:
        note("rename", Path(new).name)
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    cache.write_chunk("image/pooled", 0, values)
    assert events == [
        ("fsync", "0.….part", 0),
        ("rename", "0", 0),
        ("fsync", "0", 0),  # the folder, whose name is 0 too
        ("fsync", "manifest.jsonl", 1),
    ]


def test_a_whole_batch_may_be_quarantined(make_cache: Make) -> None:
    order = np.random.default_rng(0).permutation(13)
    cache = make_cache(dataset=dataset(bad=[int(i) for i in order[4:8]]))
    assert len(cache.quarantined) == 4
    assert np.isnan(cache.read("image/pooled")[4:8]).all()
    assert not np.isnan(cache.read("image/pooled")[8:]).any()


def test_strict_fails_at_the_first_bad_picture(make_cache: Make) -> None:
    with pytest.raises(BadInput, match=r"image 'i3' cannot be used: picture 3 is cut off"):
        make_cache(dataset=dataset(bad=(3,)), strict=True)
    cache = make_cache(dataset=dataset(bad=(3,)))
    assert list(cache.quarantined) == ["i3"]
    with pytest.raises(BadInput, match=r"'i3'.*quarantine since an earlier build"):
        make_cache(dataset=dataset(bad=(3,)), strict=True)


def test_a_data_set_without_one_usable_picture_is_refused(make_cache: Make) -> None:
    with pytest.raises(BadInput, match="not one of the 3 images can be used"):
        make_cache(dataset=dataset(3, 2, bad=(0, 1, 2)))


def test_ids_must_be_unique(make_cache: Make) -> None:
    data = dataset(3, 2)
    twice = type(data)(
        name=data.name,
        images=(*data.images, data.images[1]),
        texts=data.texts,
        tasks=data.tasks,
        decode="",
    )
    with pytest.raises(CacheError, match=r"1 image ids of stand_in occur more than once.*'i1'"):
        make_cache(dataset=twice)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (70000.0, r"image/patches has values from .* to 70000, beyond fp16.*--store fp32"),
        (-7e4, r"image/patches has values from -70000 to .*--store fp32"),
        (float("inf"), r"image/patches: the backbone returned NaN or infinity"),
        (float("nan"), r"image/patches: the backbone returned NaN or infinity"),
    ],
)
def test_numbers_that_cannot_be_stored_are_refused(
    make_cache: Make, value: float, message: str
) -> None:
    def change(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "patches" in outputs:
            outputs["patches"][-1, 2, 1] = value
        return outputs

    with pytest.raises(BadOutput, match=message):
        make_cache(backbone=StandIn(change))


def test_values_beyond_fp16_fit_an_fp32_cache(make_cache: Make) -> None:
    backbone = StandIn(lambda out: {k: v * 1e6 if k == "pooled" else v for k, v in out.items()})
    assert make_cache(backbone=backbone, storage="fp32").read("image/pooled").max() > 1e5


def test_an_output_of_another_shape_is_refused(make_cache: Make) -> None:
    backbone = StandIn(lambda out: {k: v[:, :3] if k == "patches" else v for k, v in out.items()})
    with pytest.raises(BadOutput, match=r"image/patches.*\(4, 3, 3\).*promises \(4, 5, 3\)"):
        make_cache(backbone=backbone)


def test_a_cache_of_something_else_is_not_built_into(make_cache: Make) -> None:
    make_cache()
    with pytest.raises(CacheMismatch, match=r"storage: expected 'fp32', found 'fp16'"):
        make_cache(storage="fp32")
    with pytest.raises(CacheMismatch, match=r"dataset.n_images: expected 12, found 13"):
        make_cache(dataset=dataset(12))


def test_a_folder_of_other_things_is_not_touched(make_cache: Make, fast_path: Path) -> None:
    (fast_path / "demo.zarr").mkdir()
    keep = fast_path / "demo.zarr" / "photo.jpg"
    keep.write_bytes(b"mine")
    with pytest.raises(CacheNotFound, match=r"demo\.zarr exists and is not a feature cache"):
        make_cache()
    assert [p.name for p in keep.parent.iterdir()] == ["photo.jpg"]


def test_a_second_builder_is_refused_by_name(make_cache: Make, fast_path: Path) -> None:
    with (
        locked(Folder(fast_path / "demo.zarr")),
        pytest.raises(CacheLocked, match=rf"pid {os.getpid()} on "),
    ):
        make_cache()
    assert make_cache().state == "sealed"  # the lock's file stays, and is harmless


def test_a_builder_in_another_process_is_refused_until_it_dies(
    make_cache: Make, fast_path: Path
) -> None:
    code = (
        "import sys, pathlib\nfrom cache_builder.lock import locked\nfrom cache_builder.place import at\n"
        "with locked(at(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(fast_path / "demo.zarr")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CacheLocked, match=f"pid {holder.pid} on "):
            make_cache()
        holder.kill()
    assert make_cache().state == "sealed"


def test_control_c_keeps_what_is_finished(make_cache: Make, fast_path: Path) -> None:
    backbone = stopping_after(5)
    change = backbone.change

    def interrupted(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        try:
            return change(outputs)
        except Stop:
            raise KeyboardInterrupt from None

    backbone.change = interrupted
    with pytest.raises(KeyboardInterrupt):
        make_cache(backbone=backbone)
    half = FeatureCache.open(fast_path / "demo.zarr", allow_building=True)
    assert ("image/patches", 0) in half.chunks.manifest
    assert half.pending()
    assert make_cache().digest() == make_cache("whole.zarr").digest()


def test_threads_and_bars_do_not_change_the_content(make_cache: Make) -> None:
    one, five = make_cache("a.zarr", workers=1), make_cache("b.zarr", workers=5)
    assert one.digest() == five.digest()
    with pytest.raises(CacheError, match="batch_size 0"):
        make_cache("c.zarr", batch_size=0)


def test_clip_s_streams_are_stored_bit_for_bit(fast_path: Path) -> None:
    backbone, data = clip.tiny(), dataset(5, 3)
    cache = build(data, backbone, fast_path / "c", batch_size=3, storage="fp32", progress=False)
    assert cache.spec == cache_spec(data, backbone, storage="fp32")
    by_id = {r.id: r for r in data.images}
    pixels = torch.stack([backbone.preprocess(by_id[i].open()) for i in cache.image_ids])
    with torch.inference_mode():
        parts = [backbone.encode_images(pixels[s]) for s in (slice(0, 3), slice(3, 5))]
        texts = backbone.encode_texts(backbone.tokenize(cache.texts))
    for name in ("pooled", "patches", "prefix"):
        expected = torch.cat([part[name] for part in parts]).numpy()
        np.testing.assert_array_equal(cache.read(f"image/{name}"), expected)
    np.testing.assert_array_equal(cache.read("text/pooled"), texts["pooled"].numpy())
    values, offsets = cache.read_ragged("text/tokens", np.array([2, 0]))
    np.testing.assert_array_equal(values[: offsets[1]], texts["tokens"][2, : texts["length"][2]])
    np.testing.assert_array_equal(cache.readout()["text/proj"], backbone.readout()["text/proj"])
