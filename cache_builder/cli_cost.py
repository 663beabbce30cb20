"""What a build is about to cost: samples and bytes of every stream, and the table of `--store auto`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache_builder.backbones.base import Backbone
    from cache_builder.datasets.base import Dataset
    from cache_builder.spec import CacheSpec

SAMPLE = 64
"""Texts and pictures looked at to estimate how many tokens, patches and crops all of them have."""


def announce(
    dataset: "Dataset", backbone: "Backbone", spec: "CacheSpec", *, counting: bool
) -> None:
    """What is about to be built, and what it costs; `counting` also says how many texts are cut, as a build does."""
    from cache_builder.format import is_ragged

    texts = [t.text for t in dataset.texts]
    for what, count in dataset.counts.items():
        print(f"{what:24} {count}")
    if counting and any(stream.startswith("text/") for stream in spec.streams):
        cut = sum(backbone.truncated(texts[i : i + 4096]) for i in range(0, len(texts), 4096))
        most = backbone.spec.dims["context"]
        print(f"{'texts cut to fit':24} {cut} of {len(texts)} (at most {most} tokens)")
    n = {"image": len(dataset.images), "crop": len(dataset.images), "text": len(texts)}
    sizes = _bytes(spec, dataset, backbone)
    for stream, size in sizes.items():
        about = "about " if is_ragged(stream, spec.backbone.dims) else ""
        rows = n.get(stream.split("/")[0])
        each = f"  {about}{size / rows / 1024:,.1f} KiB each" if rows else ""
        print(f"{stream:24} {about}{size / 1e6:,.1f} MB{each}")
    total = sum(sizes.values())
    print(f"{'total':24} {total / 1e6:,.1f} MB", flush=True)


def chosen_storage(dataset: "Dataset", backbone: "Backbone", spec: "CacheSpec") -> str:
    """The storage that `auto` means, after a table of what each costs."""
    from cache_builder.sample import (
        LOSSY,
        MOST,
        WHITE_MEAN,
        WHITE_MIN,
        passes,
        reports,
        sampled,
        smallest,
    )

    print(f"measuring storage modes on the tokens of up to {MOST:,} images and texts …", flush=True)
    sample = sampled(spec, dataset, backbone)
    found = {mode: reports(sample, mode) for mode in ("fp16", "lossless", *LOSSY)}
    values = {s: size // 2 for s, size in _bytes(spec, dataset, backbone).items()}
    heads = f"{'bytes/value':>11} {'whole cache':>12} {'cosine':>8} {'whitened':>9} {'at worst':>9}"
    print(f"{'storage':14} {heads}  in stream")
    for mode, streams in found.items():
        size = sum(
            n * (streams[s].bytes_per_value if s in streams else 2) for s, n in values.items()
        )
        tokens = sum(values[s] for s in streams)
        each = sum(values[s] * r.bytes_per_value for s, r in streams.items()) / max(tokens, 1)
        line = f"{mode:14} {each:11.3f} {size / 1e6:9,.1f} MB"
        if streams:
            name = min(streams, key=lambda s: streams[s].white_min)
            r = streams[name]
            line += f" {r.cosine:8.5f} {r.white_mean:9.5f} {r.white_min:9.5f}  {name}"
        print(line if passes(streams) else f"{line}: not good enough")
    chosen = smallest(found)
    print(
        "whitened: cosine after every channel is brought to mean 0, deviation 1; what large channels hide shows"
    )
    print(
        f"wanted: {WHITE_MEAN} in the mean and {WHITE_MIN} at worst, in every stream; the smallest such mode is taken"
    )
    print(f"chosen: {chosen} (lossless is shown for comparison; it is never chosen)", flush=True)
    return chosen


def _bytes(spec: "CacheSpec", dataset: "Dataset", backbone: "Backbone") -> dict[str, int]:
    """Stream → bytes of its values; of ragged ones an estimate from a sample."""
    from cache_builder.contents import n_entries
    from cache_builder.format import plan

    layouts = plan(spec, {}, n_entries(spec, dataset, backbone, SAMPLE))
    return {s: layouts[s].row_bytes * layouts[s].shape[0] for s in spec.streams}
