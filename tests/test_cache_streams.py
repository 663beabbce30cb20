"""Streams beyond one vector and one grid a picture: blocks, views, crops, words, patches of pictures of any shape."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from stand_in import KeptStandIn, StandIn, WordStandIn, dataset
from torch import Tensor

from cache_builder import FeatureCache, build
from cache_builder import format as fmt
from cache_builder.backbones import clip, llava, siglip2
from cache_builder.backbones.base import Backbone
from cache_builder.chunks import Chunks
from cache_builder.datasets.base import CompositionTask, Dataset, ImageRecord, Tasks, TextRecord
from cache_builder.errors import (
    BadInput,
    BadOutput,
    CacheError,
    CacheMismatch,
    CacheTooOld,
    UnknownName,
)
from cache_builder.images import BadImage
from cache_builder.metadata import metadata_problem
from cache_builder.passes import Passes
from cache_builder.views import VIEWS, crop_boxes, resize_for_crops
from cache_builder.words import words_of

Make = Callable[..., FeatureCache]

SIZES = ((6, 6), (4, 9), (11, 2), (2, 2), (8, 6), (5, 12), (24, 2), (3, 3), (6, 4))
"""Width and height of pictures for the stand-in that keeps shapes: 9, 8, 5, 1, 12, 12, 12, 1 and 6 patches."""


class Stop(Exception):
    """Stands for whatever ends a build early."""


def picture(i: int, size: tuple[int, int]) -> Image.Image:
    """Noise, so that every part of every picture differs."""
    width, height = size
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8))


class Pictures:
    """A data set of noise whose files can be spoiled or exchanged, and which notes what is opened.

    Attributes:
        sizes: width and height by index; changing one is exchanging the file.
        headless, cut: indices of files without a readable header, and of those that end too early.
        opened: ids in the order of opening.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]] = SIZES, tasks: Tasks | None = None):
        self.sizes, self.tasks = list(sizes), tasks or Tasks()
        self.headless, self.cut = set[int](), set[int]()
        self.opened: list[str] = []

    def _measure(self, i: int) -> tuple[int, int]:
        if i in self.headless:
            raise BadImage(f"picture {i} has no header")
        return self.sizes[i]

    def _open(self, i: int) -> Image.Image:
        self.opened.append(f"i{i}")
        if i in self.headless | self.cut:
            raise BadImage(f"picture {i} is cut off")
        return picture(i, self.sizes[i])

    def dataset(self) -> Dataset:
        return Dataset(
            name="pictures",
            images=tuple(
                ImageRecord(f"i{i}", lambda i=i: self._open(i), lambda i=i: self._measure(i))
                for i in range(len(self.sizes))
            ),
            texts=(TextRecord("t0", "a text"),),
            tasks=self.tasks,
            decode="noise",
        )


def stopping_after(backbone: StandIn, n: int) -> StandIn:
    """The backbone, failing in its n-th batch."""

    def change(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(backbone.encoded) > n:
            raise Stop
        return outputs

    backbone.change = change
    return backbone


def encoded(backbone: Backbone, image: Image.Image, **asked: Any) -> dict[str, np.ndarray]:
    """What the backbone makes of one picture."""
    pixels = torch.utils.data.default_collate([backbone.preprocess(image)])
    with torch.inference_mode():
        return {k: v[0].numpy() for k, v in backbone.encode_images(pixels, **asked).items()}


# Blocks and views


LOOKS = [
    *("image/pooled", "image/block_0", "image/block_2"),
    *("image/view_flip/pooled", "image/view_flip/block_1", "image/view_lower_right/patches"),
]


def test_blocks_and_views_are_what_the_backbone_gives_for_that_look(make_cache: Make) -> None:
    backbone, data = StandIn(), Pictures()
    cache = make_cache(dataset=data.dataset(), backbone=backbone, storage="fp32", streams=LOOKS)
    for name in LOOKS:
        of = fmt.stream(name)
        blocks = () if of.block is None else (of.block,)
        for row, image_id in enumerate(cache.image_ids):
            i = int(image_id[1:])
            image = picture(i, data.sizes[i])
            shown = image if of.view is None else VIEWS[of.view].apply(image)
            expected = encoded(backbone, shown, blocks=blocks)[name.rpartition("/")[2]]
            np.testing.assert_allclose(cache.read(name)[row], expected, rtol=1e-6)


def test_a_picture_is_decoded_once_for_all_its_blocks_and_views(make_cache: Make) -> None:
    data = Pictures()
    make_cache(dataset=data.dataset(), streams=LOOKS)
    assert sorted(data.opened) == sorted(f"i{i}" for i in range(len(SIZES)))


def test_a_view_alone_needs_no_plain_stream(make_cache: Make) -> None:
    cache = make_cache(streams=["image/view_flip/prefix"])
    assert cache.streams == ("image/view_flip/prefix",)
    assert cache.spec.rules == {"flip": "mirrored left to right"}
    assert cache.read("image/view_flip/prefix").shape == (13, 2, 3)
    assert not (cache.path / "image/prefix").exists()


def test_a_bad_picture_is_nan_in_its_blocks_and_views_too(make_cache: Make) -> None:
    cache = make_cache(dataset=dataset(bad=(3,)), streams=LOOKS)
    row = np.array([cache.image_ids.index("i3")])
    for name in LOOKS:
        assert np.isnan(cache.read(name, row)).all(), name


def test_the_windows_are_seven_eighths_and_lie_where_they_say() -> None:
    image = picture(0, (16, 24))
    pixels = np.asarray(image)
    parts = {
        "center": pixels[2:23, 1:15],
        "upper_left": pixels[:21, :14],
        "upper_right": pixels[:21, 2:],
        "lower_left": pixels[3:, :14],
        "lower_right": pixels[3:, 2:],
        "flip": pixels[:, ::-1],
    }
    assert parts.keys() == VIEWS.keys()
    for name, expected in parts.items():
        np.testing.assert_array_equal(np.asarray(VIEWS[name].apply(image)), expected)


def test_the_last_blocks_run_on_a_cached_block_give_the_cached_patches(fast_path: Path) -> None:
    backbone = clip.tiny()
    cache = build(
        dataset(5, 2),
        backbone,
        fast_path / "c",
        streams=["image/block_1", "image/patches"],
        storage="fp32",
        progress=False,
    )
    entering = torch.from_numpy(cache.read("image/block_1"))
    with torch.no_grad():
        rest = backbone.resume_from("image", 1, entering)
    np.testing.assert_allclose(rest["patches"].numpy(), cache.read("image/patches"), atol=1e-5)


@pytest.mark.parametrize(
    "stream", ["image/view_back/pooled", "image/block_3", "image/view_flip/block_7", "word/states"]
)
def test_a_stream_that_nobody_can_fill_is_refused_with_what_there_is(
    make_cache: Make, stream: str
) -> None:
    with pytest.raises(UnknownName, match=rf"stand_in does not offer the streams {stream};") as e:
        make_cache(streams=["image/pooled", stream])
    for offered in ("image/pooled", "image/block_<k> for k = 0 … 2", "crop/pooled", "lower_left"):
        assert offered in str(e.value)


@pytest.mark.parametrize(
    "name",
    [
        *("image/block", "image/block_01", "image/block_x", "image//pooled", "image/view_/pooled"),
        *("image/view_flip/x/pooled", "text/view_flip/pooled", "crop/patches", "pooled", "image/"),
    ],
)
def test_a_name_that_the_format_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(UnknownName, match=f"no stream '{name}' in the cache format"):
        fmt.stream(name)
    assert not fmt.is_stream(name)


# Crops


@pytest.mark.parametrize(
    ("size", "rule", "count"),
    [
        *(((224, 224), "all", 140), ((500, 500), "all", 140), ((20, 20), "all", 140)),
        *(((352, 224), "all", 252), ((224, 384), "all", 280), ((640, 480), "fast", 114)),
        *(((224, 224), "fast", 86), ((30, 30), "fast", 86)),
    ],
)
def test_a_picture_has_as_many_crops_as_the_paper_counts(
    size: tuple[int, int], rule: str, count: int
) -> None:
    assert len(crop_boxes(*size, rule)) == count


@pytest.mark.parametrize("size", [(224, 224), (333, 250), (90, 200)])
def test_crops_are_all_squares_of_whole_cells_within_the_picture(size: tuple[int, int]) -> None:
    width, height = resize_for_crops(picture(0, size)).size
    assert min(width, height) == 224
    squares = {
        (x, y, x + side, y + side)
        for side in range(32, 225, 32)
        for x in range(0, width - side + 1, 32)
        for y in range(0, height - side + 1, 32)
    }
    boxes = crop_boxes(*size, "all")
    assert len(boxes) == len(squares)
    assert {tuple(box) for box in boxes.tolist()} == squares


@pytest.fixture
def crops(fast_path: Path) -> FeatureCache:
    """Crops of five pictures, of which one cannot be measured and one cannot be decoded."""
    data = Pictures(((40, 40), (30, 50), (60, 41), (20, 20), (52, 40)))
    data.headless, data.cut = {1}, {3}
    streams = ["crop/pooled", "image/pooled"]
    options: dict[str, Any] = {"crops": "fast", "batch_size": 37, "storage": "fp32"}
    path = fast_path / "crops"
    return build(data.dataset(), clip.tiny(), path, streams=streams, progress=False, **options)


def test_a_crop_s_vector_is_the_backbone_s_of_that_part(crops: FeatureCache) -> None:
    backbone, data = clip.tiny(), {0: (40, 40), 2: (60, 41), 4: (52, 40)}
    values, offsets = crops.read_ragged("crop/pooled")
    for i, size in data.items():
        (row,) = crops.rows("image", [f"i{i}"])
        resized = resize_for_crops(picture(i, size))
        boxes = crops.boxes()[offsets[row] : offsets[row + 1]]
        assert np.array_equal(boxes, crop_boxes(*size, "fast"))
        for at in (0, 50, len(boxes) - 1):
            expected = encoded(backbone, resized.crop(tuple(boxes[at].tolist())))["pooled"]
            np.testing.assert_allclose(values[offsets[row] + at], expected, atol=1e-5)


def test_a_bad_picture_has_no_crops_or_nan(crops: FeatureCache) -> None:
    assert crops.quarantined == {"i1": "picture 1 has no header", "i3": "picture 3 is cut off"}
    values, offsets = crops.read_ragged("crop/pooled")
    by_id = {i: values[offsets[row] : offsets[row + 1]] for row, i in enumerate(crops.image_ids)}
    assert by_id["i1"].shape == (0, 24)
    assert by_id["i3"].shape == (86, 24)
    assert np.isnan(by_id["i3"]).all()
    assert not np.isnan(np.concatenate([by_id[i] for i in ("i0", "i2", "i4")])).any()


def test_crops_know_their_images(crops: FeatureCache) -> None:
    owners, offsets = crops.crop_owners(), crops.offsets("crop/pooled")
    assert len(owners) == len(crops.boxes()) == crops.layout("crop/pooled").shape[0]
    for row in range(5):
        assert (owners[offsets[row] : offsets[row + 1]] == row).all()
    assert crops.shape("crop/pooled") == (max(np.diff(offsets)), 24)
    with pytest.raises(UnknownName, match="use read_ragged"):
        crops.read("crop/pooled")


FAST: dict[str, Any] = {"streams": ["crop/pooled"], "crops": "fast", "chunk_bytes": 1000}


def test_a_batch_of_crops_decodes_a_picture_once(make_cache: Make) -> None:
    data = Pictures(((20, 20), (20, 20), (20, 30)))
    cache = make_cache(dataset=data.dataset(), batch_size=43, workers=3, **FAST)
    owners = cache.crop_owners().tolist()
    batches = [set(owners[i : i + 43]) for i in range(0, len(owners), 43)]
    assert len(data.opened) == sum(map(len, batches))


def test_crops_stopped_and_resumed_are_crops_at_once(make_cache: Make) -> None:
    data = Pictures(((20, 20), (20, 20), (20, 30)))
    whole = make_cache("whole.zarr", dataset=data.dataset(), batch_size=20, **FAST)
    stopping = stopping_after(StandIn(), 7)
    with pytest.raises(Stop):
        make_cache(dataset=data.dataset(), batch_size=20, backbone=stopping, **FAST)
    rest = StandIn()
    cache = make_cache(dataset=data.dataset(), batch_size=20, backbone=rest, **FAST)
    assert cache.digest() == whole.digest()
    assert 0 < len(rest.encoded) < -(-len(whole.boxes()) // 20)


class Alone:
    """An engine of nobody else: this process builds every unit by itself."""

    def helping(self, passes: object) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize("kept", [False, True])
def test_what_is_known_of_all_pictures_is_read_once_and_not_for_every_unit(
    make_cache: Make, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    data = Pictures(((20, 20), (20, 20), (20, 30)))
    backbone = KeptStandIn() if kept else StandIn()
    given: dict[str, Any] = {**FAST, "batch_size": 20, "backbone": backbone}
    given["streams"] = ["image/patches"] if kept else ["crop/pooled"]
    given["chunk_bytes"] = 100 if kept else 1000
    alone = make_cache("alone.zarr", dataset=data.dataset(), **given)
    read, units = Counter[str](), list[str]()
    whole, run = Chunks.read_whole, Passes.run

    def counting(chunks: Chunks, array: str) -> bytes:
        read[array] += 1
        return whole(chunks, array)

    def noting(passes: Passes, side: Any, only: Any = None) -> None:
        units.append(side)
        run(passes, side, only)

    monkeypatch.setattr(Chunks, "read_whole", counting)
    monkeypatch.setattr(Passes, "run", noting)
    shared = make_cache(dataset=data.dataset(), engine=Alone(), **given)
    assert len(units) > 1
    wanted = ["image/grid"] if kept else ["crop/box", "crop/offsets"]
    assert {name: read[name] for name in wanted} == dict.fromkeys(wanted, 1)
    assert shared.digest() == alone.digest()


def test_a_lost_chunk_of_crops_is_filled_in_again(make_cache: Make) -> None:
    data = Pictures(((20, 20), (20, 20), (20, 30)))
    cache = make_cache(dataset=data.dataset(), **FAST)
    assert cache.layout("crop/pooled").n_chunks > 1
    cache.chunks.file("crop/pooled", 1).unlink()
    assert make_cache(dataset=data.dataset(), **FAST).digest() == cache.digest()


def test_a_picture_of_another_size_than_its_crops_were_planned_for_is_an_error(
    make_cache: Make,
) -> None:
    data = Pictures(((20, 20), (20, 20), (20, 30)))
    with pytest.raises(Stop):
        make_cache(dataset=data.dataset(), backbone=stopping_after(StandIn(), 0), **FAST)
    data.sizes[2] = (30, 20)  # as many crops, elsewhere
    with pytest.raises(BadOutput, match=r"'i2' has another size \(30 × 20\) than when its crops"):
        make_cache(dataset=data.dataset(), **FAST)
    data.sizes[2] = (20, 30)
    assert make_cache(dataset=data.dataset(), **FAST).quarantined == {}


def test_an_unknown_rule_of_crops_names_the_known_ones(make_cache: Make) -> None:
    with pytest.raises(UnknownName, match=r"no crops called 'few' \(known: all, fast\)"):
        make_cache(streams=["crop/pooled"], crops="few")


def test_another_rule_of_crops_is_another_cache(make_cache: Make) -> None:
    make_cache(dataset=Pictures(((20, 20),)).dataset(), **FAST)
    with pytest.raises(
        CacheMismatch, match=r"rules.crop: expected 'all: .*found 'fast: short side"
    ):
        make_cache(dataset=Pictures(((20, 20),)).dataset(), **{**FAST, "crops": "all"})


def test_the_command_that_resumes_names_the_crops(make_cache: Make) -> None:
    cache = make_cache(dataset=Pictures(((20, 20),)).dataset(), **FAST)
    assert " --streams crop/pooled --dtype float32 --crops fast " in cache.chunks.command


# Words


PAIRS = {
    "train": (("orange", "orange"), ("chain-link", "fence")),
    "test": (("orange", "old_fence"), ("chain-link", "fence")),
}

CZSL = Tasks(czsl=CompositionTask(examples=(), pairs=PAIRS, prompts={}))


def test_words_have_their_role_in_their_id_and_compounds_have_parts() -> None:
    assert [(word.id, word.parts) for word in words_of(CZSL)] == [
        ("attr:chain-link", ("chain", "link")),
        ("attr:orange", ("orange",)),
        ("obj:fence", ("fence",)),
        ("obj:old_fence", ("old", "fence")),
        ("obj:orange", ("orange",)),
        ("pair:chain-link fence", ("chain link fence",)),
        ("pair:orange old_fence", ("orange old fence",)),
        ("pair:orange orange", ("orange orange",)),
    ]


def test_pairs_that_read_alike_are_one_word() -> None:
    pairs = {"train": (("dark red", "cup"), ("dark", "red cup"))}
    words = words_of(Tasks(czsl=CompositionTask(examples=(), pairs=pairs, prompts={})))
    assert [word.id for word in words].count("pair:dark red cup") == 1


@pytest.fixture
def words(make_cache: Make) -> FeatureCache:
    data = Pictures(SIZES[:3], CZSL).dataset()
    return make_cache(dataset=data, backbone=WordStandIn(), storage="fp32")


def test_a_word_s_states_are_those_of_its_parts(words: FeatureCache) -> None:
    backbone = WordStandIn()
    for row, word in enumerate(words_of(CZSL)):
        assert words.rows("word", [word.id]).tolist() == [row]
        parts = np.arange(words.word_parts[row], words.word_parts[row + 1])
        assert tuple(words.word_strings[part] for part in parts) == word.parts
        ids = [backbone.tokenize_words([part])[0] for part in word.parts]
        real = torch.cat([one[one > 0] for one in ids])
        states, offsets = words.read_ragged("word/states", parts)
        assert np.diff(offsets).tolist() == [int((one > 0).sum()) for one in ids]
        expected = torch.stack([real.float(), -real.float(), real / 4, torch.ones(len(real))], 1)
        np.testing.assert_allclose(states, expected.numpy())
        np.testing.assert_array_equal(words.read_ragged("word/ids", parts)[0], real.numpy())


def test_words_stopped_and_resumed_are_words_at_once(make_cache: Make, words: FeatureCache) -> None:
    given = {"dataset": Pictures(SIZES[:3], CZSL).dataset(), "storage": "fp32"}
    with pytest.raises(Stop):
        make_cache("half.zarr", backbone=stopping_after(WordStandIn(), 2), **given)
    half = FeatureCache.open(words.path.with_name("half.zarr"), allow_building=True)
    assert ("word/states", 0) in half.chunks.manifest
    assert ("word/states", half.layout("word/states").n_chunks - 1) in half.pending()
    assert make_cache("half.zarr", backbone=WordStandIn(), **given).digest() == words.digest()


def test_words_come_only_with_a_task_that_has_some(make_cache: Make) -> None:
    cache = make_cache(dataset=Pictures().dataset(), backbone=WordStandIn())
    assert "word/states" not in cache.streams
    with pytest.raises(UnknownName, match=r"holds no words: build with the stream word/states"):
        cache.rows("word", ["attr:orange"])


def test_llava_s_words_are_stored_as_it_gives_them(fast_path: Path) -> None:
    backbone = llava.tiny()
    data = Pictures(((9, 9),), CZSL).dataset()
    options: dict[str, Any] = {"streams": ["word/states"], "storage": "fp32"}
    cache = build(data, backbone, fast_path / "c", progress=False, **options)
    with torch.inference_mode():
        out = backbone.encode_words(backbone.tokenize_words(cache.word_strings))
    values, offsets = cache.read_ragged("word/states")
    np.testing.assert_array_equal(np.diff(offsets), out["length"].numpy())
    for part, start in enumerate(offsets[:-1]):
        expected = out["states"][part, : out["length"][part]].numpy()
        np.testing.assert_allclose(values[start : offsets[part + 1]], expected, atol=1e-5)


# Pictures that keep their shape


KEPT: dict[str, Any] = {
    "streams": ["image/pooled", "image/patches", "image/block_1", "image/view_flip/patches"]
}


def test_a_picture_has_as_many_rows_as_patches(make_cache: Make) -> None:
    data = Pictures()
    cache = make_cache(dataset=data.dataset(), backbone=KeptStandIn(), storage="fp32", **KEPT)
    backbone = KeptStandIn()
    grids = {i: backbone.grid(*size) for i, size in enumerate(SIZES)}
    for name, home in (("image/patches", "image"), ("image/view_flip/patches", "image/view_flip")):
        values, offsets = cache.read_ragged(name)
        np.testing.assert_array_equal(offsets, cache.offsets(name))
        for row, image_id in enumerate(cache.image_ids):
            i = int(image_id[1:])
            shown = picture(i, SIZES[i])
            shown = VIEWS["flip"].apply(shown) if "flip" in name else shown
            expected = encoded(backbone, shown)["patches"]
            np.testing.assert_allclose(values[offsets[row] : offsets[row + 1]], expected, rtol=1e-6)
            assert tuple(cache.grid(home)[row]) == grids[i]
    assert cache.shape("image/patches") == (12, 3)
    assert cache.layout("image/patches").shape == (66, 3)


def test_blocks_have_the_same_rows_as_patches(make_cache: Make) -> None:
    cache = make_cache(dataset=Pictures().dataset(), backbone=KeptStandIn(), storage="fp32", **KEPT)
    blocks, offsets = cache.read_ragged("image/block_1")
    patches, same = cache.read_ragged("image/patches")
    np.testing.assert_array_equal(offsets, same)
    np.testing.assert_allclose(blocks + 2, patches, rtol=1e-6)


def test_a_window_has_the_patches_of_its_own_size(make_cache: Make) -> None:
    streams = ["image/patches", "image/view_center/patches"]
    data = Pictures(((8, 6), (4, 4)))
    cache = make_cache(dataset=data.dataset(), backbone=KeptStandIn(), streams=streams)
    (row,) = cache.rows("image", ["i0"])
    assert tuple(cache.grid()[row]) == (3, 4)
    assert tuple(cache.grid("image/view_center")[row]) == (2, 3)


def test_siglip2_s_patches_are_stored_as_it_gives_them(fast_path: Path) -> None:
    backbone, data = siglip2.tiny_hub(), Pictures(((40, 60), (90, 30), (33, 33)))
    cache = build(
        data.dataset(), backbone, fast_path / "c", batch_size=2, storage="fp32", progress=False
    )
    values, offsets = cache.read_ragged("image/patches")
    pooled = cache.read("image/pooled")
    for row, image_id in enumerate(cache.image_ids):
        i = int(image_id[1:])
        expected = encoded(backbone, picture(i, data.sizes[i]))
        grid = cache.grid()[row]
        assert offsets[row + 1] - offsets[row] == grid.prod() == expected["length"]
        real = expected["patches"][: expected["length"]]
        np.testing.assert_allclose(values[offsets[row] : offsets[row + 1]], real, atol=1e-5)
        np.testing.assert_allclose(pooled[row], expected["pooled"], atol=1e-5)


def test_a_picture_without_a_header_has_no_rows_and_one_cut_off_has_nan(make_cache: Make) -> None:
    data = Pictures()
    data.headless, data.cut = {0, 6}, {4, 5}
    cache = make_cache(dataset=data.dataset(), backbone=KeptStandIn(), **KEPT)
    reasons = {f"i{i}": f"picture {i} has no header" for i in (0, 6)}
    assert cache.quarantined == reasons | {f"i{i}": f"picture {i} is cut off" for i in (4, 5)}
    for name in ("image/patches", "image/block_1", "image/view_flip/patches"):
        values, offsets = cache.read_ragged(name)
        for row, image_id in enumerate(cache.image_ids):
            i, own = int(image_id[1:]), values[offsets[row] : offsets[row + 1]]
            assert len(own) == (0 if i in data.headless else np.prod(KeptStandIn().grid(*SIZES[i])))
            assert np.isnan(own).all() if i in data.cut else not np.isnan(own).any()
    bad = [row for row, i in enumerate(cache.image_ids) if i in cache.quarantined]
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(cache.read("image/pooled")).all(1)), bad)
    assert set(data.opened).isdisjoint({"i0", "i6"})
    assert cache.verify().ok


def test_a_data_set_without_one_measurable_picture_is_refused(make_cache: Make) -> None:
    data = Pictures(SIZES[:3])
    data.headless = {0, 1, 2}
    with pytest.raises(BadInput, match="not one of the 3 images can be used"):
        make_cache(dataset=data.dataset(), backbone=KeptStandIn(), **KEPT)


def test_strict_fails_at_a_picture_that_cannot_be_measured_and_keeps_no_grudge(
    make_cache: Make,
) -> None:
    data = Pictures()
    data.headless = {2}
    given = {"dataset": data.dataset(), "backbone": KeptStandIn(), "strict": True, **KEPT}
    with pytest.raises(BadInput, match=r"^image 'i2' cannot be used: picture 2 has no header$"):
        make_cache(**given)
    data.headless = set()
    assert make_cache(**given).quarantined == {}


def test_a_machine_that_fails_while_measuring_condemns_no_picture(make_cache: Make) -> None:
    def fail() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    data = Pictures().dataset()
    images = [replace(r, measure=fail) if r.id == "i3" else r for r in data.images]
    with pytest.raises(CacheError, match=r"image 'i3' could not be read .*Too many open files"):
        make_cache(dataset=replace(data, images=tuple(images)), backbone=KeptStandIn(), **KEPT)
    assert make_cache(dataset=data, backbone=KeptStandIn(), **KEPT).quarantined == {}


def test_a_picture_of_another_size_than_was_planned_is_an_error(make_cache: Make) -> None:
    data = Pictures()
    with pytest.raises(Stop):
        make_cache(dataset=data.dataset(), backbone=stopping_after(KeptStandIn(), 0), **KEPT)
    data.sizes[4] = (6, 6)
    with pytest.raises(BadOutput, match=r"another size .* than when its patches were planned"):
        make_cache(dataset=data.dataset(), backbone=KeptStandIn(), **KEPT)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5])
def test_ragged_patches_in_two_pieces_are_those_built_at_once(make_cache: Make, after: int) -> None:
    data = Pictures()
    data.headless, data.cut = {0, 6}, {4, 5}
    given = {"dataset": data.dataset(), "batch_size": 2, **KEPT}
    whole = make_cache("whole.zarr", backbone=KeptStandIn(), **given)
    with pytest.raises(Stop):
        make_cache("pieces.zarr", backbone=stopping_after(KeptStandIn(), after), **given)
    assert make_cache("pieces.zarr", backbone=KeptStandIn(), **given).digest() == whole.digest()


@pytest.mark.parametrize("stream", ["image/patches", "image/view_flip/patches", "image/pooled"])
def test_any_lost_chunk_is_filled_in_again(make_cache: Make, stream: str) -> None:
    data = Pictures()
    data.headless, data.cut = {0, 6}, {4, 5}
    given = {"dataset": data.dataset(), "backbone": KeptStandIn(), **KEPT}
    cache = make_cache(**given)
    before = cache.digest()
    for chunk in range(cache.layout(stream).n_chunks):
        cache.chunks.file(stream, chunk).unlink()
        assert make_cache(**given).digest() == before
    assert FeatureCache.open(cache.path).verify().ok


def test_pictures_of_one_shape_have_neither_grid_nor_offsets(make_cache: Make) -> None:
    cache = make_cache(streams=["image/patches", "image/view_flip/patches"])
    assert not any(name.endswith(("/grid", "/offsets")) for name in cache.header.arrays)
    with pytest.raises(UnknownName, match="image/grid"):
        cache.grid()


# All of them


def test_plain_zarr_reads_every_array_with_its_axes_named(make_cache: Make) -> None:
    class All(KeptStandIn, WordStandIn):
        streams = KeptStandIn.streams | {"word/states", "text/tokens"}

    streams = [*KEPT["streams"], "crop/pooled", "word/states", "text/tokens"]
    data = Pictures(tasks=CZSL).dataset()
    cache = make_cache(dataset=data, backbone=All(), streams=streams, crops="fast")
    group: Any = zarr.open_group(str(cache.path), mode="r")
    axes = {name: group[name].metadata.dimension_names for name in cache.header.arrays}
    assert axes["image/patches"] == ("patch", "width")
    assert axes["image/view_flip/patches"] == ("flip_patch", "width")
    assert axes["image/block_1"] == ("patch", "width")
    assert axes["image/offsets"] == axes["crop/offsets"] == axes["word/offsets"] == ("bound",)
    assert axes["image/grid"] == axes["image/view_flip/grid"] == ("image", "rows_columns")
    assert axes["crop/pooled"] == ("crop", "embedding")
    assert axes["crop/box"] == ("crop", "edge")
    assert axes["word/states"] == ("token", "width")
    assert (axes["word/id"], axes["word/string"]) == (("word",), ("part",))
    assert axes["word/parts"] == ("word_bound",)
    for name, layout in cache.header.arrays.items():
        assert metadata_problem(cache.place, layout) is None
        assert group[name].shape == layout.shape
    bounds = group["word/offsets"][:]
    part = group["word/parts"][cache.word_ids.index("obj:fence")]
    np.testing.assert_array_equal(
        group["word/states"][bounds[part] : bounds[part + 1]],
        cache.read_ragged("word/states", np.array([part]))[0],
    )


def test_blocks_of_a_fixed_grid_name_their_rows(make_cache: Make) -> None:
    layout = make_cache(streams=["image/block_1"]).layout("image/block_1")
    assert (layout.dims, layout.shape) == (("image", "row", "width"), (13, 7, 3))


def test_an_older_schema_is_refused_with_both_numbers(make_cache: Make) -> None:
    cache = make_cache()
    file = cache.path / "zarr.json"
    root = json.loads(file.read_text())
    root["attributes"]["schema_version"] = 1
    del root["attributes"]["spec"]["rules"]
    file.write_text(json.dumps(root))
    message = r"has schema 1, .* reads schema 4; remove it and build again"
    for use in (make_cache, lambda: FeatureCache.open(cache.path)):
        with pytest.raises(CacheTooOld, match=message):
            use()


def test_a_picture_too_long_for_crops_has_none() -> None:
    assert len(crop_boxes(1, 8, "all"))
    assert crop_boxes(1, 9, "all").shape == (0, 4)
    assert crop_boxes(30_000, 1, "fast").shape == (0, 4)
