"""`headstart plan`: its bytes are those of a real build, and nothing it prints is assumed."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
from kinds import KINDS, directory, model

from cache_builder import FeatureCache, build, load_dataset, plugins
from cache_builder.backbones.cards import Card
from cache_builder.cli_plan import count, positive
from cache_builder.errors import UnknownName
from cache_builder.plan import Means, Planned, Samples, planned, streams_of
from cache_builder.plugins import find
from cache_builder.storage import MODES
from heads.cli import main

FIXED = ("clip", "siglip2", "pe", "llava")
UNPLANNED = r"(image|text)/(id|string|vocabulary|copies)|readout/.*|.*_(mean|std)"
"""Arrays whose size does not follow from shapes, or that do not grow with the samples."""
BLOSC_HEADER = 16
"""Bytes that a frame adds where nothing can be compressed, as in chunks of noise."""
CHUNK = 3_300
"""Bytes of a chunk: a few images each, so that last chunks are padded."""


def card(kind: str) -> Card:
    found: Card = find("cache_builder.backbones", KINDS[kind].family).card(str(directory(kind)))
    return found


@pytest.fixture(scope="module")
def photos(fast_folder: Path) -> Path:
    root = fast_folder / "plan-photos"
    plugins.find("cache_builder.datasets", "folder").miniature(root, kind="captions")
    return root


def made(photos: Path, kind: str, path: Path, **options: Any) -> FeatureCache:
    given = {"batch_size": 4, "chunk_bytes": CHUNK, "progress": False}
    return build(load_dataset("folder", photos), model(kind), path, **{**given, **options})


def mean(cache: FeatureCache, home: str) -> float:
    """Entries of a row of a ragged stream, in the mean."""
    (entries,) = {
        la.shape[0]
        for n, la in cache.header.arrays.items()
        if n in (f"{home}/tokens", f"{home}/patches")
    }
    return entries / (cache.header.arrays[f"{home}/offsets"].shape[0] - 1)


def as_built(cache: FeatureCache, kind: str, storage: str, inner: int = 0) -> Planned:
    """The plan of a cache, told what a user would measure: lengths of texts and of pictures."""
    n, texts = cache.spec.dataset.n_images, cache.spec.dataset.n_texts
    ragged = "image/offsets" in cache.header.arrays
    samples = Samples(
        n,
        texts,
        mean(cache, "text") if "text/offsets" in cache.header.arrays else None,
        mean(cache, "image") if ragged else None,
        inner_rows=inner,
    )
    return planned(card(kind), f"x:{kind}", cache.spec.streams, samples, storage, CHUNK)


def on_disk(cache: FeatureCache, found: Planned) -> int:
    """Bytes of the files of the planned arrays."""
    return sum(
        cache.chunks.file(la.name, chunk).stat().st_size
        for la in found.layouts.values()
        for chunk in range(la.n_chunks)
    )


@pytest.mark.parametrize("storage", MODES)
@pytest.mark.parametrize("kind", [*FIXED, "siglip2-naflex"])
def test_a_plan_is_what_a_build_writes(
    photos: Path, fast_path: Path, kind: str, storage: str
) -> None:
    if (kind, storage) == ("siglip2-naflex", "pool2x2"):
        with pytest.raises(UnknownName, match="square grid"):
            planned(card(kind), "x:y", ["image/patches"], Samples(3), storage)
        return
    cache = made(photos, kind, fast_path / "it.zarr", storage=storage)
    found = as_built(cache, kind, storage)
    assert streams_of(card(kind), None, found.samples.texts) == cache.spec.streams
    for name, layout in found.layouts.items():
        assert layout == cache.header.arrays[name]
    rest = set(cache.header.arrays) - set(found.layouts)
    assert all(re.fullmatch(UNPLANNED, name) for name in rest)
    assert any(layout.n_chunks > 1 for layout in found.layouts.values())
    if storage == "lossless":
        assert found.mark == "≤"
        assert on_disk(cache, found) <= found.bytes + BLOSC_HEADER * found.files
    else:
        assert (found.mark, found.bytes) == ("", on_disk(cache, found))


def test_bytes_of_an_image_and_of_a_text_are_the_rows_without_padding(
    photos: Path, fast_path: Path
) -> None:
    cache = made(photos, "clip", fast_path / "it.zarr", storage="int8-channel")
    found = as_built(cache, "clip", "int8-channel")
    n, width, joint = 16, 48, 24
    assert found.bytes_each("image") == n * width + n * 4 + width * 2 + joint * 2
    tokens = mean(cache, "text")
    texts = found.samples.texts
    offsets = 8 * (texts + 1) / texts
    assert found.bytes_each("text") == pytest.approx(tokens * (40 + 4 + 4) + joint * 2 + offsets)


def test_shards_pixels_blocks_and_views_are_planned_too(photos: Path, fast_path: Path) -> None:
    streams = ("image/pixels", "image/block_1", "image/view_flip/pooled", "image/pooled")
    cache = made(photos, "clip", fast_path / "it.zarr", streams=streams, inner_rows=2)
    found = as_built(cache, "clip", "fp16", inner=2)
    assert set(streams) <= set(found.layouts)
    assert found.bytes == on_disk(cache, found)


def test_what_is_unknown_is_bounded_or_stands_for_square_pictures() -> None:
    clip, naflex = card("clip"), card("siglip2-naflex")

    def mark(of: Card, streams: list[str], samples: Samples) -> str:
        return planned(of, "x:y", streams, samples, "fp16").mark

    assert mark(clip, ["text/tokens"], Samples(2, 3)) == "≤"
    assert mark(clip, ["text/tokens"], Samples(2, 3, tokens=9.0)) == ""
    assert mark(naflex, ["image/patches"], Samples(2)) == "≤"
    assert mark(naflex, ["image/patches"], Samples(2, patches=8.5)) == ""
    assert mark(clip, ["crop/pooled", "text/tokens"], Samples(2, 3)) == "~"


def test_hours_and_costs_are_plain_arithmetic_or_open() -> None:
    means = Means(rate=50.0, devices=4, bandwidth=100.0, device_hour=2.5, gb_month=0.02)
    assert means.device_hours(3_600_000) == 20
    assert means.encoding_hours(3_600_000) == 5
    assert means.writing_hours(36 * 10**10) == 1
    assert (
        means.building_cost(3_600_000, 36 * 10**10) == 5 * 4 * 2.5
    )  # devices work longer than storage
    assert means.building_cost(3_600_000, 36 * 10**11) == 10 * 4 * 2.5  # and here they wait for it
    assert (
        Means(rate=50.0, device_hour=1.0).building_cost(3_600_000, 10**20) == 20
    )  # as far as is known
    assert Means(rate=50.0, device_hour=0.0, gb_month=0.0).building_cost(9, 9) == 0
    assert Means(gb_month=0.0).monthly_cost(9) == 0
    assert means.monthly_cost(10**12) == 20
    none = Means()
    assert none.device_hours(9) is none.building_cost(9, 9) is none.encoding_hours(9) is None
    assert none.writing_hours(9) is none.monthly_cost(9) is None


def test_the_table_leaves_open_what_nobody_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--backbone", "clip:ViT-B-32/openai", "--images", "1e6", "--texts", "5e6"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    for flag in ("--rate", "--bandwidth", "--price-device-hour", "--price-gb-month"):
        assert re.search(rf"^open: .*{flag}", said, re.M)
    row = next(line for line in said.splitlines() if line.startswith("fp16"))
    assert row.split()[-5:] == ["–"] * 5
    given = ["--rate", "100", "--devices", "10", "--bandwidth", "500"]
    given += ["--price-device-hour", "2", "--price-gb-month", "0.02", "--tokens", "12"]
    assert main([*asked, *given]) == 0
    said = capsys.readouterr().out
    assert "open:" not in said
    row = next(line for line in said.splitlines() if line.startswith("fp16"))
    assert "≤" not in row
    assert row.split()[-3:-1] == ["0.28", "5.6"]  # 10⁶ / 100 / 3600 / 10 h; 2.78 h at 2


def test_the_table_of_the_page_on_scaling_is_what_its_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text()
    (command,) = re.findall(
        r"^headstart (plan .*--price-gb-month.*)$", page.replace("\\\n", ""), re.M
    )
    assert main(command.split()) == 0
    assert f"```text\n{capsys.readouterr().out}```" in page


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--backbone", "clip"], "names no checkpoint"),
        (["--backbone", "clip:nothing"], "no architecture"),
        (["--images", "0"], "nothing to plan"),
        (["--devices", "0"], "somebody must encode"),
        (["--streams", "image/patch"], "no stream"),
        (["--streams", "image/block_13"], "blocks 0 … 12"),
        (["--streams", "image/view_moon/pooled"], "known view"),
        (["--streams", "word/states"], "--dry-run"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(
    given: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--backbone", "clip:ViT-B-32/openai", "--images", "10", *given]
    assert main(["plan", *asked]) == 1
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1


def test_more_chunks_than_can_be_listed_are_refused_mode_by_mode(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "--backbone", "clip:ViT-L-14-336/openai", "--images", "150e6"]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines()[2:9]}
    assert set(rows["fp32"]) == {"–"}
    assert "–" not in rows["int8-channel"][:1]
    assert "share the images out among several caches" in said


@pytest.mark.parametrize("text", ["1.5", "-3", "inf", "nan", "1e400"])
def test_a_count_is_a_whole_number(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 0 on"):
        count(text)
    with pytest.raises(SystemExit):
        main(["plan", "--backbone", "clip:ViT-B-32/openai", f"--images={text}"])
    assert f"{text} is not a whole number from 0 on" in capsys.readouterr().err
    assert count("100e6") == 100_000_000


@pytest.mark.parametrize("text", ["0", "-3", "inf", "nan"])
def test_a_rate_is_above_0(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        positive(text)
    assert positive("0.5") == 0.5
