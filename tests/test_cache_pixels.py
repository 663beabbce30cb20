"""The stream `image/pixels`: levels of which every family makes its own pixels bit for bit, stored like any stream."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import pytest
import torch
import xarray as xr
from kinds import KINDS, OPEN_CLIP
from PIL import Image
from stand_in import DIMS, SPEC, KeptStandIn, StandIn, dataset
from torch import Tensor

from cache_builder import FeatureCache, build
from cache_builder.append import next_place
from cache_builder.cli import main
from cache_builder.datasets.base import Dataset, ImageRecord, Tasks
from cache_builder.errors import BadOutput, CacheMismatch, UnknownName
from cache_builder.feature_files import ForeignError
from cache_builder.format import plan
from cache_builder.hdf5 import export_hdf5, import_hdf5
from cache_builder.mapping import read_mapping
from cache_builder.spec import BackboneSpec, CacheSpec, with_depth
from cache_builder.storage import MODES
from cache_builder.testing import NonConformance, _check_levels
from cache_builder.views import VIEWS

Make = Callable[..., FeatureCache]
PIXELS = "image/pixels"
FLIP = "image/view_flip/pixels"
FIXED = [kind for kind in KINDS if kind != "siglip2-naflex"]
ROOT = Path(__file__).parent.parent


def odd() -> list[Image.Image]:
    """Noise of awkward sizes, single rows and columns, and plain black and white."""
    rng = np.random.default_rng(5)
    sizes = [(1, 1), (1, 90), (77, 1), (32, 32), (31, 33), (97, 64), (200, 35)]
    noise = [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]
    return [*noise, Image.new("RGB", (9, 4), "black"), Image.new("RGB", (3, 8), "white")]


def coloured(n: int = 7, size: tuple[int, int] = (40, 33)) -> Dataset:
    """Noise, one picture for each id."""

    def draw(i: int) -> Image.Image:
        noise = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        return Image.fromarray(noise)

    records = tuple(ImageRecord(f"i{i}", lambda i=i: draw(i)) for i in range(n))
    return Dataset(name="noise", images=records, texts=(), tasks=Tasks(), decode="as made")


def bits(values: Any) -> Any:
    return values.view(torch.int32)


def undecorated(kind: str, model: Any, image: Image.Image) -> Tensor:
    """The library's own resized picture, before it scales anything."""
    if kind in OPEN_CLIP:
        for step in model.image.transform.transforms[:-2]:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    return model.image.processor(images=[image], **options)["pixel_values"][0]


@pytest.mark.parametrize("kind", FIXED)
def test_every_family_makes_its_pixels_of_levels_bit_for_bit(kind: str) -> None:
    model = kinds.model(kind)
    pixels = kinds.stacked(model, odd())
    levels = model.levels(pixels)
    assert levels.dtype == torch.uint8
    assert torch.equal(bits(model.normalised(levels)), bits(pixels))
    expected = torch.stack([undecorated(kind, model, image) for image in odd()])
    assert torch.equal(levels, expected)


@pytest.mark.parametrize("kind", FIXED)
def test_every_level_is_known_from_its_pixels(kind: str) -> None:
    model = kinds.model(kind)
    every = torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 256)
    assert torch.equal(model.levels(model.normalised(every)), every)


def test_pictures_that_keep_their_shape_have_no_pixels(fast_path: Path) -> None:
    model = kinds.model("siglip2-naflex")
    with pytest.raises(UnknownName, match="keep their shape"):
        model.levels(kinds.stacked(model))
    for backbone in (model, KeptStandIn()):
        with pytest.raises(UnknownName, match=r"image/pixels holds .* keep their shape .* leave"):
            build(dataset(3), backbone, fast_path / "c.zarr", streams=[PIXELS], progress=False)
    assert not (fast_path / "c.zarr").exists()


@pytest.mark.parametrize("kind", ["clip", "siglip2-hub", "llava"])
def test_a_cache_holds_what_the_backbone_reads(kind: str, fast_path: Path) -> None:
    model, data = kinds.model(kind), coloured()
    cache = build(data, model, fast_path / "c.zarr", streams=[PIXELS], progress=False)
    assert cache.shape(PIXELS) == (3, 32, 32)
    stored = torch.from_numpy(cache.read(PIXELS, cache.rows("image", [r.id for r in data.images])))
    pixels = kinds.stacked(model, [r.open() for r in data.images])
    assert torch.equal(bits(model.normalised(stored)), bits(pixels))


def test_pixels_alone_need_no_pass_through_the_backbone(make_cache: Make) -> None:
    backbone = StandIn()
    cache = make_cache(backbone=backbone, streams=[PIXELS, FLIP])
    assert backbone.encoded == []
    assert cache.streams == (PIXELS, FLIP)
    assert len(cache.header.arrays[PIXELS].dims) == 4
    for i, row in zip(range(13), cache.rows("image", [f"i{i}" for i in range(13)]), strict=True):
        colour = np.array([i * 7 % 256, i * 31 % 256, 255 - i], np.uint8)
        assert (cache.read(PIXELS, np.array([row]))[0] == colour[:, None, None]).all()


def test_only_looks_of_which_more_is_wanted_are_encoded(make_cache: Make) -> None:
    backbone = StandIn()
    streams = [PIXELS, "image/view_flip/pooled", "image/view_flip/block_1", "text/pooled"]
    cache = make_cache(backbone=backbone, streams=streams)
    assert sum(backbone.encoded) == 13 + 9
    assert cache.read("image/view_flip/pooled").shape == (13, 7)


def test_beside_other_streams_pixels_change_nothing(make_cache: Make) -> None:
    others = ["image/pooled", "image/patches", "image/block_1", "text/tokens"]
    plain, mixed = (make_cache(f"{len(s)}.zarr", streams=s) for s in (others, [*others, PIXELS]))
    for stream in ("image/pooled", "image/patches", "image/block_1"):
        np.testing.assert_array_equal(plain.read(stream), mixed.read(stream))
    alone = make_cache("alone.zarr", streams=[PIXELS])
    np.testing.assert_array_equal(alone.read(PIXELS), mixed.read(PIXELS))


def test_a_view_has_pixels_of_its_own(fast_path: Path) -> None:
    model, data = kinds.model("pe"), coloured(3)
    streams = [PIXELS, FLIP, "image/view_center/pixels"]
    cache = build(data, model, fast_path / "c.zarr", streams=streams, progress=False)
    rows = cache.rows("image", [r.id for r in data.images])
    for view in ("flip", "center"):
        looks = [VIEWS[view].apply(r.open()) for r in data.images]
        expected = model.levels(kinds.stacked(model, looks)).numpy()
        np.testing.assert_array_equal(cache.read(f"image/view_{view}/pixels", rows), expected)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_quarantined_picture_is_zeros(make_cache: Make, batch_size: int) -> None:
    streams = [PIXELS, "image/pooled"]
    cache = make_cache(dataset=dataset(bad=(3, 8)), streams=streams, batch_size=batch_size)
    whole = make_cache("whole.zarr", streams=streams, batch_size=batch_size)
    bad = np.array([cache.image_ids.index(i) for i in ("i3", "i8")])
    good = np.setdiff1d(np.arange(13), bad)
    assert set(cache.quarantined) == {"i3", "i8"}
    assert not cache.read(PIXELS, bad).any()
    assert np.isnan(cache.read("image/pooled", bad)).all()
    np.testing.assert_array_equal(cache.read(PIXELS, good), whole.read(PIXELS, good))


def test_copies_of_a_file_have_the_same_pixels(make_cache: Make, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), dtype=np.uint8)
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, pixels in zip(files, noise[[0, 1, 0]], strict=True):
        Image.fromarray(pixels).save(file)
    records = tuple(
        ImageRecord(f.name, lambda f=f: Image.open(f).convert("RGB"), path=lambda f=f: f)
        for f in files
    )
    data = replace(coloured(0), images=records)
    cache = make_cache(dataset=data, streams=[PIXELS])
    rows = cache.rows("image", ["a.png", "c.png", "b.png"])
    a, c, b = cache.read(PIXELS, rows)
    assert (a == c).all()
    assert "image/copies" in cache.header.arrays
    assert a[0, 0, 0] == noise[0, 0, 0, 0]
    assert b[0, 0, 0] == noise[1, 0, 0, 0]


KILLED = """
import sys
from pathlib import Path
from kill_builds import ending, in_child, killing_itself
from stand_in import StandIn, dataset
from cache_builder import build

def do(path):
    build(dataset(bad=(3,)), StandIn(), path, streams=["image/pixels", "image/pooled"], batch_size=4,
          chunk_bytes=250, progress=False)

folder, note = Path(sys.argv[1]), Path(sys.argv[1]) / "total"
assert ending(in_child(lambda: killing_itself(do, folder / "whole.zarr", None, note))) == 0
for part in (2, 3, 4):
    at = int(note.read_text()) * part // 5
    path = folder / f"killed{part}.zarr"
    code = ending(in_child(lambda: killing_itself(do, path, at, folder / "n")))
    listed = path / "manifest.jsonl"
    lines = listed.read_text().splitlines() if listed.exists() else []
    print(code, sum('"image/pixels"' in line for line in lines))
    do(path)
"""


def test_a_build_killed_half_way_ends_in_the_same_bytes(fast_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(fast_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    killed = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [code for code, _ in killed] == [-9, -9, -9]
    assert any(0 < n < 7 for _, n in killed)
    whole = FeatureCache.open(fast_path / "whole.zarr")
    for part in (2, 3, 4):
        cache = FeatureCache.open(fast_path / f"killed{part}.zarr")
        assert cache.verify().ok
        assert cache.digest() == whole.digest()


def test_a_flipped_byte_is_found(make_cache: Make) -> None:
    cache = make_cache(streams=[PIXELS], chunk_bytes=250)
    assert cache.verify().ok
    file = cache.chunks.file(PIXELS, 1)
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert any(f"chunk 1 of {PIXELS}" in problem for problem in cache.verify().problems)


def test_pixels_are_bytes_in_every_storage_mode(fast_path: Path) -> None:
    model, data = kinds.model("clip"), coloured()
    streams = [PIXELS, FLIP, "image/patches", "text/tokens"]
    found: dict[str, np.ndarray] = {}
    for mode in MODES:
        given = {"streams": streams, "storage": mode, "progress": False}
        cache = build(data, model, fast_path / f"{mode}.zarr", **given)
        layout = cache.layout(PIXELS)
        assert (layout.dtype, layout.torch_dtype) == ("uint8", "")
        assert layout.compressed == (mode == "lossless")
        assert f"{PIXELS}_scale" not in cache.header.arrays
        assert cache.verify().ok
        found[mode] = cache.read(PIXELS)
        assert found[mode].dtype == np.uint8
    for mode in MODES:
        np.testing.assert_array_equal(found[mode], found["fp16"])


def test_pixels_alone_build_under_a_mode_that_measures_a_sample(make_cache: Make) -> None:
    for mode in ("int8-channel", "fp8-token"):
        backbone = StandIn()
        cache = make_cache(f"{mode}.zarr", backbone=backbone, streams=[PIXELS], storage=mode)
        assert cache.read(PIXELS).dtype == np.uint8
        assert backbone.encoded == []


def test_a_chunk_of_pixels_is_of_the_usual_size() -> None:
    dims = {"patches": 49, "prefix": 1, "image_width": 768, "image_size": 224, "joint": 512}
    backbone = BackboneSpec(**{**SPEC.model_dump(), "dims": dims})
    claims = {"name": "d", "digest": "", "decode": "", "n_images": 10**5, "n_texts": 0}
    spec: Any = {"backbone": backbone, "dataset": claims, "streams": (PIXELS, "image/patches")}
    layout = plan(CacheSpec.model_validate(spec), {}, {})[PIXELS]
    assert 16 << 20 <= layout.chunk * layout.row_bytes <= 32 << 20


def test_appending_keeps_old_pixels_and_adds_new_ones(fast_path: Path) -> None:
    path, whole = fast_path / "c.zarr", dataset(21, 9)
    few = replace(whole, images=whole.images[:13], tasks=dataset(13, 9).tasks)
    given = {"streams": [PIXELS], "batch_size": 4, "chunk_bytes": 250, "progress": False}
    old = build(few, StandIn(), path, **given).read(PIXELS)
    cache = build(whole, StandIn(), path, append=True, **given)
    assert cache.verify().ok
    np.testing.assert_array_equal(cache.read(PIXELS)[:13], old)
    new = build(whole, StandIn(), fast_path / "new.zarr", **given)
    ids = [f"i{i}" for i in range(21)]
    for one in (cache, new):
        assert one.read(PIXELS, one.rows("image", ids))[20, 2, 0, 0] == 255 - 20


def test_an_h5_file_carries_pixels(make_cache: Make, fast_path: Path) -> None:
    cache = make_cache(streams=[PIXELS, "image/pooled"], dataset=dataset(bad=(3,)))
    file = export_hdf5(cache, fast_path / "c.h5")
    back = import_hdf5(file, fast_path / "back.zarr")
    assert back.digest() == cache.digest()
    np.testing.assert_array_equal(back.read(PIXELS), cache.read(PIXELS))


def test_a_mapping_of_foreign_features_refuses_pixels_by_name(tmp_path: Path) -> None:
    text = '[backbone]\nname = "x"\n[image]\nfile = "f.npz"\nids = "ids"\npixels = "pictures"\n'
    (tmp_path / "m.toml").write_text(text)
    with pytest.raises(ForeignError, match=r"no key image\.pixels .*known: .*pooled, patches"):
        read_mapping(tmp_path / "m.toml")


def test_xarray_opens_pixels_beside_patches(make_cache: Make) -> None:
    cache = make_cache(streams=[PIXELS, "image/patches", "image/block_0"])
    with xr.open_zarr(cache.path, group="image", consolidated=False) as group:
        assert group["pixels"].dims == ("image", "channel", "pixel_height", "pixel_width")
        np.testing.assert_array_equal(group["pixels"].values, cache.read(PIXELS))


class Rough(StandIn):
    """Its pixels are no multiples of a level."""

    def preprocess(self, image: Image.Image) -> Any:
        return super().preprocess(image) + 1e-3


def test_a_backbone_whose_pixels_do_not_come_back_is_refused(make_cache: Make) -> None:
    with pytest.raises(BadOutput, match=r"image/pixels: stand_in:none .*bit for bit .*leave"):
        make_cache(backbone=Rough(), streams=[PIXELS])
    with pytest.raises(NonConformance, match=r"normalised\(levels\(preprocess"):
        _check_levels(Rough())
    make_cache("without.zarr", backbone=Rough(), streams=["image/pooled"])


def test_the_suite_sees_levels_of_another_type_or_shape() -> None:
    class Wide(StandIn):
        def levels(self, pixels: Any) -> Tensor:
            return super().levels(pixels).float()

    with pytest.raises(NonConformance, match=r"levels: torch\.float32"):
        _check_levels(Wide())
    _check_levels(StandIn())


def test_what_is_offered_names_pixels_where_pictures_have_one_size(make_cache: Make) -> None:
    with pytest.raises(UnknownName, match=r"it offers, .*image/pixels"):
        make_cache(streams=["image/pixel"])
    with pytest.raises(UnknownName) as caught:
        make_cache(backbone=KeptStandIn(), streams=["image/pixel"])
    assert "image/pixels" not in str(caught.value)


def test_the_command_line_says_that_pixels_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["build", "--help"])
    assert "image/pixels" in capsys.readouterr().out


def test_info_lists_them(make_cache: Make, capsys: pytest.CaptureFixture[str]) -> None:
    cache = make_cache(streams=[PIXELS])
    main(["info", str(cache.path)])
    assert PIXELS in capsys.readouterr().out


DEEP = SPEC.model_copy(update={"dims": with_depth(DIMS, {"image": 2, "text": 3})})


def test_every_family_states_its_depth() -> None:
    for kind in KINDS:
        model = kinds.model(kind)
        assert model.spec.dims["image_blocks"] == model.depth["image"]
        assert model.spec.dims["text_blocks"] == model.depth["text"]


def test_a_cache_that_does_not_state_its_depth_is_opened_repaired_and_appended_to(
    fast_path: Path,
) -> None:
    path, whole = fast_path / "c.zarr", dataset(17, 9)
    few = replace(whole, images=whole.images[:13], tasks=dataset(13, 9).tasks)
    given = {"streams": ["image/pooled"], "batch_size": 4, "chunk_bytes": 60, "progress": False}
    old = build(few, StandIn(), path, **given)
    digest, fingerprint = old.digest(), old.fingerprint
    old.chunks.file("image/pooled", 1).unlink()
    states = StandIn()
    states.spec = DEEP
    repaired = build(few, states, path, **given)
    assert (repaired.digest(), repaired.fingerprint) == (digest, fingerprint)
    grown = build(whole, states, path, append=True, **given)
    assert grown.verify().ok
    assert grown.spec.backbone.dims["image_blocks"] == 2
    assert not next_place(path).exists()


def test_another_depth_is_another_backbone(make_cache: Make) -> None:
    states, deeper = StandIn(), StandIn()
    states.spec = DEEP
    deeper.spec = DEEP.model_copy(update={"dims": {**DEEP.dims, "image_blocks": 3}})
    make_cache(backbone=states, streams=["image/pooled"])
    with pytest.raises(CacheMismatch, match=r"dims\.image_blocks: expected 3, found 2"):
        make_cache(backbone=deeper, streams=["image/pooled"])
