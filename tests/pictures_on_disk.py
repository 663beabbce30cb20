"""Folders of small pictures, some of them copies, for tests that need real files."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def write_pictures(root: Path, colours: Mapping[str, int], size: tuple[int, int] = (6, 6)) -> Path:
    """Pictures and captions of a `folder` data set; equal numbers give files of the same bytes."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    lines = ["image,caption"]
    for name, number in colours.items():
        colour = number * 7 % 256, number * 31 % 256, 255 - number % 256
        Image.new("RGB", size, colour).save(root / "images" / name)
        lines.append(f"{name},this is {name}")
    (root / "data.csv").write_text("\n".join([*lines, ""]))
    return root
