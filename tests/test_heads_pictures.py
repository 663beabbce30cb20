"""Pictures of attention: the right image, cut as the backbone saw it, with weights on a square grid."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn import drawn, make_drawn
from PIL import Image

from cache_builder import FeatureCache
from cache_builder.datasets.base import Dataset, ImageRecord
from heads.errors import ConfigError
from heads.pictures import save_pictures, square
from heads.runs import train_run
from heads.tasks import MatchingData, load_task

SMALL = {"layers": 2, "dim": 8, "heads": 2, "ffn": 12}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_drawn(tmp_path_factory.mktemp("pictures") / "drawn.zarr")


@pytest.fixture(scope="module")
def run(cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"head": SMALL, "train": {"steps": 1, "device": "cpu"}}
    out = tmp_path_factory.mktemp("runs") / "run"
    return train_run(
        cache, "tf_local", out, task="two_by_two", settings=settings, progress=False
    ).path


def banners() -> Dataset:
    """The same ids, painted anew: 60 × 20 pixels, image i in colour i between red sides."""

    def paint(i: int) -> ImageRecord:
        pixels = np.full((20, 60, 3), (255, 0, 0), dtype=np.uint8)
        pixels[:, 20:40] = (0, i, 200)
        return ImageRecord(dataset.images[i].id, lambda: Image.fromarray(pixels))

    dataset = drawn()
    return replace(dataset, images=tuple(paint(i) for i in range(len(dataset.images))))


def test_a_picture_shows_its_own_image_words_and_weights(cache: FeatureCache, run: Path) -> None:
    dataset = banners()
    paths = save_pictures(run, cache, dataset, task="two_by_two")
    assert [path.name for path in paths] == ["00-swap.npz", "01-add.npz"]
    number = {record.id: i for i, record in enumerate(dataset.images)}
    for path, image, caption in zip(
        paths,
        ("test0", "test2"),
        ("test cup 0 on a hat", "test cup 1 on a hat"),
        strict=True,
    ):
        with np.load(path, allow_pickle=False) as found:
            shown, words, weights = found["image"], found["words"], found["weights"]
            assert str(found["caption"]) == caption
            _, rival = next(pair for pair in captions(cache) if pair[0] == caption)
            preferred = "preferred to" if found["right"] else "not preferred to"
            assert f"the true caption, {preferred} “{rival}”, with " in str(found["verdict"])
            other = float(str(found["verdict"]).rpartition(" ")[2])
            assert bool(found["right"]) == (float(found["score"]) > other)
        assert shown.shape == (20, 20, 3)
        np.testing.assert_array_equal(shown, np.broadcast_to((0, number[image], 200), shown.shape))
        side = int(cache.shape("image/patches")[0] ** 0.5)
        assert weights.shape == (len(words), side, side)
        ids, _ = cache.read_ragged("text/ids", cache.rows("text", [caption_id(cache, caption)]))
        assert len(words) == len(ids) - 2  # start and end are no words
        assert not any("<" in word and ">" in word and "_of_text" in word for word in words)


def test_a_call_replaces_what_an_earlier_one_wrote_and_nothing_else(
    cache: FeatureCache, run: Path
) -> None:
    more = save_pictures(run, cache, banners(), task="two_by_two")
    folder = more[0].parent
    mine = ("notes.npz", "00-by hand.npz", "00-swap.png", "1-odd.npz")
    for name in (*mine, "strip.npz"):  # a strip of an earlier head
        (folder / name).write_bytes(b"")
    (first,) = save_pictures(run, cache, banners(), task="two_by_two", split="train", n=1)
    assert {path.name for path in folder.iterdir()} == {first.name, *mine}
    with np.load(first, allow_pickle=False) as found:
        assert (str(found["task"]), str(found["split"])) == ("two_by_two", "train")
        assert str(found["says"]).endswith(". Pictures are of two_by_two, split train")
    for name in mine:
        (folder / name).unlink()


def test_a_call_that_fails_removes_nothing(
    cache: FeatureCache, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save_pictures(run, cache, banners(), task="two_by_two")

    def nothing(*_: object) -> None:
        raise ConfigError("nothing to show")

    monkeypatch.setattr("heads.methods.tf_local.Head.maps", nothing)
    with pytest.raises(ConfigError, match="nothing to show"):
        save_pictures(run, cache, banners(), task="two_by_two", n=1)
    assert sorted(before[0].parent.iterdir()) == before


def captions(cache: FeatureCache) -> list[tuple[str, str]]:
    data = load_task(cache, "two_by_two", "test")
    assert isinstance(data, MatchingData)
    return [(cache.texts[own], cache.texts[other]) for own, other in data.captions.tolist()]


def caption_id(cache: FeatureCache, text: str) -> str:
    return cache.text_ids[cache.texts.index(text)]


@pytest.mark.parametrize(
    ("mode", "reds", "others"),
    [("shortest", 0, 0), ("squash", 2 / 3, 0), ("longest", 0.22, 0.66), (None, 2 / 3, 0)],
)
def test_the_picture_is_cut_as_the_backbone_cut_it(
    mode: str | None, reds: float, others: float
) -> None:
    picture = banners().images[3].open()
    text = f'open_clip image_transform_v2 {{"mean": [0.5], "resize_mode": "{mode}", "size": 32}}'
    shown = square(picture, text if mode else "some other transform").astype(int)
    assert shown.shape == (20, 20, 3)
    red = (shown[..., 0] > 128).mean()
    black = (shown.sum(-1) < 20).mean()
    assert red == pytest.approx(reds, abs=0.1)
    assert black == pytest.approx(others, abs=0.1)


def test_the_cache_says_how_its_pictures_were_cut(cache: FeatureCache) -> None:
    """The tiny CLIP crops; a cache of one that squashes holds the same text with the other word."""
    text = cache.spec.backbone.preprocessing
    picture = banners().images[3].open()
    assert not (square(picture, text)[..., 0] > 128).any()
    assert (square(picture, text.replace("shortest", "squash"))[..., 0] > 128).any()
