"""Caches of other samples are refused with what differs, and compared on what they share when that is asked for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache_builder import FeatureCache, build, load_backbone, load_dataset
from cache_builder.datasets.base import Dataset
from heads.errors import ConfigError
from heads.samples import Shared, on_shared, refuse_differences
from heads.tasks import load_task

Made = Callable[..., FeatureCache]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset("toy_world", scale=0.02)


@pytest.fixture(scope="module")
def whole(dataset: Dataset, fast_folder: Path) -> FeatureCache:
    return made(dataset, fast_folder / "samples-whole.zarr")


def made(dataset: Dataset, path: Path, backbone: str = "clip") -> FeatureCache:
    streams = ["image/pooled", "text/pooled"]
    return build(dataset, load_backbone(f"{backbone}:demo"), path, streams=streams, progress=False)


def without(dataset: Dataset, *images: str) -> Dataset:
    """The data set as somebody has it who lost some pictures, and all that is asked about them."""
    gone = set(images)
    tasks = dataset.tasks
    assert tasks.czsl is not None

    def kept(examples: Any, ids: Callable[[Any], set[str]]) -> Any:
        return tuple(e for e in examples if not ids(e) & gone)

    return replace(
        dataset,
        images=tuple(i for i in dataset.images if i.id not in gone),
        tasks=replace(
            tasks,
            czsl=replace(tasks.czsl, examples=kept(tasks.czsl.examples, lambda e: {e.image})),
            two_by_two=kept(tasks.two_by_two, lambda e: set(e.images)),
            matching=kept(tasks.matching, lambda e: set(e.images)),
            retrieval=kept(tasks.retrieval, lambda e: {e.image}),
            composed=kept(tasks.composed, lambda e: {e.reference, *e.targets, *e.subset}),
            galleries={
                n: replace(g, images=tuple(i for i in g.images if i not in gone))
                for n, g in tasks.galleries.items()
            },
        ),
    )


def test_the_same_samples_under_two_backbones_are_taken_as_they_are(
    dataset: Dataset, whole: FeatureCache, fast_path: Path
) -> None:
    other = made(dataset, fast_path / "pe.zarr", "pe")
    caches = {"clip": whole, "pe": other}
    refuse_differences(caches)
    assert on_shared(caches) == caches
    assert on_shared(caches)["pe"].asked is None


def test_what_differs_is_said_and_what_is_shared_is_offered(
    dataset: Dataset, whole: FeatureCache, fast_path: Path
) -> None:
    assert dataset.tasks.czsl is not None
    test = [e.image for e in dataset.tasks.czsl.examples if e.split == "test"]
    scene = next(e.images[0] for e in dataset.tasks.two_by_two if e.split == "test")
    a = made(without(dataset, test[0]), fast_path / "a.zarr")
    b = made(without(dataset, test[1], scene), fast_path / "b.zarr", "pe")
    with pytest.raises(ConfigError) as caught:
        refuse_differences({"a": a, "b": b})
    said = str(caught.value)
    assert f"1 images are only in b ({test[0]!r})" in said
    assert "2 images are only in a (" in said
    assert "--intersect" in said
    n = len(dataset.images) - 3
    assert f"{n:,} images" in said

    shared = on_shared({"a": a, "b": b, "whole": whole})
    slow = {i.id for i in dataset.images} - {test[0], test[1], scene}
    ids: list[Any] = []
    for cache in shared.values():
        data = load_task(cache, "czsl", "test")
        ids.append(data.image_ids)  # pyright: ignore[reportAttributeAccessIssue]
        items = load_task(cache, "two_by_two", "test")
        expected = [
            e.id for e in dataset.tasks.two_by_two if e.split == "test" and set(e.images) <= slow
        ]
        assert list(items.ids) == expected  # pyright: ignore[reportAttributeAccessIssue]
    assert ids[0] == ids[1] == ids[2] == tuple(i for i in test if i in slow)
    assert shared["whole"].asked == shared["a"].asked


def test_quarantined_images_are_a_difference(
    dataset: Dataset, whole: FeatureCache, fast_path: Path
) -> None:
    assert dataset.tasks.czsl is not None
    bad = next(e.image for e in dataset.tasks.czsl.examples if e.split == "test")

    def broken() -> Any:
        raise ValueError("cut off")

    images = tuple(
        replace(i, open=broken, measure=None, path=None) if i.id == bad else i
        for i in dataset.images
    )
    spoiled = made(replace(dataset, images=images), fast_path / "spoiled.zarr")
    assert set(spoiled.quarantined) == {bad}
    with pytest.raises(ConfigError, match="1 images in quarantine are only in spoiled"):
        refuse_differences({"whole": whole, "spoiled": spoiled})
    shared = on_shared({"whole": whole, "spoiled": spoiled})
    for cache in shared.values():
        data = load_task(cache, "czsl", "test")
        assert bad not in data.image_ids  # pyright: ignore[reportAttributeAccessIssue]


def test_other_data_under_equal_names_is_never_intersected(
    whole: FeatureCache, fast_path: Path
) -> None:
    other = made(load_dataset("toy_world", scale=0.02, seed=1), fast_path / "other.zarr")
    with pytest.raises(ConfigError, match="of different data under equal names"):
        on_shared({"whole": whole, "other": other})
    with pytest.raises(ConfigError, match=r"do not hold the same samples: .*nothing, because"):
        refuse_differences({"whole": whole, "other": other})


def test_two_data_sets_share_nothing(whole: FeatureCache, fast_path: Path, tmp_path: Path) -> None:
    from cache_builder.datasets import mit_states

    other = made(mit_states.load(mit_states.miniature(tmp_path)), fast_path / "mit.zarr")
    with pytest.raises(ConfigError, match="data set toy_world and data set mit_states"):
        refuse_differences({"whole": whole, "other": other})
    with pytest.raises(ConfigError, match="caches of different data sets share no sample"):
        on_shared({"whole": whole, "other": other})


def test_shared_texts_must_say_the_same(
    whole: FeatureCache, dataset: Dataset, fast_path: Path
) -> None:
    texts = (replace(dataset.texts[0], text="something else"), *dataset.texts[1:])
    other = made(replace(dataset, texts=texts), fast_path / "c.zarr")
    with pytest.raises(ConfigError, match=r"the text .* 'something else' in the other"):
        _ = Shared({"whole": whole, "other": other}).tasks


def cut(dataset: Dataset, folder: Path, **tasks: Any) -> FeatureCache:
    """The same pictures and texts, of which other things are asked."""
    return made(replace(dataset, tasks=replace(dataset.tasks, **tasks)), folder)


def test_galleries_are_what_all_list_whoever_is_named_first(
    dataset: Dataset, whole: FeatureCache, fast_path: Path
) -> None:
    full = dataset.tasks.galleries["test"]
    needed = {
        i for e in dataset.tasks.composed if e.split == "test" for i in (e.reference, *e.targets)
    }
    spare = [i for i in full.images if i not in needed][:4]
    smaller = {
        name: {**dataset.tasks.galleries, "test": replace(full, images=kept)}
        for name, kept in {
            "a": tuple(i for i in full.images if i not in spare[:3]),
            "b": tuple(i for i in full.images if i not in spare[2:]),
        }.items()
    }
    caches = {n: cut(dataset, fast_path / f"{n}.zarr", galleries=g) for n, g in smaller.items()}
    want = tuple(i for i in full.images if i not in spare)
    for names in (("a", "b", "whole"), ("whole", "b", "a"), ("b", "whole", "a")):
        everyone = {n: caches.get(n, whole) for n in names}
        shared = Shared(everyone).tasks
        assert shared.galleries["test"].images == want
        assert shared.composed == dataset.tasks.composed
    other = {**dataset.tasks.galleries, "test": replace(full, with_reference=True)}
    ruled = cut(dataset, fast_path / "ruled.zarr", galleries=other)
    message = "place of the reference in gallery 'test' is False in one and True in the other"
    with pytest.raises(ConfigError, match=message):
        on_shared({"whole": whole, "ruled": ruled})


def test_pairs_and_images_are_those_that_all_can_be_asked(
    dataset: Dataset, whole: FeatureCache, fast_path: Path
) -> None:
    """Another cache has lost a pair of the test split; its images are asked of none, and it is no candidate."""
    task = dataset.tasks.czsl
    assert task is not None
    seen = set(task.pairs["train"])
    lost = next(p for p in task.pairs["test"] if p not in seen)
    pairs = {split: tuple(p for p in listed if p != lost) for split, listed in task.pairs.items()}
    examples = tuple(e for e in task.examples if (e.attr, e.obj) != lost)
    fewer = replace(task, pairs=pairs, examples=examples)
    other = cut(dataset, fast_path / "fewer.zarr", czsl=fewer)
    for names in ((whole, other), (other, whole)):
        found = Shared(dict(zip("ab", names, strict=True))).tasks.czsl
        assert found is not None
        assert found.pairs == pairs
        assert found.examples == examples


def test_a_task_that_one_lacks_is_asked_of_none(
    dataset: Dataset, whole: FeatureCache, fast_path: Path
) -> None:
    other = cut(dataset, fast_path / "no-czsl.zarr", czsl=None)
    with pytest.raises(ConfigError, match=r"\d+ czsl examples and 0"):
        refuse_differences({"whole": whole, "other": other})
    for cache in on_shared({"whole": whole, "other": other}).values():
        assert cache.tasks.czsl is None
        assert cache.tasks.two_by_two == dataset.tasks.two_by_two


def test_long_texts_are_cut_short_in_a_message(
    whole: FeatureCache, dataset: Dataset, fast_path: Path
) -> None:
    texts = (replace(dataset.texts[0], text="many words " * 400), *dataset.texts[1:])
    other = made(replace(dataset, texts=texts), fast_path / "long.zarr")
    with pytest.raises(ConfigError, match="different data") as caught:
        on_shared({"whole": whole, "other": other})
    assert "many words" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_query_whose_target_left_the_gallery_is_asked_of_none(
    dataset: Dataset, whole: FeatureCache, fast_path: Path
) -> None:
    query = next(e for e in dataset.tasks.composed if e.split == "test")
    full = dataset.tasks.galleries[query.gallery]
    less = replace(full, images=tuple(i for i in full.images if i != query.targets[0]))
    other = cut(
        dataset,
        fast_path / "less.zarr",
        galleries={**dataset.tasks.galleries, query.gallery: less},
        composed=tuple(e for e in dataset.tasks.composed if query.targets[0] not in e.targets),
    )
    shared = on_shared({"whole": whole, "other": other})
    asked = load_task(shared["whole"], "composed", "test")
    assert len(asked) > 0
    mixed = cut(
        dataset,
        fast_path / "mixed.zarr",
        galleries={**dataset.tasks.galleries, query.gallery: less},
        composed=(),
    )
    assert Shared({"whole": whole, "mixed": mixed}).tasks.composed == ()


def test_an_image_under_two_splits_is_two_examples(
    dataset: Dataset, whole: FeatureCache, fast_path: Path
) -> None:
    task = dataset.tasks.czsl
    assert task is not None
    train = next(e for e in task.examples if e.split == "train")
    twice = replace(task, examples=(*task.examples, replace(train, split="val")))
    pairs = {
        **task.pairs,
        "val": tuple(dict.fromkeys((*task.pairs["val"], (train.attr, train.obj)))),
    }
    first = cut(dataset, fast_path / "twice.zarr", czsl=replace(twice, pairs=pairs))
    gone = tuple(e for e in twice.examples if e != train)
    second = cut(dataset, fast_path / "once.zarr", czsl=replace(twice, pairs=pairs, examples=gone))
    for caches in ({"a": first, "b": second}, {"b": second, "a": first}):
        found = Shared(caches).tasks.czsl
        assert found is not None
        assert found.examples == gone
