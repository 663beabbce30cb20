"""`headstart browse` without its page: neighbours, maps and samples against slow loops; what is refused, and how."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from small_caches import ragged, shaped
from stand_in import KeptStandIn, StandIn, dataset

from cache_builder import FeatureCache, build, load_backbone, load_dataset
from cache_builder.browse import (
    Grid,
    grid_of,
    nearest,
    nearest_to_image,
    nearest_to_text,
    patch_map,
    patches_of,
    spaces_of,
    unit,
)
from cache_builder.browse_pictures import mapped, opened, pictures_of, scaled, span
from cache_builder.browse_samples import found_images, found_texts, samples_of
from cache_builder.cli import main
from cache_builder.covered import Box, covered
from cache_builder.datasets import folder
from cache_builder.datasets.base import MatchingExample
from cache_builder.errors import CacheMismatch, UnknownName
from heads.pictures import square

Make = Callable[..., FeatureCache]

VECTORS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 7), st.integers(1, 5)),
    elements=st.integers(-3, 3).map(float),
)
"""Small numbers, so that equal cosines and rows of zeros occur."""


def cosine(a: Any, b: Any) -> float:
    """By the definition, in double precision."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = float(np.sqrt((a * a).sum()) * np.sqrt((b * b).sum()))
    return float((a * b).sum()) / lengths if lengths else 0.0


# ── neighbours ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(VECTORS, st.integers(1, 9), st.data())
def test_neighbours_are_those_of_a_slow_loop(vectors: Any, k: int, data: st.DataObject) -> None:
    query = data.draw(st.integers(0, len(vectors) - 1))
    rows = unit(vectors)
    slow = {i: cosine(vectors[i], vectors[query]) for i in range(len(vectors)) if i != query}
    found = nearest(rows, rows[query], k, without=query)
    assert len(found) == min(k, len(slow))
    for i, value in found:
        assert value == pytest.approx(slow[i], abs=1e-6)
    kept = {i for i, _ in found}
    best, rest = [slow[i] for i in kept], [slow[i] for i in slow if i not in kept]
    assert not best or not rest or min(best) >= max(rest) - 1e-6
    assert [value for _, value in found] == sorted((value for _, value in found), reverse=True)


@given(
    arrays.arrays(np.float32, (6, 4), elements=st.floats(-2, 2, width=16), unique=True),
    st.permutations(range(6)),
)
def test_neighbours_permute_with_the_images(vectors: Any, order: list[int]) -> None:
    rows = unit(vectors)
    plain = nearest(rows, rows[2], 6)
    moved = nearest(rows[order], rows[2], 6)
    values = [value for _, value in plain]
    np.testing.assert_allclose([value for _, value in moved], values, atol=1e-6)
    if min(np.abs(np.diff(values))) > 1e-5:  # else two images may change places
        assert [order[i] for i, _ in moved] == [i for i, _ in plain]


def test_equal_images_stay_in_order_and_a_row_of_zeros_is_like_nothing() -> None:
    rows = unit(np.array([[0, 0], [1, 0], [2, 0], [1e-20, 0], [1e19, 0]], np.float32))
    assert [i for i, _ in nearest(rows, rows[1], 4)] == [1, 2, 3, 4]
    assert {value for _, value in nearest(rows, rows[0], 4)} == {0.0}


def test_images_are_compared_by_pooled_embeddings_and_texts_find_them(make_cache: Make) -> None:
    cache = make_cache(dataset=dataset(bad=(3, 8)))
    samples = samples_of([cache], None, 100)
    (space,) = spaces_of([cache], samples)
    assert (space.name, space.of, space.is_joint) == ("stand_in:none", "pooled embeddings", True)
    assert not space.lacks
    assert len(samples.ids) == 11
    assert {*samples.bad} == {"i3", "i8"}
    pooled = {i: cache.read("image/pooled", cache.rows("image", [i]))[0] for i in samples.ids}
    found = nearest_to_image(space, 4, 3)
    slow = {i: cosine(pooled[samples.ids[4]], v) for i, v in pooled.items() if i != samples.ids[4]}
    for i, value in found:
        assert value == pytest.approx(slow[samples.ids[i]], abs=1e-5)
    assert found[-1][1] >= sorted(slow.values(), reverse=True)[2] - 1e-5
    text = cache.read("text/pooled", cache.rows("text", ["t5"]))[0]
    for i, value in nearest_to_text(space, "t5", 3):
        assert value == pytest.approx(cosine(text, pooled[samples.ids[i]]), abs=1e-5)


@pytest.mark.parametrize("kept", [False, True], ids=["one grid", "own shapes"])
def test_without_pooled_embeddings_images_are_compared_by_mean_patches(
    make_cache: Make, kept: bool
) -> None:
    given: dict[str, Any] = (
        {"dataset": shaped(), "backbone": KeptStandIn()} if kept else {"dataset": dataset(bad=(2,))}
    )
    cache = make_cache(streams=["image/patches", "text/pooled"], **given)
    samples = samples_of([cache], None, 100)
    (space,) = spaces_of([cache], samples)
    assert "means" in space.of
    assert not space.is_joint
    assert any("no joint space" in lack for lack in space.lacks)
    assert nearest_to_text(space, cache.text_ids[0], 3) == []
    assert space.images is not None
    for i, row in enumerate(space.rows):
        at = np.array([row])
        tokens = (
            cache.read_ragged("image/patches", at)[0]
            if kept
            else cache.read("image/patches", at)[0]
        )
        mean = [float(np.mean([t[c] for t in tokens.astype(np.float64)])) for c in range(3)]
        assert cosine(mean, space.images[i]) == pytest.approx(1, abs=1e-6)


def test_a_cache_that_cannot_compare_says_so(make_cache: Make) -> None:
    cache = make_cache(streams=["image/prefix", "text/pooled"])
    (space,) = spaces_of([cache], samples_of([cache], None, 100))
    assert nearest_to_image(space, 0, 3) == []
    assert len(space.lacks) == 3


# ── maps ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def stored(fast_folder: Path) -> dict[str, FeatureCache]:
    """A few pictures under the bundled CLIP, 7 × 7 patches, in every storage."""
    root = folder.miniature(fast_folder / "browse-photos")
    photos, clip = load_dataset("folder", root), load_backbone("clip:demo")
    modes = ("fp16", "bf16", "int8-channel", "fp8-token", "pool2x2", "lossless")
    return {
        mode: build(photos, clip, fast_folder / f"browse-{mode}.zarr", storage=mode, progress=False)
        for mode in modes
    }


def test_a_map_is_the_cosine_of_every_patch_with_one(stored: dict[str, FeatureCache]) -> None:
    for cache in stored.values():
        tokens = cache.read("image/patches", np.array([1, 4])).astype(np.float64)
        n = tokens.shape[1]
        for patch in (0, n // 2, n - 1):
            for other, shown in ((None, tokens[0]), (4, tokens[1])):
                found = patch_map(cache, 1, patch, other)
                slow = [cosine(tokens[0, patch], token) for token in shown]
                assert found.shape == grid_of(cache, 1).shape
                np.testing.assert_allclose(found.ravel(), slow, atol=2e-6)


def test_a_patch_is_most_like_itself_and_likeness_has_no_direction(
    stored: dict[str, FeatureCache],
) -> None:
    whole = np.stack([patch_map(stored["fp16"], 2, i).ravel() for i in range(49)])
    np.testing.assert_allclose(np.diag(whole), 1, atol=1e-6)
    assert (whole.max(1) <= np.diag(whole) + 1e-6).all()
    np.testing.assert_allclose(whole, whole.T, atol=1e-6)
    assert whole.min() < 0.9  # and not everything is alike


def test_pooled_windows_lie_where_their_patches_lay(stored: dict[str, FeatureCache]) -> None:
    full, pooled = stored["fp16"], stored["pool2x2"]
    grid = grid_of(pooled, 0)
    assert (grid.shape, grid_of(full, 0).shape) == ((4, 4), (7, 7))
    row = int(pooled.rows("image", [full.image_ids[0]])[0])
    tokens = full.read("image/patches", np.array([0]))[0].reshape(7, 7, -1).astype(np.float32)
    windows = pooled.read("image/patches", np.array([row]))[0]
    for r in range(7):
        for c in range(7):
            at = grid.patch_at((c + 0.5) / 7, (r + 0.5) / 7)
            assert at is not None
            a, b = r // 2 * 2, c // 2 * 2
            mean = tokens[a : a + 2, b : b + 2].mean((0, 1))
            assert cosine(mean, windows[at]) > 0.9999


def test_pictures_that_keep_their_shape_have_their_own_grids(fast_path: Path) -> None:
    cache = ragged(fast_path / "r.zarr")
    shapes = {}
    for name in sorted({*cache.image_ids} - {*cache.quarantined}):
        row = int(cache.rows("image", [name])[0])
        grid = grid_of(cache, row)
        p, q = shapes[name] = grid.shape
        tokens = patches_of(cache, row)
        for patch in range(p * q):
            x, y = (patch % q + 0.5) / q, (patch // q + 0.5) / p
            assert grid.patch_at(x, y) == patch
            slow = [cosine(tokens[patch], token) for token in tokens]
            np.testing.assert_allclose(patch_map(cache, row, patch).ravel(), slow, atol=2e-6)
    assert (shapes["i0"], shapes["i1"], shapes["i2"]) == ((3, 3), (4, 2), (1, 5))


def test_patches_in_no_square_are_refused_by_number(make_cache: Make) -> None:
    with pytest.raises(UnknownName, match="holds 5 patches an image, which make no square grid"):
        grid_of(make_cache(), 0)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(-0.5, 1.5), st.floats(-0.5, 1.5))
def test_a_point_is_in_the_patch_whose_borders_surround_it(
    p: int, q: int, x: float, y: float
) -> None:
    grid = Grid(np.arange(p + 1) / p, np.arange(q + 1) / q)
    found = grid.patch_at(x, y)
    assert (found is None) == (not (0 <= x <= 1 and 0 <= y <= 1))
    if found is not None:
        row, column = divmod(found, q)
        assert grid.ys[row] <= y <= grid.ys[row + 1]
        assert grid.xs[column] <= x <= grid.xs[column + 1]


# ── what of a picture is covered ─────────────────────────────────────────────────────────────────────────────────────

MODES = {
    '{"resize_mode": "shortest"}': Box(1 / 6, 0, 5 / 6, 1),
    '{"resize_mode": "longest"}': Box(0, -1 / 4, 1, 5 / 4),
    '{"resize_mode": "squash"}': Box(0, 0, 1, 1),
    '{"do_center_crop": true, "do_pad": true}': Box(0, -1 / 4, 1, 5 / 4),
    '{"do_center_crop": true}': Box(1 / 6, 0, 5 / 6, 1),
    "mean colour": Box(0, 0, 1, 1),
}


@pytest.mark.parametrize("preprocessing", MODES)
def test_what_is_covered_is_what_heads_draw(preprocessing: str) -> None:
    """A click and a drawn map must mean the same patch: held against the squares that `--pictures` writes."""
    box = covered(90, 60, preprocessing)
    assert tuple(box) == pytest.approx(tuple(MODES[preprocessing]))
    upright = covered(60, 90, preprocessing)
    assert tuple(upright) == pytest.approx((box.upper, box.left, box.lower, box.right))
    ramp = np.zeros((60, 90, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(90) * 2, np.arange(60)[:, None] * 3
    ramp[..., 2] = 255  # of the picture itself, not of what pads it
    drawn = square(Image.fromarray(ramp), preprocessing)
    side = len(drawn)
    for x, y in ((0.5, 0.5), (0.3, 0.2), (0.7, 0.9)):
        across, down = box.within(x, y)
        pixel = drawn[int(down * side), int(across * side)]
        assert pixel[2] == 255
        assert pixel[0] / 2 == pytest.approx(x * 90, abs=2)
        assert pixel[1] / 3 == pytest.approx(y * 60, abs=2)


# ── the drawn map ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_brighter_is_more_alike_and_what_is_cut_off_is_dark() -> None:
    values = np.linspace(-0.5, 0.9, 12, dtype=np.float32)
    cosines = np.random.default_rng(0).permutation(values).reshape(3, 4)
    grid = Grid(np.arange(4) / 3, np.arange(5) / 4)
    picture = Image.new("RGB", (240, 120), (100, 100, 100))
    shown = np.asarray(mapped(picture, grid, Box(0.25, 0.0, 0.75, 1.0), cosines)).astype(int)
    light = [
        shown[int((r + 0.5) / 3 * 120), int((0.25 + (c + 0.5) / 4 / 2) * 240)].sum()
        for r in range(3)
        for c in range(4)
    ]
    assert np.argsort(light).tolist() == np.argsort(cosines.ravel()).tolist()
    assert {tuple(pixel) for pixel in shown[:, 10]} == {(25, 25, 25)}


def test_the_patch_itself_does_not_stretch_the_scale_and_is_framed() -> None:
    cosines = np.array([[1.0, 0.2], [0.1, 0.3]], np.float32)
    assert span(cosines, 0) == pytest.approx((0.1, 0.3))
    assert span(cosines) == pytest.approx((0.1, 1.0))
    assert span(np.ones((1, 1), np.float32), 0) == (1.0, 1.0)
    grid = Grid(np.arange(3) / 2, np.arange(3) / 2)
    picture, whole = Image.new("RGB", (80, 80)), Box(0.0, 0.0, 1.0, 1.0)
    plain = np.asarray(mapped(picture, grid, whole, cosines))
    framed = np.asarray(mapped(picture, grid, whole, cosines, 0))
    assert (framed[60, 60] > plain[60, 60]).any()  # 0.3 is now the brightest there is
    assert (framed[:40, :40] == 255).all(-1).any()
    assert not (framed[44:, 44:] == 255).all(-1).any()


# ── samples ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_caches_of_different_samples_are_refused_by_the_ids_that_differ(make_cache: Make) -> None:
    one, fewer = make_cache("a.zarr"), make_cache("b.zarr", dataset=dataset(11))
    with pytest.raises(CacheMismatch, match=r"2 image ids .*'i1[12]', 'i1[12]'.*build both from"):
        samples_of([one, fewer], None, 100)
    said = dataset(
        texts=[f"other {i}" if i == 4 else f"text {i} " + "é" * (i % 4) for i in range(9)]
    )
    with pytest.raises(CacheMismatch, match=r"1 text ids .*\('t4'\)"):
        samples_of([one, make_cache("c.zarr", dataset=said)], None, 100)
    named = replace(dataset(), name="another")
    with pytest.raises(CacheMismatch, match=r"holds stand_in and .* holds another"):
        samples_of([one, make_cache("d.zarr", dataset=named)], None, 100)


def test_caches_in_other_row_orders_are_joined_by_id(make_cache: Make) -> None:
    one = make_cache("a.zarr", dataset=dataset(bad=(3,)))
    other = make_cache("b.zarr", dataset=dataset(bad=(5,)), order_seed=7)
    assert one.image_ids != other.image_ids
    samples = samples_of([one, other], None, 100)
    assert {*samples.bad} == {"i3", "i5"}
    a, b = spaces_of([one, other], samples)
    assert (a.name, b.name) == (f"stand_in:none ({one.place})", f"stand_in:none ({other.place})")
    assert [one.image_ids[r] for r in a.rows] == [other.image_ids[r] for r in b.rows]
    assert a.images is not None
    assert b.images is not None
    np.testing.assert_array_equal(a.images, b.images)


def test_a_split_and_a_number_choose_what_is_looked_at(make_cache: Make) -> None:
    cache = make_cache()
    assert samples_of([cache], "train", 4).ids == tuple(cache.image_ids[:4])
    assert samples_of([cache], "train", 4).total == 13
    with pytest.raises(UnknownName, match=r"no images of split 'tset' \(it has: train\)"):
        samples_of([cache], "tset", 4)
    halves = [
        make_cache(f"{at[0]}.zarr", dataset=dataset(bad=at)) for at in (range(7), range(7, 13))
    ]
    with pytest.raises(UnknownName, match="no image to look at: 13 of 13 are in quarantine"):
        samples_of(halves, None, 4)


def test_only_true_captions_are_said_of_an_image(make_cache: Make) -> None:
    plain = dataset()
    item = MatchingExample("m", ("i2",), ("t3", "t4"), "swap", "test")
    both = MatchingExample("b", ("i2", "i5"), ("t5", "t6"), "swap", "val")
    tasks = replace(plain.tasks, matching=(item,), two_by_two=(both,))
    cache = make_cache(dataset=replace(plain, tasks=tasks))
    samples = samples_of([cache], None, 100)
    texts = samples.texts
    assert samples.says["i2"] == ("red cube", texts["t3"], texts["t5"])
    assert samples.says["i5"] == ("red cube", texts["t6"])
    assert samples.splits["i2"] == ("train", "test", "val")
    assert {samples.ids[i] for i in found_images(samples, "CUBE val")} == {"i2", "i5"}
    assert len(found_images(samples, " ")) == 13


def test_texts_are_found_by_their_words_the_same_one_first(make_cache: Make) -> None:
    strings = [
        "a red cup",
        "a red cup and a cat",
        "cup",
        "a red cup",
        "RED hat",
        "x",
        "y",
        "z",
        "w",
    ]
    samples = samples_of([make_cache(dataset=dataset(texts=strings))], None, 100)
    found = found_texts(samples, "cup", 2)
    assert found == [("t2", "cup"), ("t0", "a red cup")]
    assert [text for _, text in found_texts(samples, "red", 9)] == [
        "a red cup",
        "a red cup and a cat",
        "RED hat",
    ]
    assert found_texts(samples, "dog", 9) == []
    assert len(found_texts(samples, "", 5)) == 5


# ── pictures, and the verb ───────────────────────────────────────────────────────────────────────────────────────────


def test_pictures_that_moved_are_grey_and_said(fast_path: Path) -> None:
    root = folder.miniature(fast_path / "photos")
    cache = build(
        load_dataset("folder", root),
        StandIn(),
        fast_path / "c.zarr",
        progress=False,
    )
    name = cache.image_ids[0]
    there = opened(pictures_of(cache), name)
    assert there is not None
    moved = root.rename(fast_path / "moved")
    pictures = pictures_of(cache)
    assert "--root" in pictures.missing
    assert opened(pictures, name) is None
    assert scaled(None, 20).getcolors() == [(400, (128, 128, 128))]
    again = opened(pictures_of(cache, str(moved)), name)
    assert again is not None
    assert again.tobytes() == there.tobytes()


def test_a_picture_that_broke_since_is_none(fast_path: Path) -> None:
    root = folder.miniature(fast_path / "photos")
    cache = build(load_dataset("folder", root), StandIn(), fast_path / "c.zarr", progress=False)
    for file in (root / "images").rglob("*.*"):
        file.write_bytes(b"no picture")
    assert opened(pictures_of(cache), cache.image_ids[0]) is None
    assert opened(pictures_of(cache), "nobody") is None


def test_the_extra_is_asked_for_in_a_sentence(
    make_cache: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["browse", str(make_cache().path)]) == 1
    said = capsys.readouterr().err
    assert said.strip().endswith("pip install 'headstart[browse]'")
    assert "nicegui" in said


@pytest.mark.parametrize("option", [["-k", "0"], ["--most", "-1"]])
def test_numbers_that_show_nothing_are_refused(
    option: list[str], make_cache: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nicegui", reason="needs pip install 'headstart[browse]'")
    assert main(["browse", str(make_cache().path), *option]) == 1
    assert "must be at least 1" in capsys.readouterr().err
