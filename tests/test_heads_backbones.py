"""Heads on every family's cache: whatever the readout, tf_local trains and scores, and says so where it cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cache_builder import FeatureCache, build, load_dataset
from cache_builder.backbones import clip, llava, pe, siglip2
from cache_builder.backbones.two_towers import TwoTowers
from cache_builder.readout import project_patches
from heads.blocks.readout import Readout
from heads.config import read_settings
from heads.errors import HeadError
from heads.runs import score_run, train_run
from heads.source import Source
from heads.tasks import load_task

FAMILIES: dict[str, Callable[[], TwoTowers]] = {
    "clip": clip.tiny,
    "siglip2": siglip2.tiny,
    "siglip2-naflex": siglip2.tiny_hub,
    "pe": pe.tiny,
    "llava": llava.tiny,
}
SMALL = {"layers": 2, "dim": 16, "heads": 2, "ffn": 16}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in three shapes, two attrs × two objs."""
    root = tmp_path_factory.mktemp("photos")
    (root / "images").mkdir()
    rng, lines = np.random.default_rng(0), ["image,attr,obj,split"]
    for i in range(12):
        shape = [(40, 60), (64, 64), (30, 120)][i % 3]
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/{i}.png")
        pair = f"{['red', 'blue'][i % 2]},{['cup', 'hat'][i // 2 % 2]}"
        lines.append(f"{i}.png,{pair},{['train', 'val', 'test'][i // 4]}")
    (root / "data.csv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module", params=list(FAMILIES))
def cache(request: pytest.FixtureRequest, photos: Path, fast_folder: Path) -> FeatureCache:
    backbone = FAMILIES[request.param]()
    path = fast_folder / f"heads-{request.param}.zarr"
    return build(load_dataset("folder", photos), backbone, path, batch_size=5, progress=False)


@pytest.mark.parametrize("variant", ["local", "late_maxsim"])
def test_a_token_head_trains_and_scores_on_every_family(
    cache: FeatureCache, tmp_path: Path, variant: str
) -> None:
    settings = read_settings(None, ["train.steps=2", f"head.variant={variant}"])
    settings["head"] |= SMALL
    train_run(cache, "tf_local", tmp_path / "run", task="czsl", settings=settings, progress=False)
    assert score_run(tmp_path / "run", split="test", cache=cache)


def test_the_readout_takes_patches_where_the_backbone_takes_them(cache: FeatureCache) -> None:
    readout = Readout({k: torch.from_numpy(v) for k, v in cache.readout().items()})
    rows = torch.randn(2, 3, cache.spec.backbone.dims["image_width"])
    joint = readout.joint("image", rows)
    assert joint.shape == (2, 3, readout.joint_width("image"))
    expected = project_patches({k: torch.from_numpy(v) for k, v in cache.readout().items()}, rows)
    assert torch.equal(joint, expected)


def test_a_head_that_needs_a_joint_space_refuses_a_cache_without_one(
    photos: Path, fast_folder: Path, tmp_path: Path
) -> None:
    path = fast_folder / "refused.zarr"
    cache = build(load_dataset("folder", photos), llava.tiny(), path, progress=False)
    with pytest.raises(HeadError, match="reads image/pooled, text/pooled, but"):
        train_run(
            cache, "zero_shot", tmp_path / "run", task="czsl", settings=read_settings(None, [])
        )


@pytest.mark.parametrize("in_memory", [True, False])
def test_patches_of_pictures_in_their_own_shapes_come_padded_with_a_mask(
    photos: Path, fast_folder: Path, in_memory: bool
) -> None:
    path = fast_folder / "ragged.zarr"
    cache = build(
        load_dataset("folder", photos), siglip2.tiny_hub(), path, batch_size=5, progress=False
    )
    from heads.base import Needs

    data: Any = load_task(cache, "czsl", "train")
    needs = Needs(frozenset({"image/patches"}), frozenset({"text/tokens"}))
    limit = None if in_memory else 0
    source = Source(cache, needs, data.images, data.prompts, ram_limit=limit)
    rows = data.images[[2, 0, 1]]
    found = source.images(rows)
    counts = cache.grid()[rows].prod(1)
    assert found["image/mask"].sum(1).tolist() == counts.tolist()
    assert len(set(counts.tolist())) > 1
    values, offsets = cache.read_ragged("image/patches", rows)
    for i, n in enumerate(counts):
        stored = torch.from_numpy(values[offsets[i] : offsets[i + 1]]).float()
        assert torch.equal(found["image/patches"][i, :n], stored)
        assert not found["image/patches"][i, n:].any()


@pytest.mark.parametrize("variant", ["local", "late_maxsim"])
def test_padded_patches_are_invisible_to_a_scorer(variant: str) -> None:
    from heads.base import Context
    from heads.features import Features
    from heads.methods import tf_local

    torch.manual_seed(0)
    eps = {f"{s}/eps": torch.tensor(1e-5) for s in ("image", "text")}
    norms = {f"{s}/norm.weight": torch.ones(5) for s in ("image", "text")}
    norms |= {f"{s}/norm.bias": torch.zeros(5) for s in ("image", "text")}
    shapes = {"image/patches": (7, 5), "text/tokens": (4, 5)}
    config = tf_local.Config.model_validate({"variant": variant, **SMALL})
    head = tf_local.Head(config, Context(shapes, norms | eps))
    head.eval()
    words = {"text/tokens": torch.randn(2, 4, 5), "text/mask": torch.ones(2, 4, dtype=torch.bool)}
    patches = torch.randn(2, 7, 5)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    padded = Features({"image/patches": patches, "image/mask": mask})
    other = Features({"image/patches": patches.where(mask[..., None], 9.0), "image/mask": mask})
    alone = Features({"image/patches": patches[1:, :4]})
    with torch.no_grad():
        scores = head(padded, Features(words))
        assert torch.equal(scores, head(other, Features(words)))
        torch.testing.assert_close(scores[1:], head(alone, Features(words)))
