"""FeatureDataset: other people's training loops over one cache or several, one read a batch."""

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import make_drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stand_in import KeptStandIn, StandIn, WordStandIn, dataset
from torch.utils.data import DataLoader, StackDataset, default_collate

from cache_builder import FeatureCache, build
from cache_builder.errors import UnknownIds, UnknownName
from heads.dataset import FeatureDataset
from heads.errors import ConfigError

Make = Callable[..., FeatureCache]
FIXED = ["image/pooled", "image/patches"]
TEXTS = ["text/pooled", "text/tokens", "text/ids"]
lightly = settings(
    derandomize=True,
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_drawn(tmp_path_factory.mktemp("dataset") / "drawn.zarr")


def value(cache: FeatureCache, stream: str, one: str) -> torch.Tensor:
    """What the cache holds of an id, in float32 or int64."""
    row = cache.rows("image" if stream.startswith("image") else "text", [one])
    ragged = cache.is_ragged(stream)
    found = cache.read_ragged(stream, row)[0] if ragged else cache.read(stream, row)[0]
    tensor = torch.from_numpy(found)
    return tensor.float() if tensor.is_floating_point() else tensor.long()


def check(cache: FeatureCache, streams: list[str], items: list[dict[str, Any]]) -> None:
    for item in items:
        assert set(item) >= {"id", *streams}
        assert all(torch.equal(item[s], value(cache, s, item["id"])) for s in streams)


@lightly
@given(data=st.data())
def test_items_are_the_rows_of_their_ids(cache: FeatureCache, data: st.DataObject) -> None:
    for streams, ids in ((FIXED, cache.image_ids), (TEXTS, cache.text_ids)):
        whole = FeatureDataset(cache, streams)
        assert whole.ids == ids
        assert whole.dropped == ()
        at = data.draw(st.lists(st.integers(-len(ids), len(ids) - 1), max_size=20))
        items = whole.__getitems__(at)
        assert [item["id"] for item in items] == [ids[i] for i in at]
        check(cache, streams, items)
        if at:
            check(cache, streams, [whole[at[0]]])


def test_an_index_outside_is_refused(cache: FeatureCache) -> None:
    whole = FeatureDataset(cache, FIXED)
    for wrong in (63, -64):
        with pytest.raises(IndexError, match=r"items are 0 … 62"):
            whole[wrong]


def test_a_batch_is_one_read_a_stream(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    true_read = FeatureCache._read

    def counted(self: FeatureCache, array: str, places: Any) -> Any:
        reads.append(array)
        return true_read(self, array, places)

    monkeypatch.setattr(FeatureCache, "_read", counted)
    loader = DataLoader(FeatureDataset(cache, FIXED), batch_size=21)
    assert len(list(loader)) == 3
    assert sorted(reads) == sorted(FIXED * 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_shows_every_row_once(cache: FeatureCache, workers: int) -> None:
    torch.manual_seed(0)
    images = FeatureDataset(cache, FIXED, split="train")
    loader = DataLoader(images, batch_size=8, shuffle=True, num_workers=workers)
    seen: list[str] = []
    for batch in loader:
        assert batch["image/patches"].shape[1:] == (16, 48)
        assert batch["image/patches"].dtype == torch.float32
        for i, one in enumerate(batch["id"]):
            assert torch.equal(batch["image/patches"][i], value(cache, "image/patches", one))
            assert torch.equal(batch["image/pooled"][i], value(cache, "image/pooled", one))
        seen += batch["id"]
    assert sorted(seen) == sorted(images.ids)
    assert seen != images.ids


def test_a_spawned_worker_reads_too(cache: FeatureCache) -> None:
    images = FeatureDataset(cache, FIXED, split="val")
    images.__getitems__([0, 1])  # has been used here before
    loader = DataLoader(
        images,
        batch_size=4,
        num_workers=1,
        multiprocessing_context=multiprocessing.get_context("spawn"),
    )
    ids = [one for batch in loader for one in batch["id"]]
    assert ids == images.ids


def test_a_pickled_data_set_holds_no_values(cache: FeatureCache) -> None:
    images = FeatureDataset(cache, FIXED)
    fresh = pickle.dumps(images)
    before = images.__getitems__([3, 1])
    used = pickle.dumps(images)
    assert abs(len(used) - len(fresh)) < 100
    again = pickle.loads(used).__getitems__([3, 1])
    for one, other in zip(before, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[s], other[s]) for s in FIXED)


def test_batches_that_are_kept_do_not_change(cache: FeatureCache) -> None:
    images = FeatureDataset(cache, FIXED)
    kept = [images.__getitems__([i, i + 1]) for i in range(40)]
    for batch in kept:
        check(cache, FIXED, batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_ragged_rows_are_padded_under_a_mask(cache: FeatureCache, workers: int) -> None:
    texts = FeatureDataset(cache, TEXTS)
    loader = DataLoader(texts, batch_size=7, collate_fn=texts.collate, num_workers=workers)
    seen: list[str] = []
    for batch in loader:
        lengths = [len(value(cache, "text/ids", one)) for one in batch["id"]]
        assert batch["text/mask"].sum(1).tolist() == lengths
        assert batch["text/tokens"].shape[:2] == batch["text/mask"].shape
        assert batch["text/mask"].shape[1] == max(lengths)
        assert batch["text/ids"].dtype == torch.int64
        for i, one in enumerate(batch["id"]):
            for stream in ("text/tokens", "text/ids"):
                row = batch[stream][i]
                assert torch.equal(row[: lengths[i]], value(cache, stream, one))
                assert not row[lengths[i] :].any()
                assert batch["text/mask"][i, : lengths[i]].all()
        seen += batch["id"]
    assert seen == cache.text_ids


def test_collate_copies_nothing_that_is_in_one_piece_and_misses_no_change(
    cache: FeatureCache,
) -> None:
    images = FeatureDataset(cache, FIXED, split="val")
    at = [4, 0, 7, 0]
    items = images.__getitems__(at)
    batch, slow = images.collate(items), default_collate(list(items))
    assert batch.keys() == slow.keys()
    assert batch["id"] == slow["id"]
    assert all(torch.equal(batch[k], slow[k]) for k in (*FIXED, "attr", "obj"))
    assert batch["image/patches"].data_ptr() == items[0]["image/patches"].data_ptr()
    items.reverse()
    changed = images.collate(items)
    assert changed["id"] == slow["id"][::-1]
    assert torch.equal(changed["image/patches"], slow["image/patches"].flip(0))
    items.pop()
    items[1]["image/pooled"] = torch.zeros(24)
    changed = images.collate(items)
    assert changed["image/patches"].shape[0] == len(changed["id"]) == 3
    assert not changed["image/pooled"][1].any()


def test_patches_of_pictures_that_keep_their_shape_are_ragged_too(make_cache: Make) -> None:
    from test_cache_streams import Pictures

    cache = make_cache(dataset=Pictures().dataset(), backbone=KeptStandIn())
    images = FeatureDataset({"naflex": cache}, ["naflex/image/patches", "naflex/image/pooled"])
    batch = images.collate(images.__getitems__(range(9)))
    sizes = np.diff(cache.offsets("image/patches"))
    assert batch["naflex/image/mask"].sum(1).tolist() == sizes.tolist()
    assert len(set(sizes.tolist())) > 3
    assert batch["naflex/image/patches"].shape == (9, sizes.max(), 3)
    assert batch["naflex/image/pooled"].shape == (9, 7)


def test_a_split_brings_its_labels_in_the_order_of_its_examples(cache: FeatureCache) -> None:
    for split in ("train", "val"):
        images = FeatureDataset(cache, ["image/pooled"], split=split)
        labels = cache.labels(split)
        assert images.ids == labels["id"].tolist()
        batch = next(iter(DataLoader(images, batch_size=100)))
        assert [images.attrs[a] for a in batch["attr"]] == labels["attr"].tolist()
        assert [images.objs[o] for o in batch["obj"]] == labels["obj"].tolist()
        assert batch["attr"].dtype == torch.int64


def test_a_split_is_whole_or_refused_as_numpy_refuses_it(make_cache: Make) -> None:
    cache = make_cache(dataset=dataset(13, bad=(2, 5)))
    with pytest.raises(UnknownIds, match="2 quarantined"):
        cache.numpy("image/pooled", "train")
    with pytest.raises(
        UnknownIds,
        match=r"^2 of the 13 images of split 'train' cannot be read: 'i2' \(picture 2 is cut off\), 'i5' "
        r"\(picture 5 is cut off\); allow_missing=True leaves them out$",
    ):
        FeatureDataset(cache, ["image/pooled"], split="train")
    images = FeatureDataset(cache, ["image/pooled"], split="train", allow_missing=True)
    assert images.ids == cache.labels("train", allow_missing=True)["id"].tolist()
    assert images.dropped == ("i2", "i5")
    values = torch.stack([item["image/pooled"] for item in images.__getitems__([*range(11)])])
    assert torch.equal(
        values, torch.from_numpy(cache.numpy("image/pooled", "train", allow_missing=True))
    )


def test_a_split_of_several_caches_is_whole_in_all_or_refused(fast_path: Path) -> None:
    caches = pair(fast_path)
    with pytest.raises(
        UnknownIds,
        match=r"^6 of the 13 images of split 'train' cannot be read: 'i2' \(picture 2 is cut off\), 'i4' "
        r"\(picture 4 is cut off\), 'i9' \(not in .*pe.zarr\), …; allow_missing=True leaves them out$",
    ):
        FeatureDataset(caches, ["clip/image/pooled", "pe/image/patches"], split="train")


def test_tasks_without_labels_bring_images_alone(cache: FeatureCache) -> None:
    images = FeatureDataset(cache, ["image/pooled"], split="test", task="retrieval")
    assert images.ids == cache.labels("test", task="retrieval")["id"].tolist()
    assert set(images[0]) == {"id", "image/pooled"}
    assert images.attrs == images.objs == ()


def test_named_ids_come_in_their_order_and_must_exist(cache: FeatureCache) -> None:
    names = ["val3", "train0", "val3"]
    images = FeatureDataset(cache, ["image/pooled"], ids=names)
    assert [item["id"] for item in images.__getitems__([0, 1, 2])] == names
    with pytest.raises(UnknownIds, match="'nobody'"):
        FeatureDataset(cache, ["image/pooled"], ids=["val3", "nobody"])


def test_images_and_their_captions_are_two_data_sets_stacked(cache: FeatureCache) -> None:
    examples = [e for e in cache.tasks.retrieval if e.split == "train"]
    images = FeatureDataset(cache, ["image/pooled"], ids=[e.image for e in examples])
    texts = FeatureDataset(cache, ["text/pooled"], ids=[e.captions[0] for e in examples])
    for image, text in DataLoader(StackDataset(images, texts), batch_size=3):
        for i, one in enumerate(image["id"]):
            (example,) = [e for e in examples if e.image == one]
            assert text["id"][i] == example.captions[0]
            assert torch.equal(text["text/pooled"][i], value(cache, "text/pooled", text["id"][i]))


def pair(folder: Path) -> dict[str, FeatureCache]:
    """Two caches of overlapping data sets, in different orders, each with a picture that cannot be used."""
    made = {
        "clip": (StandIn(), dataset(13, bad=(2,)), 0),
        "pe": (WordStandIn(), dataset(9, bad=(4,)), 7),
    }
    return {
        name: build(
            data, backbone, folder / f"{name}.zarr", order_seed=seed, batch_size=4, progress=False
        )
        for name, (backbone, data, seed) in made.items()
    }


def test_several_caches_are_joined_by_id(fast_path: Path) -> None:
    caches = pair(fast_path)
    streams = ["clip/image/pooled", "pe/image/patches"]
    joined = FeatureDataset(caches, streams)
    assert set(joined.ids) == {f"i{i}" for i in range(9)} - {"i2", "i4"}
    assert joined.ids == [i for i in caches["clip"].image_ids if i in set(joined.ids)]
    assert set(joined.dropped) == {f"i{i}" for i in range(9, 13)} | {"i4", "i2"}
    assert caches["clip"].image_ids != caches["pe"].image_ids
    for item in DataLoader(joined, batch_size=None):
        for stream in streams:
            name, _, own = stream.partition("/")
            assert torch.equal(item[stream], value(caches[name], own, item["id"]))
    train = FeatureDataset(caches, streams, split="train", allow_missing=True)
    assert set(train.ids) == set(joined.ids)
    assert set(train.dropped) == set(joined.dropped)
    with pytest.raises(UnknownIds, match=r"'i12'"):
        FeatureDataset(caches, streams, ids=["i1", "i12"])


def test_caches_without_a_common_id_are_refused(make_cache: Make, cache: FeatureCache) -> None:
    other = make_cache()
    with pytest.raises(
        UnknownIds, match=r"none of the 13 image ids .* \(13 usable\), .* \(63 usable\)"
    ):
        FeatureDataset({"a": other, "b": cache}, ["a/image/pooled", "b/image/pooled"])


def test_one_text_id_with_two_strings_is_refused(make_cache: Make) -> None:
    one, other = make_cache("one.zarr"), make_cache("other.zarr", dataset=dataset(texts=["a", "b"]))
    with pytest.raises(
        ConfigError, match=r"text 't0' is 'text 0 ' in .*, 'a' in .*not of one data set"
    ):
        FeatureDataset({"x": one, "y": other}, ["x/text/pooled", "y/text/pooled"])


@pytest.mark.parametrize(
    ("streams", "options", "error", "message"),
    [
        (["image/poolt"], {}, UnknownName, r"no stream 'image/poolt' \(it has: image/patches"),
        (["image/pooled", "text/pooled"], {}, ConfigError, "streams must be of one side"),
        ([], {}, ConfigError, "not none"),
        (["text/pooled"], {"split": "train"}, ConfigError, "does not go with streams of texts"),
        (["image/pooled"], {"split": "train", "ids": ["val3"]}, ConfigError, "with ids"),
        (["image/pooled"], {"allow_missing": True}, ConfigError, "allow_missing is for a split"),
        (["image/pooled"], {"split": "dev"}, UnknownName, r"'dev'; there are test"),
    ],
)
def test_what_makes_no_sense_is_refused(
    cache: FeatureCache,
    streams: list[str],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        FeatureDataset(cache, streams, **options)


def test_streams_of_several_caches_name_their_cache(cache: FeatureCache) -> None:
    with pytest.raises(
        UnknownName, match=r"'image/pooled' must begin with .*clip, pe\), for instance 'clip/im"
    ):
        FeatureDataset({"clip": cache, "pe": cache}, ["image/pooled"])
    with pytest.raises(ConfigError, match=r"words without '/', not 'a/b'"):
        FeatureDataset({"a/b": cache}, ["a/b/image/pooled"])


def test_words_are_not_rows(make_cache: Make) -> None:
    words = make_cache(backbone=WordStandIn(), streams=["image/pooled", "word/states"])
    with pytest.raises(ConfigError, match="parts of words"):
        FeatureDataset(words, ["word/states"])
