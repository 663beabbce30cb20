"""Pictures stay bytes from the cache to the batch, and blocks may be counted from the end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import make_drawn
from stand_in import DIMS, KEPT_DIMS, SPEC, KeptStandIn, StandIn, dataset
from torch import Tensor

from cache_builder import FeatureCache, build
from cache_builder.spec import with_depth
from heads.base import Context, Head, HeadConfig, Needs
from heads.block_names import array_of, counted_from_end
from heads.checkpoint import check_cache
from heads.dataset import FeatureDataset
from heads.errors import CheckpointMismatch, MissingStream
from heads.features import Features
from heads.gather import widened
from heads.loader import Loader
from heads.miniature import live_context, small_context, small_features
from heads.source import Source, check_streams, context_of
from heads.tasks import load_task

PIXELS, FLIP = "image/pixels", "image/view_flip/pixels"
STREAMS = [PIXELS, FLIP, "image/pooled", "image/block_0", "image/block_1", "text/pooled"]
QUERIES = frozenset({PIXELS, "image/block_-1", "image/pooled"})
NEEDS = Needs(QUERIES, frozenset({"text/pooled"}))
PLACES: dict[str, dict[str, Any]] = {
    "memory": {"ram_limit": 1 << 30, "device_limit": 0},
    "device": {"ram_limit": 0, "device_limit": 1 << 30},
    "disk": {"ram_limit": 0, "device_limit": 0},
}


@pytest.fixture(scope="module", params=["fp16", "int8-channel", "fp8-token", "lossless"])
def cache(request: pytest.FixtureRequest, fast_folder: Path) -> FeatureCache:
    path = fast_folder / f"heads-pixels-{request.param}.zarr"
    return make_drawn(path, ("train3",), streams=STREAMS, storage=request.param)


@pytest.mark.parametrize("place", PLACES)
def test_a_source_gives_pixels_as_bytes_from_everywhere(cache: FeatureCache, place: str) -> None:
    source = Source(cache, NEEDS, np.arange(60), np.arange(5), **PLACES[place])
    assert (PIXELS in source.on_device) == (place == "device")
    assert (PIXELS in source.on_disk) == (place == "disk")
    rows = np.array([7, 0, 59, 7])
    found = source.images(rows)
    assert found[PIXELS].dtype == torch.uint8
    assert torch.equal(found[PIXELS], torch.from_numpy(cache.read(PIXELS)[rows]))
    assert found["image/pooled"].dtype == torch.float32


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("streams", [{PIXELS}, {PIXELS, FLIP, "image/pooled"}])
def test_batches_hold_pixels_as_bytes_from_everywhere(
    cache: FeatureCache, place: str, streams: set[str]
) -> None:
    data = load_task(cache, "czsl", "train", allow_missing=True)
    needs = Needs(frozenset(streams), frozenset({"text/pooled"}), partners=frozenset({"same_attr"}))
    loader = Loader(data, needs, batch_size=5, seed=3, **PLACES[place])
    assert (loader.pools is not None) == (place == "disk")
    stored, seen = {s: torch.from_numpy(cache.read(s)) for s in streams}, 0
    for batch in loader.epoch(1):
        assert batch.index is not None
        sides = [(batch.queries, data.images[batch.index.numpy()])]
        seen += len(batch.queries)
        for features, rows in sides:
            for name in streams - {"image/pooled"}:
                assert features[name].dtype == torch.uint8
                assert features[name].shape[1:] == (3, 32, 32)
                assert torch.equal(features[name], stored[name][rows])
        beside = batch.partners["same_attr"].features
        assert beside[PIXELS].dtype == torch.uint8
        everyone = {row.numpy().tobytes() for row in stored[PIXELS]}
        assert {row.numpy().tobytes() for row in beside[PIXELS]} <= everyone
    assert seen == len(data.images)


def test_two_pictures_an_item_are_bytes_too(cache: FeatureCache) -> None:
    data = load_task(cache, "two_by_two", "train", allow_missing=True)
    needs = Needs(frozenset({PIXELS}), frozenset({"text/pooled"}))
    stored = torch.from_numpy(cache.read(PIXELS))
    for limits in PLACES.values():
        loader = Loader(data, needs, batch_size=4, seed=0, negatives="image_text", **limits)
        for batch in loader.epoch(0):
            assert batch.index is not None
            rows = loader.plan.images[batch.index.numpy()[::2]].reshape(-1)
            assert torch.equal(batch.queries[PIXELS], stored[rows])


def test_a_data_set_of_torch_gives_bytes(cache: FeatureCache) -> None:
    data = FeatureDataset(cache, [PIXELS, "image/pooled"], ids=["val0", "val1"])
    batch = data.collate(data.__getitems__([1, 0]))
    assert batch[PIXELS].dtype == torch.uint8
    expected = cache.read(PIXELS, cache.rows("image", ["val1", "val0"]))
    assert torch.equal(batch[PIXELS], torch.from_numpy(expected))


def test_only_bytes_stay_bytes() -> None:
    kinds = (torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16)
    assert [widened(k) for k in kinds] == [torch.uint8, *[torch.int64] * 2, *[torch.float32] * 2]


def test_a_context_states_shapes_under_both_names(cache: FeatureCache) -> None:
    shapes = context_of(cache).shapes
    assert shapes[PIXELS] == shapes[FLIP] == (3, 32, 32)
    assert shapes["image/block_-1"] == shapes["image/block_1"] == (17, 48)
    assert shapes["image/block_-2"] == shapes["image/block_0"] == (17, 48)
    assert {s for s in shapes if "block" in s} == {f"image/block_{k}" for k in (0, 1, -1, -2)}


@pytest.mark.parametrize("place", PLACES)
def test_a_block_counted_from_the_end_is_that_block(cache: FeatureCache, place: str) -> None:
    data = load_task(cache, "czsl", "train", allow_missing=True)
    names = {"image/block_-1": "image/block_1", "image/block_-2": "image/block_0"}
    needs = Needs(frozenset(names), frozenset({"text/pooled"}))
    stored = {name: torch.from_numpy(cache.read(array)) for name, array in names.items()}
    loader = Loader(data, needs, batch_size=6, seed=0, **PLACES[place])
    for batch in loader.epoch(0):
        assert batch.index is not None
        rows = data.images[batch.index.numpy()]
        assert {*batch.queries.streams} == {*names}
        for name in names:
            torch.testing.assert_close(
                batch.queries[name], stored[name][rows].float(), rtol=1e-5, atol=1e-5
            )
    only = loader.source.only(Needs(frozenset({"image/block_-1"}), frozenset()))
    assert {*only.images(data.images[:2]).streams} == {"image/block_-1"}


class DeepKept(KeptStandIn):
    """Pictures keep their shape, and the depth is stated."""

    def __init__(self) -> None:
        super().__init__()
        dims = with_depth(KEPT_DIMS, {"image": 2})
        self.spec = SPEC.model_copy(update={"dims": dims})


def test_ragged_blocks_and_views_are_counted_from_the_end_too(fast_path: Path) -> None:
    streams = ["image/block_1", "image/view_flip/block_0", "text/pooled"]
    cache = build(dataset(), DeepKept(), fast_path / "c.zarr", streams=streams, progress=False)
    assert counted_from_end(cache) == {
        "image/block_-1": "image/block_1",
        "image/view_flip/block_-2": "image/view_flip/block_0",
    }
    needs = Needs(frozenset({"image/block_-1"}), frozenset({"text/pooled"}))
    rows = np.array([4, 2])
    for limits in PLACES.values():
        found = Source(cache, needs, np.arange(13), np.arange(9), **limits).images(rows)
        values, offsets = cache.read_ragged("image/block_1", rows)
        assert found["image/mask"].sum() == offsets[-1]
        got = found["image/block_-1"][found["image/mask"]].numpy()
        np.testing.assert_array_equal(got, values.astype(np.float32))
        loader = Loader(load_task(cache, "czsl", "train"), needs, batch_size=4, seed=0, **limits)
        assert all("image/block_-1" in b.queries.streams for b in loader.epoch(0))
    assert array_of(cache, "image/view_flip/block_-2") == "image/view_flip/block_0"


def test_what_leaves_the_last_block_is_not_counted_from_the_end(fast_path: Path) -> None:
    cache = make_drawn(fast_path / "c.zarr", streams=["image/block_2", "text/pooled"])
    assert counted_from_end(cache) == {}
    assert array_of(cache, "image/block_2") == "image/block_2"
    assert array_of(cache, "image/block_-0") == "image/block_-0"  # a name of nothing
    with pytest.raises(MissingStream, match="image/block_-0"):
        check_streams(cache, Needs(frozenset({"image/block_-0"}), frozenset()), "this head")


def stand_in(path: Path, dims: dict[str, int], streams: list[str]) -> FeatureCache:
    backbone = StandIn()
    backbone.spec = SPEC.model_copy(update={"dims": dims})
    return build(dataset(), backbone, path, streams=streams, progress=False)


def test_a_missing_block_is_named_by_its_number_in_the_command(fast_path: Path) -> None:
    deep = with_depth(DIMS, {"image": 24})
    cache = stand_in(fast_path / "c.zarr", deep, ["image/pooled", "text/pooled"])
    needs = Needs(frozenset({"image/block_-4", PIXELS}), frozenset({"text/pooled"}))
    with pytest.raises(MissingStream) as caught:
        check_streams(cache, needs, "cut")
    said = str(caught.value)
    assert "cut reads image/block_20 (its image/block_-4), image/pixels, but" in said
    assert "--streams image/block_20 image/pixels image/pooled text/pooled" in said
    with pytest.raises(MissingStream, match="image/block_20"):
        Source(cache, needs, np.arange(3), np.arange(3))


def test_more_blocks_than_there_are_is_refused_with_the_depth(cache: FeatureCache) -> None:
    for k in (3, 24):
        needs = Needs(frozenset({f"image/block_-{k}"}), frozenset({"text/pooled"}))
        with pytest.raises(MissingStream) as caught:
            check_streams(cache, needs, "cut")
        assert f"image/block_-{k} is the {k}" in str(caught.value)
        assert "has 2: ask for image/block_-1 … image/block_-2" in str(caught.value)


def test_a_cache_that_does_not_state_its_depth_is_refused_by_name(fast_path: Path) -> None:
    cache = stand_in(fast_path / "c.zarr", DIMS, ["image/block_1", "text/pooled"])
    needs = Needs(frozenset({"image/block_-1"}), frozenset({"text/pooled"}))
    with pytest.raises(MissingStream, match=r"does not say how many blocks .* by its number"):
        check_streams(cache, needs, "cut")
    check_streams(cache, Needs(frozenset({"image/block_1"}), frozenset()), "cut")
    assert "image/block_-1" not in context_of(cache).shapes


class Reader(Head):
    """Reads what its class says."""

    score_space = "logit"
    reads: frozenset[str] = frozenset({"image/block_-1", PIXELS})

    @classmethod
    def needs(cls, config: Any) -> Needs:
        return Needs(cls.reads, frozenset({"text/pooled"}))

    def forward(self, queries: Features, candidates: Features) -> Tensor:
        return torch.zeros(len(queries), len(candidates))

    def paired(self, queries: Features, candidates: Features) -> Tensor:
        return torch.zeros(len(queries))

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError


@pytest.mark.parametrize("stream", ["image/block_-1", PIXELS])
def test_a_head_is_not_scored_on_another_shape(cache: FeatureCache, stream: str) -> None:
    context = context_of(cache)
    check_cache(Reader(HeadConfig(), context), cache)
    shapes = {**context.shapes, stream: (5, *context.shapes[stream][1:])}
    other = Context(shapes, context.readout, context.attrs, context.objs)
    with pytest.raises(CheckpointMismatch, match=rf"trained on {stream} of shape \(5, "):
        check_cache(Reader(HeadConfig(), other), cache)


def test_small_features_are_bytes_where_pictures_are_bytes(
    fast_folder: Path, fast_path: Path
) -> None:
    context = live_context("clip", fast_path / "clip")
    assert context.shapes[PIXELS] == (3, 32, 32)
    assert context.shapes["image/block_-2"] == context.shapes["image/block_-1"] == (17, 48)
    assert "image/block_-3" not in context.shapes
    streams = frozenset({PIXELS, "image/block_-2", "image/pooled"})
    found = small_features(4, 0, streams, context)
    assert found[PIXELS].dtype == torch.uint8
    assert found[PIXELS].shape == (4, 3, 32, 32)
    assert found[PIXELS].min() < 9 < 240 < found[PIXELS].max()
    assert found["image/block_-2"].shape == (4, 17, 48)
    small = small_features(3, 0, frozenset({"image/block_-3"}), small_context())
    assert small["image/block_-3"].shape == (3, 8, 10)


def test_the_live_context_fits_the_backbone_it_names(contexts: dict[str, Context]) -> None:
    for context in contexts.values():
        assert context.backbone is not None
        dims = context.backbone.dims
        blocks = {s for s in context.shapes if s.startswith("image/block_")}
        assert blocks == {f"image/block_-{k + 1}" for k in range(dims["image_blocks"])}
