"""A cache is a plain zarr v3 store: xarray and tensorstore open it as it is and see what `FeatureCache` sees."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import xarray as xr
from stand_in import KeptStandIn, StandIn, WordStandIn
from torch import Tensor, ones

from cache_builder import FeatureCache

Make = Callable[..., FeatureCache]


class ClashingStandIn(StandIn):
    """Its frozen tensors have many sizes under few names."""

    def readout(self) -> dict[str, Tensor]:
        shapes = {
            "proj": (3, 7),
            "image/proj": (7, 3),
            "image/norm.weight": (3,),
            "image/bias": (7,),
        }
        return {name: ones(shape) * i for i, (name, shape) in enumerate(shapes.items())}


KINDS: dict[str, dict[str, Any]] = {
    "fixed": {"backbone": ClashingStandIn(), "storage": "fp16"},
    "fp32": {"backbone": ClashingStandIn(), "storage": "fp32"},
    "views, words": {
        "backbone": WordStandIn(),
        "streams": ["image/pooled", "image/block_1", "image/view_flip/patches", "word/states"],
    },
    "crops": {"backbone": StandIn(), "streams": ["image/patches", "crop/pooled"], "crops": "fast"},
    "kept shapes": {"backbone": KeptStandIn()},
}


@pytest.fixture(params=KINDS)
def cache(request: pytest.FixtureRequest, make_cache: Make) -> FeatureCache:
    return make_cache(**KINDS[request.param])


def groups(cache: FeatureCache) -> list[str]:
    """Groups that hold arrays."""
    return sorted({name.rpartition("/")[0] for name in cache.header.arrays})


def known(cache: FeatureCache) -> dict[str, Any]:
    """Values of every array, by this library."""
    found: dict[str, Any] = {"image/id": cache.image_ids, "text/id": cache.text_ids}
    found["text/string"] = cache.texts
    for name in cache.header.arrays:
        last = name.rpartition("/")[2]
        if name.startswith("readout/"):
            found[name] = cache.readout()[name.removeprefix("readout/")]
        elif last == "offsets":
            found[name] = cache.offsets(name)
        elif name in cache.streams or last == "ids":
            found[name] = cache.read_ragged(name)[0] if cache.is_ragged(name) else cache.read(name)
    return found


def test_xarray_opens_every_group(cache: FeatureCache) -> None:
    values = known(cache)
    seen = set()
    for group in groups(cache):
        opened = xr.open_zarr(cache.path, group=group, consolidated=False)
        for last, array in opened.variables.items():
            name = f"{group}/{last}"
            seen.add(name)
            assert array.dims == cache.layout(name).dims
            if name in values:
                np.testing.assert_array_equal(array.values, values[name])
                if not isinstance(values[name], list):
                    assert array.dtype == values[name].dtype
    assert seen == set(cache.header.arrays)


def test_xarray_opens_the_whole_as_a_tree(cache: FeatureCache) -> None:
    with warnings.catch_warnings():
        # zarr says that journals and tasks.json are no part of the hierarchy; they are not.
        warnings.filterwarnings("ignore", message=".*not recognized as a component")
        tree = xr.open_datatree(cache.path, engine="zarr", consolidated=False)
        assert tree.attrs["fingerprint"] == cache.fingerprint
        for name, values in known(cache).items():
            np.testing.assert_array_equal(tree[name].values, values)


def test_images_can_be_selected_by_id_with_xarray(make_cache: Make) -> None:
    cache = make_cache()
    images = xr.open_zarr(cache.path, group="image", consolidated=False).set_coords("id")
    labelled = images.set_index(image="id")
    np.testing.assert_array_equal(
        labelled["patches"].sel(image=["i3", "i0"]).values,
        cache.read("image/patches", cache.rows("image", ["i3", "i0"])),
    )


def test_tensorstore_opens_every_array_of_numbers(cache: FeatureCache) -> None:
    values = known(cache)
    read = 0
    for name, layout in cache.header.arrays.items():
        if layout.dtype == "string" or name not in values:
            continue
        place = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{cache.path}/{name}/"}}
        opened = ts.open(place, open=True, read=True).result()
        assert opened.domain.labels == (layout.dims or ())
        np.testing.assert_array_equal(opened.read().result(), values[name])
        read += 1
    assert read >= len(cache.streams)


def test_no_two_readout_tensors_share_an_axis(make_cache: Make) -> None:
    cache = make_cache(backbone=ClashingStandIn())
    found = [json.loads(p.read_text()) for p in Path(cache.path, "readout").rglob("zarr.json")]
    axes = [a for m in found if m["node_type"] == "array" for a in m["dimension_names"]]
    assert len(axes) == len(set(axes)) == 6


def test_xarray_opens_all_of_a_cache_at_once_where_views_have_other_lengths(
    make_cache: Make,
) -> None:
    cache = make_cache(
        backbone=KeptStandIn(),
        streams=["image/patches", "image/view_center/patches", "image/pooled", "text/pooled"],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Object at .* is not recognized")
        tree = xr.open_datatree(str(cache.path), engine="zarr", consolidated=False)
    found = tree["image/view_center"]["patches"]
    assert found.dims == ("center_patch", "width")
    np.testing.assert_array_equal(found.values, cache.read_ragged("image/view_center/patches")[0])
