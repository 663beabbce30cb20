"""Broken and hostile picture files: small valid ones changed by a seed, and bombs whose header or content is a lie."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """A picture file in memory."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def valid() -> dict[str, bytes]:
    """Small files of all five formats: plain, with palette, alpha, EXIF, 16 bits, CMYK, and animated."""
    noise = np.random.default_rng(0).integers(0, 256, (13, 17, 4), np.uint8)
    plain, exif = Image.fromarray(noise[..., :3]), Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(noise[k : k + 5, :, :3]) for k in range(3)]
    grey = Image.fromarray(noise[..., 0].astype(np.uint16) * 200)
    moving = {"save_all": True, "append_images": frames[1:]}
    return {
        **{kind: saved(plain, kind) for kind in FORMATS},
        "JPEG progressive": saved(plain, "JPEG", progressive=True, exif=exif),
        "JPEG CMYK": saved(plain.convert("CMYK"), "JPEG"),
        "PNG alpha": saved(Image.fromarray(noise), "PNG"),
        "PNG palette": saved(plain.quantize(9), "PNG", transparency=2),
        "PNG 16 bits": saved(grey, "PNG"),
        "BMP palette": saved(plain.quantize(9), "BMP"),
        "WEBP lossless": saved(plain, "WEBP", lossless=True, exif=exif),
        **{f"{kind} animated": saved(frames[0], kind, **moving) for kind in ("PNG", "WEBP", "GIF")},
    }


def mutated(files: dict[str, bytes], rng: np.random.Generator) -> tuple[str, bytes]:
    """One file changed in one way; says which and how."""
    name = str(rng.choice(list(files)))
    data, how = bytearray(files[name]), int(rng.integers(6))
    if how == 0:
        for _ in range(int(rng.integers(1, 9))):
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    elif how == 1:
        data = data[: int(rng.integers(len(data)))]
    elif how == 2:
        other = files[str(rng.choice(list(files)))]
        data = data[: int(rng.integers(len(data)))] + other[int(rng.integers(len(other))) :]
    elif how == 3:  # sizes, counts and flags lie in the first bytes
        at = int(rng.integers(min(len(data), 64)))
        data[at : at + 4] = rng.bytes(4)
    elif how == 4:
        a, b = sorted(int(k) for k in rng.integers(len(data), size=2))
        data = data[:b] + data[a:b] * int(rng.integers(1, 4)) + data[b:]
    else:
        a, b = sorted(int(k) for k in rng.integers(len(data), size=2))
        data[a:b] = bytes(b - a)
    told = ("bits flipped", "cut", "spliced", "header lies", "part repeated", "part blanked")[how]
    return f"{name}, {told}", bytes(data)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8) -> bytes:
    """A PNG of chunks, their checksums right."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    size = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*c) for c in ((b"IHDR", size), *chunks, (b"IEND", b""))
    )


def jpeg(width: int, height: int) -> bytes:
    """A JPEG of 16 × 16 pixels that claims another size."""
    data = saved(Image.new("RGB", (16, 16), (1, 2, 3)), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def webp(width: int, height: int) -> bytes:
    """An animated WebP of a few pixels whose canvas claims another size."""
    data = bytearray(valid()["WEBP animated"])
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def bmp(width: int, height: int, bits: int = 24, compression: int = 0) -> bytes:
    """A BMP that is only a header."""
    head = struct.pack("<IHHI", 54, 0, 0, 54 + 1024)
    info = (40, width, height, 1, bits, compression, 0, 0, 0, 256 if bits == 8 else 0, 0)
    return b"BM" + head + struct.pack("<IiiHHIIiiII", *info) + bytes(1024) + b"\0\1"


def gif(width: int, height: int, comments: int = 0) -> bytes:
    """A GIF of one pixel that claims another size, behind any number of comments."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    said = b"!\xfe" + (b"\xff" + b"a" * 255) * comments + b"\0" if comments else b""
    return head + said + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2D\1\0;"


def frames(kind: str, count: int) -> bytes:
    """An animation of many frames."""
    shown = [Image.new("RGB", (32, 32), (k % 256, k // 256, 0)) for k in range(count)]
    return saved(shown[0], kind, save_all=True, append_images=shown[1:])


PIXELS = (b"IDAT", zlib.compress(b"".join(b"\0" + bytes(24) for _ in range(8))))
"""Of a PNG of 8 × 8."""


def text_bomb() -> bytes:
    """300 MiB of one letter, deflated."""
    pack = zlib.compressobj(9)
    return b"".join(pack.compress(b"a" * 2**20) for _ in range(300)) + pack.flush()


BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG of 65,535 squared": lambda: png(65_535, 65_535, PIXELS),
    "PNG of 2**31 - 1 squared": lambda: png(2**31 - 1, 2**31 - 1, PIXELS),
    "PNG of 16 bits and 170 million pixels": lambda: png(17_000, 10_000, PIXELS, depth=16),
    "PNG one pixel high": lambda: png(88_000_000, 1, PIXELS),
    "PNG with 300 MiB of pixels for 8 × 8": lambda: png(8, 8, (b"IDAT", text_bomb())),
    "PNG with zTXt of 300 MiB": lambda: png(8, 8, (b"zTXt", b"k\0\0" + text_bomb()), PIXELS),
    "PNG with iTXt of 300 MiB": lambda: png(8, 8, (b"iTXt", b"k\0\1\0\0\0" + text_bomb()), PIXELS),
    "PNG with iCCP of 300 MiB": lambda: png(8, 8, (b"iCCP", b"k\0\0" + text_bomb()), PIXELS),
    "PNG with zTXt behind its pixels": lambda: png(8, 8, PIXELS, (b"zTXt", b"k\0\0" + text_bomb())),
    "PNG with 40 MiB of plain text": lambda: png(
        8, 8, (b"iTXt", b"k\0\0\0\0\0" + b"a" * (40 << 20)), PIXELS
    ),
    "JPEG claiming 65,500 squared": lambda: jpeg(65_500, 65_500),
    "WebP canvas 15,000,000 wide": lambda: webp(14_968_997, 5),
    "WebP canvas 15,000,000 high": lambda: webp(5, 14_968_997),
    "WebP canvas of 2**24 squared": lambda: webp(2**24, 2**24),
    "BMP of 100 million pixels and no data": lambda: bmp(9_999, 10_000),
    "BMP of negative size": lambda: bmp(-5, -10),
    "BMP 60,000,000 wide": lambda: bmp(60_000_000, 1),
    "BMP run-length coded, all skipped": lambda: bmp(60_000, 1_400, 8, 1),
    "GIF claiming 65,535 squared": lambda: gif(65_535, 65_535),
    "GIF with 25 MB of comments": lambda: gif(2, 2, 100_000),
    "GIF of 2,000 frames": lambda: frames("GIF", 2_000),
    "WebP of 2,000 frames": lambda: frames("WEBP", 2_000),
}
"""Files that are small, or say little, and would cost much."""
