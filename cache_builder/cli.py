"""Verbs of this room: build · info · verify · list. Nothing heavy is imported until a verb runs."""

import argparse
import difflib
import inspect
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_builder.errors import CacheError, UnknownName

if TYPE_CHECKING:
    from cache_builder.backbones.base import Backbone
    from cache_builder.cache import FeatureCache
    from cache_builder.datasets.base import Dataset
    from cache_builder.spec import CacheSpec

INTERRUPTED = 130
"""Exit status of a command stopped by Ctrl-C, as shells have it."""

SAMPLE = 64
"""Texts and pictures looked at to estimate how many tokens, patches and crops all of them have."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; a user's error is one sentence on stderr and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m cache_builder.cli", description=__doc__)
    add_verbs(parser.add_subparsers(dest="verb", required=True))
    args = parser.parse_args(argv)
    try:
        args.func(args)
    except (CacheError, FileNotFoundError) as error:
        print(f"{args.verb}: {error}", file=sys.stderr)
        return 1
    return 0


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verbs of this room."""
    build = verbs.add_parser(
        "build",
        help="encode a data set into a feature cache",
        description="One pass over a data set with a frozen backbone. Repeat the command after a stop: it resumes.",
    )
    build.add_argument(
        "--backbone",
        required=True,
        help="family:checkpoint, e.g. clip:ViT-B-32/openai or clip:demo",
    )
    build.add_argument("--dataset", required=True, help="see `headstart list datasets`")
    build.add_argument("--root", type=Path, help="folder of the data set")
    build.add_argument(
        "--out", type=Path, help="folder of the cache (default: caches/DATASET-BACKBONE.zarr)"
    )
    build.add_argument(
        "--streams",
        nargs="+",
        metavar="STREAM",
        help="what to store (default: all the backbone's own); also image/block_<k>, image/view_<view>/…, crop/pooled",
    )
    build.add_argument(
        "--crops",
        choices=("all", "fast"),
        default="all",
        help="windows of crop/pooled: all sizes, or 1, 2 and 7 cells (default: all)",
    )
    build.add_argument(
        "--batch-size",
        type=number_or_auto,
        default=64,
        metavar="N",
        help="rows encoded together, or auto: what the accelerator's memory takes (default: 64)",
    )
    build.add_argument(
        "--store", choices=("fp16", "fp32"), default="fp16", help="stored dtype (default: fp16)"
    )
    build.add_argument(
        "--order-seed", type=int, default=0, help="seed of the order of rows (default: 0)"
    )
    build.add_argument(
        "--workers", type=int, default=2, help="threads that decode images (default: 2)"
    )
    build.add_argument("--strict", action="store_true", help="fail at an image that cannot be used")
    build.add_argument(
        "--device", default="cpu", help="where the backbone runs, e.g. cuda (default: cpu)"
    )
    build.add_argument(
        "--dtype",
        default="float32",
        help="float32, or bfloat16 or float16 by autocast (default: float32)",
    )
    build.add_argument(
        "--compile", action="store_true", help="run the backbone's blocks through torch.compile"
    )
    build.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the data set, e.g. world=open; may be repeated",
    )
    build.add_argument(
        "--dry-run", action="store_true", help="print what it would cost; write nothing"
    )
    build.set_defaults(func=_build)

    info = verbs.add_parser(
        "info", help="what a cache holds", description="Print what a cache claims to be."
    )
    info.add_argument("cache", type=Path)
    info.set_defaults(func=_info)

    verify = verbs.add_parser(
        "verify",
        help="check every byte of a cache",
        description="Compare every chunk with its checksum. Exit status 1, and every bad chunk, if there is one.",
    )
    verify.add_argument("cache", type=Path)
    verify.set_defaults(func=_verify)


def number_or_auto(text: str) -> int | None:
    """A number, or None for `auto`."""
    return None if text == "auto" else int(text)


def _build(args: argparse.Namespace) -> None:
    from cache_builder import build, load_backbone, load_dataset
    from cache_builder.request import cache_spec

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cache_builder").setLevel(logging.INFO)
    options = _options(args.dataset, args.set)
    dataset = load_dataset(args.dataset, args.root, **options)
    backbone = load_backbone(
        args.backbone, dtype=args.dtype, device=args.device, compiled=args.compile
    )
    out = args.out or Path("caches", f"{args.dataset}-{_file_name(args.backbone)}.zarr")
    choice = {"streams": args.streams, "storage": args.store, "order_seed": args.order_seed}
    choice |= {"crops": args.crops}
    spec = cache_spec(dataset, backbone, **choice)
    _announce(dataset, backbone, spec)
    if args.dry_run:
        print(f"would be written to {out}; nothing was")
        return
    finished = _is_finished(out)
    batch_size = args.batch_size
    if batch_size is None:
        batch_size = _begun_with(out) or _fitting(backbone, spec)
    start = time.perf_counter()
    try:
        cache = build(
            dataset,
            backbone,
            out,
            **choice,
            batch_size=batch_size,
            strict=args.strict,
            workers=args.workers,
            backbone_name=args.backbone,
        )
    except KeyboardInterrupt:
        print(
            f"\nstopped; what is finished lies in {out}. Repeat the command to go on from there.",
            file=sys.stderr,
        )
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        if isinstance(error, CacheError):
            raise
        raise CacheError(
            f"{out} cannot be written ({error}); what is finished is kept: make room or choose another --out; repeat"
        ) from error
    _conclude(cache, None if finished else time.perf_counter() - start)


def _begun_with(path: Path) -> int | None:
    """The batch size of a cache that was begun already: it keeps it."""
    from cache_builder.header import read_header

    try:
        return read_header(path).batch_size
    except CacheError:
        return None


def _fitting(backbone: "Backbone", spec: "CacheSpec") -> int:
    from cache_builder.batch_size import fitting_batch_size
    from cache_builder.format import stream

    blocks = [b for s in spec.streams if (b := stream(s).block) is not None]
    return fitting_batch_size(backbone, blocks)


def _is_finished(path: Path) -> bool:
    from cache_builder.cache import FeatureCache

    try:
        return not FeatureCache.open(path).pending()
    except CacheError:
        return False


def _announce(dataset: "Dataset", backbone: "Backbone", spec: "CacheSpec") -> None:
    """What is about to be built, and what it costs."""
    from cache_builder.format import is_ragged

    texts = [t.text for t in dataset.texts]
    for what, count in dataset.counts.items():
        print(f"{what:24} {count}")
    if any(stream.startswith("text/") for stream in spec.streams):
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


def _bytes(spec: "CacheSpec", dataset: "Dataset", backbone: "Backbone") -> dict[str, int]:
    """Stream → bytes of its values; of ragged ones an estimate from a sample."""
    from cache_builder.contents import n_entries
    from cache_builder.format import plan

    layouts = plan(spec, {}, n_entries(spec, dataset, backbone, SAMPLE))
    return {s: layouts[s].row_bytes * layouts[s].shape[0] for s in spec.streams}


def _conclude(cache: "FeatureCache", seconds: float | None) -> None:
    """What came of it; `seconds` is None if there was nothing left to do."""
    dataset, bad = cache.spec.dataset, cache.quarantined
    content = f"{dataset.n_images} images and {dataset.n_texts} texts"
    if seconds is None:
        print(f"{content}: this cache was finished already, nothing to do")
    else:
        rate = f" ({dataset.n_images / seconds:,.1f} images/s)" if dataset.n_images else ""
        print(f"{content} in {seconds:.1f} s{rate}")
    if bad:
        print(
            f"{len(bad)} images could not be used; they are in {cache.path / 'quarantine.jsonl'}:"
        )
        for name, reason in list(bad.items())[:3]:
            print(f"  {name}: {reason}")
    print(f"cache: {cache.path}")


def _info(args: argparse.Namespace) -> None:
    from cache_builder.cache import FeatureCache

    cache = FeatureCache.open(args.cache, allow_building=True)
    header, spec = cache.header, cache.spec
    total, missing = cache.chunks.total, len(cache.chunks.unlisted())
    print(
        f"{cache.path}: {cache.state}, {total - missing} of {total} chunks, schema {header.schema_version}"
    )
    _print_fields("backbone", spec.backbone.model_dump())
    _print_fields("dataset", {**spec.dataset.model_dump(), "root": header.root, **header.counts})
    for stream in spec.streams:
        layout = cache.layout(stream)
        size = layout.row_bytes * layout.shape[0] / 1e6
        print(
            f"{stream:24} {layout.dtype} {list(layout.shape)}, {layout.n_chunks} chunks, {size:,.1f} MB"
        )
    for name, rule in spec.rules.items():
        print(f"{name:24} {rule}")
    print(f"{'tasks':24} {', '.join(cache.tasks.kinds) or 'none'}")
    print(f"{'quarantined':24} {len(cache.quarantined)} images")
    print(f"{'fingerprint':24} {cache.fingerprint}")
    print(f"{'digest':24} {header.digest or 'not sealed yet'}")


def _print_fields(title: str, fields: Mapping[str, object]) -> None:
    for name, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        print(f"{title + ' ' + name:24} {text if len(text) <= 200 else text[:199] + '…'}")


def _verify(args: argparse.Namespace) -> None:
    from cache_builder.cache import FeatureCache

    report = FeatureCache.open(args.cache, allow_building=True).verify(progress=True)
    for problem in report.problems:
        print(problem, file=sys.stderr)
    if not report.ok:
        print(f"{args.cache}: {len(report.problems)} problems", file=sys.stderr)
        raise SystemExit(1)
    print(
        f"{args.cache}: {report.chunks} chunks, {report.bytes / 1e6:,.1f} MB, every byte as written"
    )


def _options(dataset: str, settings: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as the options that the data set's `load` takes; numbers and true/false are read as such.

    Raises:
        UnknownName: no such option; names the nearest.
    """
    from cache_builder.plugins import find

    load: Callable[..., Any] = find("cache_builder.datasets", dataset).load
    parameters = inspect.signature(load).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UnknownName(
                f"--set {setting}: not an option of data set {dataset}{hint} (KEY=VALUE with KEY one of: "
                f"{', '.join(known) or 'none'})"
            )
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def _file_name(backbone: str) -> str:
    """A backbone's name as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in backbone).strip("-.")


if __name__ == "__main__":
    sys.exit(main())
