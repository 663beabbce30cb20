"""From a file name in somebody's table to an RGB picture: what may be opened, and how it is decoded.

Decoding is ours and the same for every backbone; resizing and normalising are the backbone's own transform. The order
matters: libraries resize *before* they convert, so a palette picture resized by them is not the picture one sees.
"""

import io
import os
import stat
import unicodedata
from pathlib import Path, PureWindowsPath
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from cache_builder.errors import CacheError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
"""What is decoded, recognised by content: a suffix is a name, and names are data."""

MAX_BYTES = 64 * 2**20
"""Largest image file, in bytes."""

MAX_PIXELS = 100_000_000
"""Largest width × height, checked on the header before a pixel is decoded."""

MAX_SIDE = 65_535
"""Largest width or height, JPEG's own. PIL collects a row in pieces and copies all of it for each, so the time grows
with the square of the width: a WebP of 1 kB that claims 15,000,000 × 5 pixels took it 98 seconds."""

MAX_NAME = 1024
"""Longest image name, in characters."""


class BadImage(CacheError, ValueError):
    """An image cannot be used: not a picture, truncated, too large. The build quarantines it and goes on."""


class UnsafeName(CacheError, ValueError):
    """An image name could lead outside the image folder; nothing is opened."""


def decode_rule(*, upright: bool) -> str:
    """The decoding step as canonical text, for `Dataset.decode`."""
    exif = "applied" if upright else "ignored"
    return (
        f"PIL by content ({' '.join(FORMATS)}), first frame; EXIF orientation {exif}; "
        "16-bit grey by high byte; alpha on white; RGB"
    )


def decode(data: bytes, *, upright: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An encoded picture as 8-bit RGB.

    Args:
        data: a whole file, JPEG, PNG, WebP, BMP or GIF (first frame).
        upright: apply the EXIF orientation. Published readers of the official sets do not; own photos need it.
        max_pixels: refuse larger pictures by their header.

    Raises:
        BadImage: not such a picture, truncated, or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size, max_pixels)
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image) if upright else image)
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(_no_picture(data[:8])) from None
    except Exception as error:  # decoders of broken files raise nearly anything, SyntaxError and struct.error included
        raise BadImage(f"cannot be decoded: {error}") from error


def image_size(path: Path, *, upright: bool = False) -> tuple[int, int]:
    """Width and height of what `open_image` would return, from the file's header alone.

    Raises:
        FileNotFoundError: there is none.
        BadImage: no picture by its header, or too large.
    """
    with _open_regular(path) as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                turned = upright and image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
                width, height = image.size
                _check_size(width, height, MAX_PIXELS)
        except BadImage:
            raise
        except Image.UnidentifiedImageError:
            file.seek(0)
            raise BadImage(_no_picture(file.read(8))) from None
        except Exception as error:  # as in `decode`
            raise BadImage(f"cannot be decoded: {error}") from error
    return (height, width) if turned else (width, height)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse a picture by the size that its header claims."""
    if width * height > max_pixels:
        raise BadImage(f"{width} × {height} pixels, more than the {max_pixels:,} allowed")
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"{width} × {height} pixels, more than {MAX_SIDE:,} on a side")


SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


def open_image(
    path: Path, *, upright: bool = False, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """The picture in a file, as 8-bit RGB; the file is closed again.

    Raises:
        FileNotFoundError: there is none.
        BadImage: see `decode`; also a file that is not regular (a device, a pipe) or larger than `max_bytes`.
    """
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # One byte more than allowed: a file may grow after its size was looked at.
        data = file.read(max_bytes + 1) if size <= max_bytes else b""
    if max(size, len(data)) > max_bytes:
        size = max(size, len(data))
        raise BadImage(f"{path.name!r} has {size:,} bytes, more than the {max_bytes:,} allowed")
    return decode(data, upright=upright, max_pixels=max_pixels)


def _open_regular(path: Path) -> BinaryIO:
    """A file open for reading; never a device, a pipe or a folder, also if one takes its place at this moment."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise BadImage(f"{path.name!r} is not a regular file")
    # Opening a pipe that took the file's place would wait for a writer for ever.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadImage(f"{path.name!r} is not a regular file")
    return os.fdopen(handle, "rb")


def _no_picture(begins: bytes) -> str:
    return f"not a {', '.join(FORMATS)} picture: begins {begins!r}"


def check_name(name: str) -> str:
    """The name of an image file below some folder, unchanged if it is harmless.

    Raises:
        UnsafeName: empty, absolute, longer than 1,024 characters, or holding a control character, a backslash, a drive
            letter or a `..` component.
    """
    if not name:
        fault = "is empty"
    elif len(name) > MAX_NAME:
        fault = f"has {len(name):,} characters, more than {MAX_NAME:,}"
    elif any(unicodedata.category(c) == "Cc" for c in name):
        fault = "holds a control character"
    elif "\\" in name:
        fault = "holds a backslash"
    elif name.startswith("/") or PureWindowsPath(name).drive:
        fault = "is an absolute path"
    elif ".." in name.split("/"):
        fault = "holds a '..' component"
    else:
        return name
    raise UnsafeName(f"image name {name[:80]!r} {fault}; names are relative paths below the folder")


def image_path(root: Path, name: str, *, follow_links: bool = False) -> Path:
    """Where the image called `name` lies below `root`; `root` itself may be a link.

    Args:
        root: the image folder.
        name: a relative path with forward slashes.
        follow_links: allow links below `root` that lead out of it.

    Raises:
        UnsafeName: see `check_name`; or the name leads, through a link, out of `root` or nowhere.
    """
    path = root / check_name(name)
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (
        RuntimeError,
        OSError,
    ) as error:  # a ring of links
        raise UnsafeName(f"image {name!r} is no usable path below {root}: {error}") from error
    if not follow_links and not inside:
        raise UnsafeName(
            f"image {name!r} is a link that leaves {root}; copy the file in, or pass follow_links=True"
        )
    return path


def _as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode the five formats can have; transparent parts show white."""
    if image.mode.startswith("I"):
        image = _grey_from_16_bit(image)
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    if image.mode == "RGB" and image.format in ("JPEG", None):
        return (
            image  # `convert` would only copy it, which takes a tenth of the time of a large photo
        )
    return image.convert("RGB")


def _grey_from_16_bit(image: Image.Image) -> Image.Image:
    """Keeps the high byte, as decoders do for 16-bit colour; PIL's own conversion clips at 255, to all white."""
    values = np.asarray(image).astype(np.uint16)
    grey = (values >> 8).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey = np.where(values == clear, np.uint8(255), grey)
    return Image.fromarray(grey)
