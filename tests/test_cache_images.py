"""What may be opened as a picture, and that every mode ends as the RGB one sees."""

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cache_builder import images
from cache_builder.errors import CacheError
from cache_builder.images import (
    BadImage,
    UnsafeName,
    check_name,
    decode,
    image_path,
    image_size,
    open_image,
)

TALL = np.zeros((5, 3, 3), np.uint8)
TALL[0] = 200  # the top row is light, so that a rotation shows


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour_at(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    pixel = image.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return pixel


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_the_five_formats_are_read_whatever_the_file_is_called(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.txt"
    path.write_bytes(encoded(Image.new("RGB", (7, 5), (10, 200, 30)), kind))
    found = open_image(path)
    assert (found.mode, found.size) == ("RGB", (7, 5))
    assert np.abs(np.array(colour_at(found)) - (10, 200, 30)).max() <= 6


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO"])
def test_other_formats_are_refused_even_when_called_jpg(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(encoded(Image.new("RGB", (16, 16)), kind))
    with pytest.raises(BadImage, match="not a JPEG, PNG, WEBP, BMP, GIF picture"):
        open_image(path)


def test_a_text_file_called_jpg_shows_how_it_begins(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("hello world")
    with pytest.raises(BadImage, match="begins b'hello wo'") as caught:
        open_image(tmp_path / "a.jpg")
    assert isinstance(caught.value, CacheError)
    assert isinstance(caught.value, ValueError)


def test_transparent_parts_show_white() -> None:
    half = Image.new("RGBA", (3, 2), (0, 0, 0, 0))
    half.putpixel((1, 1), (255, 0, 0, 255))
    found = decode(encoded(half, "PNG"))
    assert colour_at(found) == (255, 255, 255)
    assert colour_at(found, 1, 1) == (255, 0, 0)


def test_half_transparent_is_mixed_with_white() -> None:
    assert (
        colour_at(decode(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG"))) == (127,) * 3
    )


def test_a_palette_keeps_its_colours_and_its_clear_entry_is_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert colour_at(decode(encoded(palette, "PNG")), 1) == (200, 100, 50)
    clear = decode(encoded(palette, "PNG", transparency=1))
    assert colour_at(clear, 0) == (10, 20, 30)
    assert colour_at(clear, 1) == (255, 255, 255)


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    grey = Image.fromarray(np.array([[0, 256, 0x8000, 0xFFFF]], np.uint16))
    found = np.asarray(decode(encoded(grey, "PNG")))
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    source = Image.new("RGB", (4, 3), (250, 250, 250)).convert(mode)
    found = decode(encoded(source, "JPEG" if mode == "CMYK" else "PNG"))
    assert found.mode == "RGB"
    assert min(colour_at(found)) >= 245


def test_only_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert colour_at(decode(data)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_exif_turns_a_picture_only_where_asked(mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: to be turned clockwise
    data = encoded(Image.fromarray(TALL).convert(mode), "JPEG", exif=exif)
    assert decode(data).size == (3, 5)
    assert decode(data, upright=True).size == (5, 3)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF"]), part=st.floats(0, 0.95))
def test_a_truncated_file_is_an_error_and_never_a_picture(kind: str, part: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (23, 29, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), kind)
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * part)])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    place=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    kind=st.sampled_from(["PNG", "JPEG"]),
)
def test_a_damaged_file_is_a_picture_or_our_error(place: float, flip: int, kind: str) -> None:
    data = bytearray(encoded(Image.fromarray(TALL), kind))
    data[int(place * len(data))] ^= flip
    with contextlib.suppress(BadImage):
        assert decode(bytes(data)).mode == "RGB"


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IEND", b"")


def test_the_pixel_limit_is_checked_on_the_header() -> None:
    with pytest.raises(BadImage, match=r"7 × 5 pixels, more than the 34 allowed"):
        decode(png_header(7, 5), max_pixels=34)
    with pytest.raises(BadImage):
        decode(png_header(60_000, 60_000))


def test_a_file_over_the_byte_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(encoded(Image.new("RGB", (9, 9)), "PNG"))
    with pytest.raises(BadImage, match=r"'big\.png' has .* more than the 10 allowed"):
        open_image(tmp_path / "big.png", max_bytes=10)


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_measured_size_is_that_of_the_opened_picture(
    kind: str, turn: int, upright: bool, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    (tmp_path / "a").write_bytes(encoded(Image.fromarray(TALL), kind, exif=exif))
    found = open_image(tmp_path / "a", upright=upright)
    assert image_size(tmp_path / "a", upright=upright) == found.size


def test_a_picture_cut_off_behind_its_header_can_still_be_measured(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    data = encoded(Image.fromarray(pixels), "PNG")
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    assert image_size(tmp_path / "a.png") == (20, 30)
    with pytest.raises(BadImage, match="cannot be decoded"):
        open_image(tmp_path / "a.png")


def test_what_is_no_picture_has_the_same_fault_measured_or_opened(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("hello world")
    for place, error in (("a.jpg", "begins b'hello wo'"), ("", "not a regular file")):
        for action in (image_size, open_image):
            with pytest.raises(BadImage, match=error):
                action(tmp_path / place)
    with pytest.raises(FileNotFoundError):
        image_size(tmp_path / "absent.jpg")


def test_a_folder_is_not_a_picture_and_an_absent_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="not a regular file"):
        open_image(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "absent.jpg")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("", "is empty"),
        ("/etc/passwd", "absolute"),
        ("../secret.jpg", "'..' component"),
        ("a/../../b.jpg", "'..' component"),
        ("a\\b.jpg", "backslash"),
        ("C:/a.jpg", "absolute"),
        ("c:a.jpg", "absolute"),
        ("a\x00b", "control character"),
        ("a\nb", "control character"),
        ("x" * 1025, "1,025 characters"),
    ],
)
def test_a_name_that_could_leave_the_folder_is_refused(name: str, fault: str) -> None:
    with pytest.raises(UnsafeName, match="image name") as caught:
        check_name(name)
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    "name", ["a.jpg", "ancient building/x y.jpg", "ü/日本..jpg", "..a/b", "x" * 1024]
)
def test_an_odd_but_harmless_name_passes(name: str) -> None:
    assert check_name(name) == name


def test_a_link_out_of_the_folder_is_refused_unless_allowed(tmp_path: Path) -> None:
    (tmp_path / "outside.jpg").write_bytes(b"")
    root = tmp_path / "images"
    root.mkdir()
    (root / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "inner.jpg").symlink_to(root / "other.jpg")
    with pytest.raises(UnsafeName, match=r"'link\.jpg' is a link that leaves"):
        image_path(root, "link.jpg")
    assert image_path(root, "link.jpg", follow_links=True) == root / "link.jpg"
    assert image_path(root, "inner.jpg") == root / "inner.jpg"


def test_the_image_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "images").symlink_to(tmp_path / "real")
    assert image_path(tmp_path / "images", "a/b.jpg") == tmp_path / "images/a/b.jpg"


def test_the_decode_rule_says_whether_exif_is_applied() -> None:
    assert "EXIF orientation applied" in images.decode_rule(upright=True)
    assert "EXIF orientation ignored" in images.decode_rule(upright=False)


def test_a_ring_of_links_is_refused_as_a_name(tmp_path: Path) -> None:
    (tmp_path / "ring.jpg").symlink_to(tmp_path / "ring.jpg")
    with pytest.raises(UnsafeName, match=r"'ring\.jpg' is no usable path"):
        image_path(tmp_path, "ring.jpg")
