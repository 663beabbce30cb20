"""The storage benchmark derives modes from one exact cache: what it stores is what a true build stores."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_in import StandIn, dataset

from cache_builder import build, load_backbone, load_dataset


def replay() -> Any:
    place = Path(__file__).parent / "benchmarks/replay.py"
    spec = importlib.util.spec_from_file_location("replay", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("storage", ["bf16", "fp8-token"])
def test_a_replayed_cache_has_the_digest_of_a_true_one(storage: str, fast_path: Path) -> None:
    tool, data, backbone = (
        replay(),
        load_dataset("toy_world", scale=0.01),
        load_backbone("clip:demo"),
    )
    given: dict[str, Any] = {"batch_size": 64, "progress": False}
    exact = build(data, backbone, fast_path / "fp32.zarr", storage="fp32", **given)
    true = build(data, backbone, fast_path / "true.zarr", storage=storage, **given)
    pictures, again = tool.numbered(data, exact), tool.replayed(backbone, exact)
    found = build(pictures, again, fast_path / "found.zarr", storage=storage, **given)
    assert found.header.digest == true.header.digest


def test_so_has_one_with_statistics_where_batches_make_no_difference(fast_path: Path) -> None:
    tool, data, backbone = replay(), dataset(), StandIn()
    given: dict[str, Any] = {"batch_size": 4, "progress": False}
    exact = build(data, backbone, fast_path / "fp32.zarr", storage="fp32", **given)
    true = build(data, backbone, fast_path / "true.zarr", storage="int8-channel", **given)
    pictures, again = tool.numbered(data, exact), tool.replayed(backbone, exact)
    found = build(pictures, again, fast_path / "found.zarr", storage="int8-channel", **given)
    assert found.header.digest == true.header.digest
    np.testing.assert_array_equal(found.read("image/patches"), true.read("image/patches"))
