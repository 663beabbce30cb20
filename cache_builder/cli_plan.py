"""The verb `plan`: what a build of any size would take, by storage mode, before a single picture is there."""

import argparse
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cache_builder.cli_ending import Verbs
from cache_builder.errors import UnknownName

if TYPE_CHECKING:
    from cache_builder.backbones.cards import Card
    from cache_builder.plan import Means, Planned

LEGEND = """\
GB: 10⁹ bytes of embeddings, scales, offsets and token ids, whole chunks; ids, strings and the manifest come on top.
write h: writing alone, at --bandwidth. encode h: the devices together; building overlaps both, so the larger counts.
≤: an upper bound, ~: as if all pictures were square. Texts take time of their own, which --rate does not hold."""

WANTED = {
    "rate": "device h and encode h: --rate IMAGES_PER_SECOND of one device, which `headstart build` prints; build a "
    "few hundred of the pictures there",
    "bandwidth": "write h: --bandwidth MB_PER_SECOND that the storage takes from all devices together",
    "device_hour": "build cost: --price-device-hour",
    "gb_month": "cost a month: --price-gb-month",
}
"""Field of `Means` → what its absence leaves open, and the argument that fills it in."""


def add_plan(verbs: Verbs) -> None:
    """Add the verb."""
    plan = verbs.add_parser(
        "plan",
        help="bytes, files, hours and cost of a build of any size, by storage mode",
        description="Compute from a checkpoint's shapes what a cache of N images and texts takes under every storage "
        "mode. Nothing is encoded, and no rate or price is assumed: what is not given stays open.",
    )
    plan.add_argument(
        "--backbone",
        required=True,
        help="family:checkpoint, see `headstart list backbones`; needs no weights",
    )
    plan.add_argument(
        "--images", type=count, required=True, metavar="N", help="how many; 100e6 is fine"
    )
    plan.add_argument(
        "--texts", type=count, default=0, metavar="N", help="captions or prompts (default: 0)"
    )
    plan.add_argument(
        "--tokens",
        type=positive,
        metavar="MEAN",
        help="stored rows of a text, in the mean (default: the most that the tower takes, an upper bound)",
    )
    plan.add_argument(
        "--patches",
        type=positive,
        metavar="MEAN",
        help="patches of a picture, in the mean, where they keep their shape (default: the most, an upper bound)",
    )
    plan.add_argument(
        "--streams",
        nargs="+",
        metavar="STREAM",
        help="as for `headstart build` (default: all the backbone's own)",
    )
    plan.add_argument(
        "--crops", choices=("all", "fast"), default="all", help="as for `headstart build`"
    )
    plan.add_argument(
        "--shards",
        type=count,
        default=0,
        metavar="ROWS",
        help="rows of an inner chunk; on an object store `headstart build` takes 32 (default: 0, plain chunks)",
    )
    plan.add_argument(
        "--rate",
        type=positive,
        metavar="IMAGES_PER_SECOND",
        help="of one device, as measured by a small `headstart build` on it",
    )
    plan.add_argument("--devices", type=count, default=1, metavar="N", help="default: 1")
    plan.add_argument(
        "--bandwidth",
        type=positive,
        metavar="MB_PER_SECOND",
        help="that the storage takes from all devices together",
    )
    plan.add_argument("--price-device-hour", type=positive, metavar="P", help="in any currency")
    plan.add_argument(
        "--price-gb-month", type=positive, metavar="P", help="of keeping 10⁹ bytes for a month"
    )
    plan.set_defaults(func=_plan)


def count(text: str) -> int:
    """A whole number, also as 100e6; `ValueError` makes argparse refuse it."""
    value = float(text)
    if not (0 <= value < float("inf")) or value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 on")
    return int(value)


def positive(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _plan(args: argparse.Namespace) -> None:
    from cache_builder.plan import Means, Samples, planned, streams_of
    from cache_builder.storage import MODES

    if not args.images:
        raise UnknownName("--images 0: a cache of no images has nothing to plan; say how many")
    if not args.devices:
        raise UnknownName("--devices 0: somebody must encode; say how many devices")
    card = _card(args.backbone)
    streams = streams_of(card, args.streams, args.texts)
    samples = Samples(args.images, args.texts, args.tokens, args.patches, args.crops, args.shards)
    means = Means(
        args.rate, args.devices, args.bandwidth, args.price_device_hour, args.price_gb_month
    )
    texts = f" and {args.texts:,} texts" if args.texts else ""
    print(f"{args.backbone}: {args.images:,} images{texts}, {', '.join(streams)}")
    rows, refused = [HEADS], list[str]()
    for mode in MODES:
        try:
            rows.append(_row(planned(card, args.backbone, streams, samples, mode), means))
        except UnknownName as error:
            rows.append([mode, *["–"] * (len(HEADS) - 1)])
            refused.append(str(error))
    print("\n".join(_aligned(rows)))
    print(LEGEND)
    for said in [*refused, *_open(means)]:
        print(said)


HEADS = [
    "storage",
    "KiB/image",
    "KiB/text",
    "GB",
    "files",
    "write h",
    "device h",
    "encode h",
    "build cost",
    "cost a month",
]


def _card(backbone: str) -> "Card":
    """Shapes of a checkpoint, by `family:checkpoint`."""
    from cache_builder.plugins import find

    family, colon, checkpoint = backbone.partition(":")
    if not (colon and checkpoint):
        raise UnknownName(
            f"backbone {backbone!r} names no checkpoint; write family:checkpoint, for instance clip:ViT-B-32/openai"
        )
    module = find("cache_builder.backbones", family)
    if not hasattr(module, "card"):
        raise UnknownName(
            f"the file of family {family} has no `card`, which says shapes without weights; `headstart build "
            "--dry-run` asks the loaded backbone instead"
        )
    card: Card = module.card(checkpoint)
    return card


def _row(found: "Planned", means: "Means") -> list[str]:
    """A storage mode's cells."""
    mark = f"{found.mark} " if found.mark else ""
    images, size = found.samples.images, found.bytes
    each = [found.bytes_each(side) / 1024 for side in ("image", "text")]
    return [
        found.storage,
        f"{mark}{each[0]:,.1f}",
        f"{mark}{each[1]:,.1f}" if found.samples.texts else "–",
        f"{mark}{_number(size / 1e9)}",
        f"{mark}{found.files:,}",
        *map(_number, (means.writing_hours(size), means.device_hours(images))),
        *map(_number, (means.encoding_hours(images), means.building_cost(images, size))),
        _number(means.monthly_cost(size)),
    ]


def _number(value: float | None) -> str:
    """To a tenth; what is less than one to two digits, so that a small plan is not all zeros."""
    if value is None:
        return "–"
    return f"{value:,.1f}" if value >= 1 or not value else f"{value:.2g}"


def _open(means: "Means") -> list[str]:
    """What would fill the columns that are open."""
    missing = [said for field, said in WANTED.items() if getattr(means, field) is None]
    return [f"open: {said}" for said in missing]


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Cells under each other: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells: list[Any] = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join(cells)
