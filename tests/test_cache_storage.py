"""Storage modes: what comes back of what was stored, in numpy and torch alike, and what that costs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in import KeptStandIn, StandIn, WordStandIn, dataset
from torch import Tensor

from cache_builder import FeatureCache, build
from cache_builder.errors import CacheCorrupt, UnknownName
from cache_builder.quantise import Moments, dequantised, pooled_2x2, quantised
from cache_builder.sample import passes, reports, sampled, smallest
from cache_builder.storage import E4M3, MODES, decoded, pooled_patches

Make = Callable[..., FeatureCache]

TOKEN_ERROR = {"bf16": 2**-8, "int8-channel": 0.6 / 127, "fp8-token": 2**-4}
"""Largest error of one number, as a share of the number (bf16, fp8) or of its token's largest deviation (int8)."""


def values(seed: int, rows: int, width: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, width, generator=random)
    found[:, 0] = found[:, 0] * 3 + 200  # a massive channel, as real backbones have
    return found


def statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    moments = Moments()
    for part in rows.split(3):
        moments.add("x", part)
    return moments.found()["x"]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 99), st.integers(1, 9), st.integers(2, 40), st.sampled_from(sorted(MODES)))
def test_numpy_and_torch_bring_back_the_same(seed: int, rows: int, width: int, name: str) -> None:
    mode, given_values = MODES[name], values(seed, rows, width)
    given_values[0] = torch.nan
    centre = statistics(given_values[1:]) if mode.centred and rows > 1 else (None, None)
    if mode.centred and rows == 1:
        centre = torch.zeros(width), torch.ones(width)
    stored = quantised(given_values, mode, *centre)
    back = dequantised(stored[""], mode.torch_dtype, stored.get("_scale"), *centre).float()
    arrays = {key: tensor.numpy() for key, tensor in stored.items()}
    assert arrays[""].dtype == np.dtype(mode.dtype)
    again = decoded(
        arrays[""],
        mode.torch_dtype,
        arrays.get("_scale"),
        *(None if c is None else c.numpy() for c in centre),
    )
    np.testing.assert_allclose(again, back.numpy(), rtol=1e-6, atol=1e-6)
    assert back[0].isnan().all()
    assert back[1:].isfinite().all()


@pytest.mark.parametrize("name", ["bf16", "fp8-token"])
def test_floats_lose_a_share_of_each_number(name: str) -> None:
    rows = values(0, 50, 32)
    stored = quantised(rows, MODES[name])
    back = dequantised(stored[""], MODES[name].torch_dtype, stored.get("_scale"))
    # Below the smallest normal e4m3 number, steps are of one size.
    floor = 0.0 if name == "bf16" else rows.abs().amax(-1, keepdim=True) / 448 * 2**-10
    assert ((back - rows).abs() <= TOKEN_ERROR[name] * rows.abs() + floor + 1e-12).all()


def test_int8_loses_a_share_of_its_token_s_largest_deviation() -> None:
    rows = values(0, 50, 32)
    mean, std = statistics(rows)
    stored = quantised(rows, MODES["int8-channel"], mean, std)
    back = dequantised(stored[""], "", stored["_scale"], mean, std)
    white, found = (rows - mean) / std, (back - mean) / std
    most = white.abs().amax(-1, keepdim=True)
    assert ((white - found).abs() <= TOKEN_ERROR["int8-channel"] * most + 1e-5).all()
    assert stored[""].abs().amax() == 127


def test_every_e4m3_number_is_torch_s() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(E4M3, codes.view(torch.float8_e4m3fn).float().numpy())


def test_a_token_of_zeros_stays_zero_in_every_mode() -> None:
    zeros = torch.zeros(2, 4)
    for mode in MODES.values():
        centre = (torch.zeros(4), torch.ones(4)) if mode.centred else (None, None)
        stored = quantised(zeros, mode, *centre)
        assert not dequantised(stored[""], mode.torch_dtype, stored.get("_scale"), *centre).any()


def test_moments_are_those_of_all_rows_and_a_still_channel_has_deviation_one() -> None:
    rows = values(1, 40, 5)
    rows[:, 3] = 7.25
    mean, std = statistics(rows)
    torch.testing.assert_close(mean, rows.double().mean(0).float())
    expected = rows.double().std(0, correction=0).float()
    expected[3] = 1
    torch.testing.assert_close(std, expected)


def test_windows_of_two_by_two_are_means_and_a_last_odd_one_is_alone() -> None:
    grid = torch.arange(9.0).reshape(1, 9, 1).expand(1, 9, 2)
    found = pooled_2x2(grid)[0, :, 0]
    assert found.tolist() == [(0 + 1 + 3 + 4) / 4, (2 + 5) / 2, (6 + 7) / 2, 8.0]
    assert pooled_patches({"patches": 9}) == 4
    for n in (0, 5, 8):
        with pytest.raises(UnknownName, match="square grid"):
            pooled_patches({"patches": n})


@pytest.fixture(scope="module")
def plain(fast_folder: Path) -> FeatureCache:
    path = fast_folder / "plain-fp32.zarr"
    return built(path, "fp32", StandIn())


def built(path: Path, storage: str, backbone: Any, **options: Any) -> FeatureCache:
    given = {"batch_size": 4, "chunk_bytes": 100, "progress": False, **options}
    return build(dataset(bad=(3, 8)), backbone, path, storage=storage, **given)


@pytest.mark.parametrize("backbone", [StandIn, WordStandIn, KeptStandIn])
@pytest.mark.parametrize("storage", ["bf16", "int8-channel", "fp8-token", "lossless"])
def test_a_cache_of_any_mode_holds_nearly_the_same(
    storage: str, backbone: type[StandIn], fast_path: Path
) -> None:
    exact = built(fast_path / "exact.zarr", "fp32", backbone())
    cache = built(fast_path / "cache.zarr", storage, backbone())
    assert cache.verify().ok
    for stream in cache.streams:
        read = "read_ragged" if cache.is_ragged(stream) else "read"
        expected, found = getattr(exact, read)(stream), getattr(cache, read)(stream)
        if read == "read_ragged":
            np.testing.assert_array_equal(expected[1], found[1])
            expected, found = expected[0], found[0]
        assert found.shape == expected.shape
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        most = np.nanmax(np.abs(expected), axis=-1, keepdims=True, initial=1e-9)
        with np.errstate(invalid="ignore"):
            assert not (np.abs(found - expected) > 0.07 * most + 1e-3).any(), stream
    kinds = {cache.layout(s).dtype for s in cache.streams if s.rpartition("/")[2] == "pooled"}
    assert kinds == {"float16" if storage != "bf16" else "uint16"}


def test_rows_can_be_read_in_any_order_under_any_mode(fast_path: Path) -> None:
    rows = np.array([5, 0, 12, 5, 7])
    for storage in MODES:
        if storage != "pool2x2":
            cache = built(fast_path / f"{storage}.zarr", storage, StandIn())
            whole = cache.read("image/patches")
            np.testing.assert_array_equal(cache.read("image/patches", rows), whole[rows])


def test_a_lossless_cache_holds_the_bytes_of_a_plain_one_in_fewer(fast_path: Path) -> None:
    """Rows of one number, so that there is something to save even in chunks of a hundred bytes."""
    plain = built(fast_path / "fp16.zarr", "fp16", StandIn(), chunk_bytes=4000)
    packed = built(fast_path / "lossless.zarr", "lossless", StandIn(), chunk_bytes=4000)
    for stream in ("image/patches", "image/pooled", "text/pooled"):
        np.testing.assert_array_equal(packed.read(stream), plain.read(stream))
    group: Any = zarr.open_group(str(packed.path), mode="r")
    np.testing.assert_array_equal(group["image/patches"][:], plain.read("image/patches"))
    size = {c: sum(e.bytes for e in c.chunks.manifest.values()) for c in (plain, packed)}
    assert size[packed] < size[plain]


def test_a_damaged_compressed_chunk_is_refused(fast_path: Path) -> None:
    cache = built(fast_path / "c.zarr", "lossless", StandIn())
    file = cache.chunks.file("image/patches", 0)
    data = bytearray(file.read_bytes())
    data[4] ^= 0xFF  # of the frame's length
    file.write_bytes(bytes(data))
    with pytest.raises(CacheCorrupt):
        FeatureCache.open(cache.path, check="read").read("image/patches")
    with pytest.raises(CacheCorrupt):
        FeatureCache.open(cache.path).read("image/patches")


@pytest.mark.parametrize("storage", ["fp16", "int8-channel"])
def test_a_shard_is_a_chunk_with_an_index_that_zarr_reads(storage: str, fast_path: Path) -> None:
    plain = built(fast_path / "plain.zarr", storage, StandIn())
    sharded = built(fast_path / "shards.zarr", storage, StandIn(), inner_rows=2, chunk_bytes=200)
    assert sharded.verify().ok
    group: Any = zarr.open_group(str(sharded.path), mode="r")
    for stream in ("image/patches", "image/pooled", "image/prefix", "text/pooled"):
        np.testing.assert_array_equal(sharded.read(stream), plain.read(stream))
        stored = sharded.stored(stream, np.arange(sharded.layout(stream).shape[0]))
        np.testing.assert_array_equal(group[stream][:], stored)
        assert group[stream].shards == sharded.layout(stream).chunk_shape
        assert group[stream].chunks[0] == 2
    np.testing.assert_array_equal(group["image/patches"][7:9], stored_rows(sharded, [7, 8]))


def stored_rows(cache: FeatureCache, rows: list[int]) -> np.ndarray:
    return cache.stored("image/patches", np.array(rows))


def test_zarr_reads_what_a_mode_stores_and_its_attribute_says_what_it_is(fast_path: Path) -> None:
    for storage, name in (("bf16", "bfloat16"), ("fp8-token", "float8_e4m3fn")):
        cache = built(fast_path / f"{storage}.zarr", storage, StandIn())
        array: Any = zarr.open_array(str(cache.path), path="image/patches", mode="r")
        assert array.attrs["torch_dtype"] == name
        tensor = torch.from_numpy(array[:]).view(getattr(torch, name)).float()
        if storage == "bf16":
            np.testing.assert_array_equal(tensor.numpy(), cache.read("image/patches"))


class Square(StandIn):
    """Nine patches, in a square grid."""

    def __init__(self) -> None:
        super().__init__()
        dims = {**self.spec.dims, "patches": 9}
        self.spec = self.spec.model_copy(update={"dims": dims})

    def encode_images(self, pixels: Any, blocks: Any = ()) -> dict[str, Tensor]:
        found = super().encode_images(pixels, blocks)
        patches = found["patches"]
        found["patches"] = torch.cat([patches, patches[:, :4] * 2], 1)
        return found


def test_pooled_patches_are_means_of_the_plain_ones(fast_path: Path) -> None:
    plain = built(fast_path / "plain.zarr", "fp32", Square())
    pooled = built(fast_path / "pooled.zarr", "pool2x2", Square())
    assert pooled.shape("image/patches") == (4, 3)
    expected = pooled_2x2(torch.from_numpy(plain.read("image/patches"))).half()
    np.testing.assert_array_equal(pooled.read("image/patches"), expected.numpy())
    with pytest.raises(UnknownName, match=r"square grid, but this backbone has 5"):
        built(fast_path / "no.zarr", "pool2x2", StandIn())
    with pytest.raises(UnknownName, match=r"has as many as fit the picture"):
        built(fast_path / "no.zarr", "pool2x2", KeptStandIn())


def test_a_lossy_cache_says_what_it_lost_and_a_resumed_one_keeps_its_statistics(
    fast_path: Path,
) -> None:
    cache = built(fast_path / "c.zarr", "int8-channel", StandIn())
    report = cache.header.report["image/patches"]
    assert 0.99 < report.white_min <= report.white_mean <= 1.0001
    assert report.rows == 11 * 5
    assert report.bytes_per_value == pytest.approx(1 + 4 / 3)
    cache.chunks.file("image/patches", 1).unlink()
    again = built(fast_path / "c.zarr", "int8-channel", StandIn())
    assert again.digest() == cache.header.digest


def test_auto_takes_the_smallest_mode_that_keeps_what_tokens_say() -> None:
    from cache_builder.request import cache_spec

    data, backbone = dataset(40), StandIn()
    sample = sampled(cache_spec(data, backbone), data, backbone)
    found = {mode: reports(sample, mode) for mode in ("fp16", "bf16", "int8-channel", "fp8-token")}
    chosen = smallest(found)
    assert passes(found[chosen])
    assert not [
        mode
        for mode, streams in found.items()
        if passes(streams)
        and sum(r.bytes_per_value for r in streams.values())
        < sum(r.bytes_per_value for r in found[chosen].values())
    ]
    broken = {mode: {"s": next(iter(r.values()))} for mode, r in found.items()}
    for mode in ("bf16", "int8-channel", "fp8-token"):
        broken[mode] = {"s": broken[mode]["s"].model_copy(update={"white_min": 0.5})}
    assert smallest(broken) == "fp16"


def test_plain_cosine_does_not_show_what_whitened_cosine_does() -> None:
    """A massive channel: eight bits per token, without channels brought to one size, keep it and lose the rest."""
    from cache_builder.storage import Mode

    rows = values(3, 200, 32)
    rows[:, 0] *= 50
    mean, std = statistics(rows)
    stored = quantised(rows, Mode("int8", scaled=True))
    back = dequantised(stored[""], "", stored["_scale"])
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(rows, back).mean() > 0.999
    assert cosine((rows - mean) / std, (back - mean) / std).mean() < 0.9
