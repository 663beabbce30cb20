"""Saved heads come back bit for bit, or with an error that names the parameter."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import make_drawn
from safetensors.torch import load_file, save_file

from cache_builder import FeatureCache
from cache_builder.errors import UnknownName
from heads import checkpoint, load_method, score
from heads.base import Head
from heads.errors import CheckpointMismatch
from heads.learner import seed_everything
from heads.loader import Loader
from heads.source import context_of
from heads.tasks import load_task

SMALL = {"layers": 2, "dim": 8, "heads": 2, "ffn": 12}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_drawn(tmp_path_factory.mktemp("checkpoint") / "drawn.zarr")


def tf_local(cache: FeatureCache, **config: Any) -> Head:
    module = load_method("tf_local")
    seed_everything(11)
    return module.Head(module.Config(**{**SMALL, **config}), context_of(cache))


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("zero_shot", {}),
        ("linear_probe", {}),
        ("tf_local", SMALL),
        ("tf_local", {**SMALL, "residual_global": True}),
        ("tf_local", {**SMALL, "variant": "late_maxsim"}),
    ],
)
def test_a_head_round_trips_bit_for_bit(
    cache: FeatureCache, tmp_path: Path, method: str, config: dict[str, Any]
) -> None:
    module = load_method(method)
    head = module.Head(module.Config(**config), context_of(cache))
    if head.training_kind == "closed_form":
        needs = head.needs(head.config)
        head.solve(Loader(load_task(cache, "czsl", "train"), needs, batch_size=4, seed=0).all(), 0)
    with torch.no_grad():
        for value in head.parameters():
            value.add_(torch.rand_like(value))
    checkpoint.save(head, tmp_path)
    back = checkpoint.load(tmp_path)
    assert back.config == head.config
    assert back.context.shapes == head.context.shapes
    assert (back.context.attrs, back.context.objs) == (head.context.attrs, head.context.objs)
    for mine, theirs in (
        (head.state_dict(), back.state_dict()),
        (head.context.readout, back.context.readout),
    ):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    data = load_task(cache, "czsl", "test")
    np.testing.assert_array_equal(score(head, data).scores, score(back, data).scores)


def test_the_hub_s_own_verbs_work_on_a_directory(cache: FeatureCache, tmp_path: Path) -> None:
    head = tf_local(cache)
    checkpoint.Pretrained(head).save_pretrained(tmp_path / "pretrained")
    back = checkpoint.Pretrained.from_pretrained(str(tmp_path / "pretrained")).head
    assert back.config == head.config
    assert all(torch.equal(head.state_dict()[k], v) for k, v in back.state_dict().items())


def test_the_method_is_stored_by_name(cache: FeatureCache, tmp_path: Path) -> None:
    checkpoint.save(tf_local(cache), tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    assert (description["method"], description["format"]) == ("tf_local", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(path / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(9), r"expected \(8,\) float32, found \(9,\) float32"),
        (torch.zeros(8).half(), r"expected \(8,\) float32, found \(8,\) float16"),
        (None, r"expected \(8,\) float32, found nothing"),
    ],
)
def test_a_changed_parameter_is_named_with_both_shapes(
    cache: FeatureCache, tmp_path: Path, value: torch.Tensor | None, words: str
) -> None:
    checkpoint.save(tf_local(cache), tmp_path)
    rewrite(tmp_path, **{"head/scorer.c": value})
    with pytest.raises(CheckpointMismatch, match=rf"'scorer\.c' of tf_local: {words}"):
        checkpoint.load(tmp_path)


def test_a_parameter_too_many_is_named(cache: FeatureCache, tmp_path: Path) -> None:
    checkpoint.save(tf_local(cache), tmp_path)
    rewrite(tmp_path, **{"head/extra": torch.zeros(2, 3)})
    with pytest.raises(CheckpointMismatch, match=r"'extra'.*expected nothing, found \(2, 3\)"):
        checkpoint.load(tmp_path)


def test_damage_and_newer_formats_are_told_apart(cache: FeatureCache, tmp_path: Path) -> None:
    checkpoint.save(tf_local(cache), tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**description, "format": 2}))
    with pytest.raises(CheckpointMismatch, match="format 2, and this version reads 1"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointMismatch, match="no readable head"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**description, "method": "tf_locla"}))
    with pytest.raises(UnknownName, match="did you mean 'tf_local'"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(description))
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointMismatch, match="no readable head"):
        checkpoint.load(tmp_path)


def test_a_directory_without_a_head_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        checkpoint.load(tmp_path)
