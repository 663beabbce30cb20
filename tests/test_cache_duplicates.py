"""Pictures of the same bytes are encoded once, and every id has its row."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from pictures_on_disk import write_pictures
from stand_in import KeptStandIn, StandIn

from cache_builder import FeatureCache, build, load_dataset
from cache_builder.datasets.base import Dataset
from cache_builder.duplicates import END, same_bytes

COLOURS = {f"{i:02}.png": (i * 5) % 11 for i in range(23)}
"""Twenty-three names, eleven pictures."""

STREAMS = ["image/pooled", "image/patches", "image/view_flip/pooled", "crop/pooled", "text/pooled"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset("folder", write_pictures(tmp_path_factory.mktemp("photos"), COLOURS))


def without_files(dataset: Dataset) -> Dataset:
    from dataclasses import replace

    return replace(dataset, images=tuple(replace(r, path=None) for r in dataset.images))


def make(dataset: Dataset, path: Path, backbone: StandIn, **options: object) -> FeatureCache:
    given = {"batch_size": 4, "chunk_bytes": 100, "streams": STREAMS, "progress": False, **options}
    return build(dataset, backbone, path, **given)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", [StandIn, KeptStandIn])
def test_copies_are_encoded_once_and_every_id_has_the_numbers_of_its_picture(
    kind: type[StandIn], photos: Dataset, fast_path: Path
) -> None:
    few, all_of_them = kind(), kind()
    cache = make(photos, fast_path / "c.zarr", few, streams=STREAMS[:2])
    apart = make(without_files(photos), fast_path / "d.zarr", all_of_them, streams=STREAMS[:2])
    assert sum(few.encoded) == 11
    assert sum(all_of_them.encoded) == 23
    assert cache.verify().ok
    assert sorted(cache.image_ids) == sorted(COLOURS)
    for stream in cache.streams:
        for name in COLOURS:
            one = read(cache, stream, name)
            np.testing.assert_array_equal(one, read(apart, stream, name))


def read(cache: FeatureCache, stream: str, name: str) -> np.ndarray:
    rows = cache.rows("image", [name])
    return (
        cache.read_ragged(stream, rows)[0] if cache.is_ragged(stream) else cache.read(stream, rows)
    )


def test_views_and_crops_of_copies_are_right_too(photos: Dataset, fast_path: Path) -> None:
    cache = make(photos, fast_path / "c.zarr", StandIn())
    apart = make(without_files(photos), fast_path / "d.zarr", StandIn())
    for name in COLOURS:
        for stream in ("image/view_flip/pooled", "crop/pooled"):
            np.testing.assert_array_equal(read(cache, stream, name), read(apart, stream, name))


def test_copies_stand_together_and_the_cache_says_so(photos: Dataset, fast_path: Path) -> None:
    cache = make(photos, fast_path / "c.zarr", StandIn())
    copies = cache.copies()
    assert copies is not None
    assert len(copies) == 12
    for first, last in pairwise(copies):
        assert len({COLOURS[i] for i in cache.image_ids[first:last]}) == 1
    assert copies[-1] == 23
    pictures = [COLOURS[cache.image_ids[i]] for i in copies[:-1]]
    assert sorted(pictures) == list(range(11))
    assert pictures != sorted(pictures)  # the order of the pictures is still shuffled


def test_a_data_set_without_copies_is_stored_as_ever(fast_path: Path) -> None:
    photos = load_dataset(
        "folder", write_pictures(fast_path / "p", {f"{i}.png": i for i in range(9)})
    )
    cache = make(photos, fast_path / "c.zarr", StandIn())
    assert cache.copies() is None
    assert cache.digest() == make(without_files(photos), fast_path / "d.zarr", StandIn()).digest()


def test_a_lost_chunk_of_a_cache_with_copies_comes_back(photos: Dataset, fast_path: Path) -> None:
    whole = make(photos, fast_path / "c.zarr", StandIn())
    for array, chunk in (("image/patches", 2), ("crop/pooled", 0), ("image/pooled", 0)):
        whole.chunks.file(array, chunk).unlink()
        assert make(photos, fast_path / "c.zarr", StandIn()).digest() == whole.header.digest


def test_if_the_first_copy_is_gone_the_next_one_is_read(photos: Dataset, fast_path: Path) -> None:
    cache = make(photos, fast_path / "c.zarr", StandIn())
    copies = cache.copies()
    assert copies is not None
    first = cache.image_ids[int(copies[0])]
    cache.chunks.file("image/patches", 0).unlink()
    file = Path(photos.root) / "images" / first
    data = file.read_bytes()
    file.unlink()
    try:
        again = make(photos, fast_path / "c.zarr", StandIn())
    finally:
        file.write_bytes(data)
    assert not again.quarantined
    assert again.digest() == cache.header.digest


def test_all_copies_of_a_broken_picture_are_quarantined(fast_path: Path) -> None:
    root = write_pictures(fast_path / "p", {f"{i}.png": i for i in range(5)})
    for name in ("1.png", "3.png"):
        (root / "images" / name).write_bytes(b"no picture")
    cache = make(load_dataset("folder", root), fast_path / "c.zarr", StandIn(), streams=STREAMS[:2])
    assert set(cache.quarantined) == {"1.png", "3.png"}
    assert np.isnan(cache.read("image/pooled")).any(1).sum() == 2


def test_files_that_differ_anywhere_are_different(tmp_path: Path) -> None:
    """Same size; a difference at either end, or only in the middle."""
    base = bytes(random.Random(0).randbytes(3 * END))
    names = {}
    for name, at in (
        ("a", None),
        ("b", None),
        ("first", 0),
        ("middle", 3 * END // 2),
        ("last", -1),
    ):
        data = bytearray(base)
        if at is not None:
            data[at] ^= 1
        (tmp_path / name).write_bytes(data)
        names[name] = len(names)
    records = [record(tmp_path / name) for name in names]
    assert same_bytes(records) == [[0, 1], [2], [3], [4]]


def test_what_cannot_be_read_is_alone(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    names = ("folder.png", "empty.png", "none.png", "none.png")
    assert same_bytes([record(tmp_path / n) for n in names]) == [[0], [1], [2], [3]]
    assert same_bytes([]) == []


def record(path: Path):
    from PIL import Image

    from cache_builder.datasets.base import ImageRecord

    return ImageRecord(path.name, lambda: Image.open(path), path=lambda: path)
