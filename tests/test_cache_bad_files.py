"""What else may lie in a folder of pictures: pipes, links, odd names, files that come, go or change during a build."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_pictures import valid
from faults import count
from kill_builds import ending, in_child
from PIL import Image
from stand_in import KeptStandIn, StandIn

from cache_builder import FeatureCache, build
from cache_builder.backbones.base import Backbone
from cache_builder.datasets import folder
from cache_builder.datasets.base import Dataset, ImageRecord
from cache_builder.errors import CacheError

GOOD = {"a.png": (200, 40, 40), "b.jpg": (40, 60, 200), "c/d.webp": (1, 2, 3)}


@pytest.fixture
def own(fast_path: Path) -> Path:
    """Three pictures without a table."""
    for name, colour in GOOD.items():
        path = fast_path / "own/images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), colour).save(path)
    return fast_path / "own"


def built(root: Path, name: str = "x.zarr", backbone: Backbone | None = None) -> FeatureCache:
    data = folder.load(root)
    given = backbone or StandIn()
    return build(data, given, root.parent / name, streams=["image/pooled"], progress=False)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def outside(path: Path) -> None:
    (path.parent.parent.parent / "secret.png").write_bytes(valid()["PNG"])
    path.symlink_to("../../secret.png")


def socketed(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "not a regular file"),
    "a socket": (socketed, "not a regular file"),
    "an empty file": (lambda p: p.write_bytes(b""), "begins b''"),
    "a ring of links": (loop, "no usable path"),
    "a link out of the folder": (outside, "leaves"),
    "a link into /dev": (lambda p: p.symlink_to("/dev/zero"), "leaves"),
    "a link to nothing": (lambda p: p.symlink_to("nowhere.png"), "no such file"),
    "a link to a folder": (lambda p: p.symlink_to("c"), ""),
    "a folder called .jpg": (lambda p: p.mkdir(), ""),
    "a sparse file of 10 GiB": (lambda p: [p.touch(), os.truncate(p, 10 << 30)], "more than the"),
    "a text": (lambda p: p.write_text("hello"), "begins b'hello'"),
}
"""What lies there → how it comes there, and why it is in quarantine; nothing: it is no picture file at all."""


@pytest.mark.parametrize("what", ODD)
def test_what_is_no_picture_file_is_listed_with_its_reason(what: str, own: Path) -> None:
    make, reason = ODD[what]
    make(own / "images/odd.jpg")
    cache = built(own)
    if reason:
        assert list(cache.quarantined) == ["odd.jpg"]
        assert reason in cache.quarantined["odd.jpg"]
    else:
        assert not cache.quarantined
    assert {*cache.image_ids} - {"odd.jpg"} == {*GOOD}
    count("odd file among pictures", "clear error" if reason else "same result")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a device")
def test_a_device_is_not_opened(own: Path) -> None:
    os.mknod(own / "images/odd.jpg", 0o666 | 0o020000, os.makedev(1, 5))
    assert "not a regular file" in built(own).quarantined["odd.jpg"]


def test_a_file_without_permission_is_quarantined(own: Path) -> None:
    (own / "images/a.png").chmod(0)

    def as_nobody() -> None:
        if os.geteuid() == 0:
            for place in reversed(own.parents[:3]):  # up to the folder that all modules share
                place.chmod(0o777)
            os.setgid(65534)
            os.setuid(65534)
        cache = built(own, "theirs.zarr")
        assert "Permission denied" in cache.quarantined["a.png"]

    assert ending(in_child(as_nobody)) == 0
    count("odd file among pictures", "clear error")


NAMES = (
    "two\nlines.jpg",
    "ü 日本 🎈.jpg",
    "é.jpg",
    "x" * 250 + ".jpg",
    " .jpg",
    "-rf.jpg",
    "'$(id)'.jpg",
)


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_name_is_an_id_or_refused_as_one(name: str, own: Path) -> None:
    Image.new("RGB", (4, 4)).save(own / "images" / name, "JPEG")
    cache = built(own)
    assert name in cache.image_ids
    assert cache.verify().ok
    assert set(cache.quarantined) == ({name} if "\n" in name else set())
    count("odd file name", "clear error" if "\n" in name else "same result")


def test_a_name_that_is_not_utf8_is_listed_and_not_opened(own: Path) -> None:
    with open(os.fsencode(own / "images") + b"/\xff\xfe.jpg", "wb") as file:
        file.write(valid()["JPEG"])
    cache = built(own)
    assert list(cache.quarantined) == ["\\xff\\xfe.jpg"]
    assert "backslash" in cache.quarantined["\\xff\\xfe.jpg"]
    count("odd file name", "clear error")


def changing(root: Path, at: int, change: Callable[[], object]) -> Dataset:
    """The data set of a folder, in which something happens as its n-th picture is opened."""
    data, opened = folder.load(root), [0]

    def record(one: ImageRecord) -> ImageRecord:
        def open_image() -> Image.Image:
            opened[0] += 1
            if opened[0] == at:
                change()
            return one.open()

        return ImageRecord(one.id, open_image, one.measure)

    images = tuple(record(one) for one in data.images)
    return Dataset("folder", images, data.texts, data.tasks, data.decode)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_file_that_vanishes_or_appears_during_a_build(at: int, own: Path) -> None:
    def change() -> None:
        (own / "images/c/d.webp").unlink()
        Image.new("RGB", (4, 4)).save(own / "images/late.jpg")

    data = changing(own, at, change)
    cache = build(data, StandIn(), own.parent / "x.zarr", streams=["image/pooled"], progress=False)
    assert set(cache.image_ids) == {*GOOD}
    assert set(cache.quarantined) <= {"c/d.webp"}
    assert cache.verify().ok
    count("file gone or new during a build", "same result")


@pytest.mark.parametrize("size", [(2, 2), (8, 8)])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_picture_exchanged_during_a_build_is_read_whole_or_refused(
    at: int, size: tuple[int, int], own: Path
) -> None:
    """Before: 12 × 1 patches; 8 × 8 pixels have as many, 4 × 3."""

    def change() -> None:
        for name in GOOD:
            Image.new("RGB", size, "white").save(own / "images" / name)

    backbone, path = KeptStandIn(), own.parent / "x.zarr"
    with pytest.raises(CacheError, match="than when its patches were planned"):
        build(changing(own, at, change), backbone, path, progress=False, workers=1)
    assert FeatureCache.open(path, allow_building=True).state == "building"
    count("picture exchanged during a build", "clear error")


def test_a_folder_of_a_hundred_thousand_files_is_listed(own: Path) -> None:
    """In seconds; with a scan of a list for every file it would be hours."""
    for i in range(100_000):
        os.close(os.open(own / f"images/{i}.jpg", os.O_CREAT | os.O_WRONLY))
    assert len(folder.load(own).images) == 100_000 + len(GOOD)
