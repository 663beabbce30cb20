"""Pixels: what enters a tower is the library's own transform of the decoded picture, value for value, in every family.

Pictures come as files do: through our decoding step first, which is the same for all (see test_cache_images.py).
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import open_clip
import pytest
import torch
from kinds import KINDS, LLAVA, OPEN_CLIP
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, CLIPImageProcessor

from cache_builder.backbones import checkpoints, clip, pe, siglip2
from cache_builder.backbones.two_towers import TwoTowers
from cache_builder.images import decode

OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

HALF = ((0.5,) * 3, (0.5,) * 3)
PLAIN = ((0.0,) * 3, (1.0,) * 3)


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, *channels), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(noise(40, 70, 3)), "JPEG", exif=exif, quality=95)


def palette() -> Image.Image:
    return Image.fromarray(noise(57, 44, 3)).quantize(17)


FILES: dict[str, Callable[[], bytes]] = {
    "grey": lambda: encoded(Image.fromarray(noise(50, 33))),
    "grey with alpha": lambda: encoded(Image.fromarray(noise(31, 52, 2), "LA")),
    "palette": lambda: encoded(palette()),
    "palette, transparent": lambda: encoded(palette(), transparency=3),
    "RGBA": lambda: encoded(Image.fromarray(noise(64, 37, 4), "RGBA")),
    "CMYK": lambda: encoded(Image.fromarray(noise(48, 35, 4), "CMYK"), "JPEG"),
    "16-bit": lambda: encoded(Image.fromarray(noise(43, 66).astype(np.uint16) * 257)),
    "one bit": lambda: encoded(Image.fromarray(noise(39, 41) > 127)),
    "EXIF-rotated": turned,
    "one row": lambda: encoded(Image.fromarray(noise(1, 200, 3))),
    "one column": lambda: encoded(Image.fromarray(noise(150, 1, 3))),
    "one pixel": lambda: encoded(Image.fromarray(noise(1, 1, 3))),
    "224 x 303": lambda: encoded(Image.fromarray(noise(224, 303, 3))),
    "303 x 224": lambda: encoded(Image.fromarray(noise(303, 224, 3))),
    "as it enters": lambda: encoded(Image.fromarray(noise(32, 32, 3))),
    "4000 x 3000": lambda: encoded(
        Image.fromarray(noise(300, 400, 3)).resize((4000, 3000)), "JPEG"
    ),
}


@pytest.fixture(scope="module")
def decoded() -> dict[str, Image.Image]:
    return {name: decode(make(), upright=True) for name, make in FILES.items()}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str) -> TwoTowers:
    return kinds.model(kind)


@pytest.fixture(scope="module")
def directory(kind: str) -> Path:
    return kinds.directory(kind)


def library_transform(kind: str, directory: Path) -> Callable[[Image.Image], dict[str, Any]]:
    """Loaded by the library itself from the same directory."""
    if kind in OPEN_CLIP:
        transform: Any = open_clip.create_model_and_transforms(f"local-dir:{directory}")[2]
        return lambda image: {"": transform(image)}
    processor: Any = AutoImageProcessor.from_pretrained(directory)
    names = {"pixels": "pixel_values", "mask": "pixel_attention_mask", "shape": "spatial_shapes"}
    names = names if kind == "siglip2-naflex" else {"": "pixel_values"}

    def transform_one(image: Image.Image) -> dict[str, Any]:
        found = processor(images=image, return_tensors="pt")
        return {ours: found[theirs][0] for ours, theirs in names.items()}

    return transform_one


def test_pixels_are_the_library_s(
    kind: str, model: TwoTowers, directory: Path, decoded: dict[str, Image.Image]
) -> None:
    if kind == "llava":  # whose default pads, and is compared below
        model = kinds.load(kind, Path(f"{directory}@crop,vision"))
    transform = library_transform(kind, directory)
    for name, image in decoded.items():
        expected = transform(image)
        found = model.preprocess(image)
        ours = found if isinstance(found, dict) else {"": found}
        assert ours.keys() == expected.keys()
        for part, value in ours.items():
            assert torch.equal(value, torch.as_tensor(expected[part])), (name, part)


def test_a_grid_is_what_the_tower_is_given(
    kind: str, model: TwoTowers, decoded: dict[str, Image.Image]
) -> None:
    patches = model.spec.dims.get("patches")
    for name, image in decoded.items():
        rows, columns = model.grid(*image.size)
        assert type(rows) is type(columns) is int
        if patches is not None:
            assert (rows, columns) == (4, 4), name
            continue
        pixels = model.preprocess(image)
        assert [rows, columns] == pixels["shape"].tolist(), name
        assert rows * columns == int(pixels["mask"].sum()) <= model.spec.dims["most_patches"]


@pytest.mark.parametrize("kind", ["siglip2-naflex"], scope="module")
def test_naflex_keeps_the_shape_of_a_picture(model: TwoTowers) -> None:
    """At most 12 patches of 8 x 8 pixels here; at 256 of 16 the published models give 14 x 18 for 480 x 640."""
    assert model.grid(64, 64) == (3, 3)
    assert model.grid(160, 40) == (2, 6)  # width first, rows first
    assert model.grid(40, 160) == (6, 2)
    from transformers.models.siglip2.image_processing_siglip2 import (
        get_image_size_for_max_num_patches as size,
    )

    shapes = {(480, 640): (14, 18), (1080, 1920): (12, 21), (300, 300): (16, 16)}
    for (h, w), grid in {**shapes, (100, 1000): (5, 50)}.items():
        found = size(h, w, 16, 256)
        assert (found[0] // 16, found[1] // 16) == grid


@pytest.mark.parametrize("kind", LLAVA[:1], scope="module")
def test_llava_pads_to_a_square_with_the_mean_colour_before_clip_s_transform(
    model: TwoTowers, decoded: dict[str, Image.Image]
) -> None:
    """As LLaVA's own code does: the picture pasted on a square of (122, 116, 104), then CLIP's resize."""
    size = {"height": 32, "width": 32}
    clips = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    for name, image in decoded.items():
        side, (width, height) = max(image.size), image.size
        square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in OPENAI[0]))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        expected = clips(images=square, return_tensors="pt")["pixel_values"][0]
        assert kinds.largest(model.preprocess(image), expected) == 0.0, name


@pytest.mark.parametrize("kind", LLAVA[:1], scope="module")
def test_padding_keeps_what_a_crop_cuts_off(model: TwoTowers, directory: Path) -> None:
    cropped = kinds.load("llava", Path(f"{directory}@crop"))
    wide = np.zeros((40, 160, 3), np.uint8)
    wide[:, :30] = wide[:, -30:] = 255  # all that is bright is at the borders
    bright = [b.preprocess(Image.fromarray(wide)).amax() for b in (model, cropped)]
    dark = cropped.preprocess(Image.fromarray(np.zeros_like(wide))).amax()
    assert bright[0] > bright[1] + 1
    assert bright[1] == dark
    square = Image.fromarray(noise(47, 47, 3))
    assert torch.equal(model.preprocess(square), cropped.preprocess(square))
    assert model.spec.preprocessing != cropped.spec.preprocessing


PIXELS = {
    # as published: filter, what becomes of other shapes, mean, std
    "ViT-B-32/openai": ("bicubic", "shortest", *OPENAI),
    "ViT-B-16/laion2b_s34b_b88k": ("bicubic", "shortest", *OPENAI),
    "ViT-L-14/openai": ("bicubic", "shortest", *OPENAI),
    "ViT-L-14-336/openai": ("bicubic", "shortest", *OPENAI),
    "ViT-L-14-quickgelu/metaclip_fullcc": ("bicubic", "shortest", *OPENAI),
    "ViT-H-14-378-quickgelu/dfn5b": ("bicubic", "squash", *OPENAI),
    "MobileCLIP2-B/dfndr2b": ("bilinear", "shortest", *PLAIN),
    "MobileCLIP2-L-14/dfndr2b": ("bicubic", "shortest", *OPENAI),
    **{n: ("bicubic", "squash", *HALF) for n in siglip2.PUBLISHED if "naflex" not in n},
    **dict.fromkeys(pe.PUBLISHED, ("bilinear", "squash", *HALF)),
}


def test_a_tag_with_a_file_has_the_tag_s_pixels(tmp_path: Path) -> None:
    """For all that are proposed: the file's own name says nothing, the tag's entry says all."""
    file = tmp_path / "some.safetensors"
    save_file({}, file)
    assert PIXELS.keys() == {
        n for f in (clip, siglip2, pe) for n in f.PUBLISHED if "naflex" not in n
    }
    for name, expected in PIXELS.items():
        options = checkpoints._resolve_tag(f"{name}@{file}", "clip")[2]
        with torch.device("meta"):
            made: Any = open_clip.create_model(
                name.split("/")[0],
                load_weights=False,
                device="meta",
                force_preprocess_cfg=options["force_preprocess_cfg"],
            )
            found = made.visual.preprocess_cfg
        keys = ("interpolation", "resize_mode", "mean", "std")
        assert tuple(found[key] for key in keys) == expected, name
