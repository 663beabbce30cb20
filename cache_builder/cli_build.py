"""The verb `build`: what it takes, what it says before, while, and after; nothing heavy is imported until it runs."""

import argparse
import difflib
import inspect
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from cache_builder.cli_cost import announce, chosen_storage
from cache_builder.cli_ending import INTERRUPTED, Verbs
from cache_builder.cli_engines import devices_of, engine_of, share_rank
from cache_builder.errors import CacheError, UnknownName

if TYPE_CHECKING:
    from cache_builder.cache import FeatureCache
    from cache_builder.header import Header


def add_build(verbs: Verbs) -> None:
    """Add the verb."""
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
        "--out",
        type=Path,
        help="folder of the cache, or s3://bucket/prefix (default: caches/DATASET-BACKBONE.zarr)",
    )
    build.add_argument(
        "--streams",
        nargs="+",
        metavar="STREAM",
        help="what to store (default: all the backbone's own); also image/block_<k>, image/pixels (pictures in 8 bits, "
        "resized for the backbone), image/view_<view>/…, crop/pooled",
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
        "--store",
        default="fp16",
        metavar="MODE",
        help="fp16, fp32, bf16, int8-channel, fp8-token, pool2x2, lossless, or auto: measure a sample, print what each "
        "mode costs, take the smallest that keeps what the tokens say (default: fp16)",
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
        "--devices",
        metavar="D,D,…",
        help="several devices of this machine, one process each, e.g. 0,1 for two GPUs; overrides --device",
    )
    build.add_argument(
        "--engine",
        choices=("here", "ray"),
        default="here",
        help="who encodes: this machine, or the actors of a Ray cluster (default: here)",
    )
    build.add_argument("--address", help="of the Ray cluster (default: one is started here)")
    build.add_argument(
        "--append",
        action="store_true",
        help="add the samples that the cache at --out does not hold yet, as a new generation",
    )
    build.add_argument(
        "--shards",
        type=int,
        metavar="ROWS",
        help="chunks are zarr shards of inner chunks of ROWS rows (default: 32 on an object store, else 0: none)",
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
        help="an option of the data set, e.g. world=open; or of any: words=FILE or words=vocabulary (bare words of a "
        "czsl task), negatives=rules (false captions), segments=rules (parts of captions, for sgi), triplets=rules or "
        "triplets=FILE (edits of captions, for composed retrieval); may be repeated",
    )
    build.add_argument(
        "--dry-run", action="store_true", help="print what it would cost; write nothing"
    )
    build.set_defaults(func=_build)


def number_or_auto(text: str) -> int | None:
    """A number, or None for `auto`."""
    return None if text == "auto" else int(text)


def _build(args: argparse.Namespace) -> None:
    from cache_builder import build, load_backbone, load_dataset
    from cache_builder.batch_size import fitting_batch_size
    from cache_builder.engines import Job, join, torchrun_rank
    from cache_builder.place import at
    from cache_builder.request import cache_spec

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cache_builder").setLevel(logging.INFO)
    rank, world = torchrun_rank()
    if world > 1 and args.append:
        raise UnknownName(
            "--append does not go with torchrun; use --devices, which does the same on one machine"
        )
    devices = devices_of(args, rank, world)
    options = options_of(args.dataset, args.set)
    dataset = load_dataset(args.dataset, args.root, **options)
    backbone = load_backbone(
        args.backbone, dtype=args.dtype, device=devices[0], compiled=args.compile
    )
    out = args.out or Path("caches", f"{args.dataset}-{_file_name(args.backbone)}.zarr")
    begun = _begun(out)
    storage = args.store
    choice: dict[str, Any] = {"streams": args.streams, "order_seed": args.order_seed}
    choice |= {"crops": args.crops}
    if storage == "auto":
        plain = cache_spec(dataset, backbone, storage="fp16", **choice)
        if begun:
            print(f"{at(out)} was begun with --store {begun.spec.storage} and keeps it")
        storage = begun.spec.storage if begun else chosen_storage(dataset, backbone, plain)
    spec = cache_spec(dataset, backbone, storage=storage, **choice)
    if not rank:
        announce(dataset, backbone, spec, counting=args.dry_run)
    if args.dry_run:
        print(f"would be written to {at(out)}; nothing was")
        return
    job = Job(
        args.backbone,
        args.dataset,
        str(args.root or ""),
        options,
        args.dtype,
        devices[0],
        args.compile,
        args.workers,
    )
    if rank:
        if join(at(out), spec):
            share_rank(job, str(at(out)), rank, world)
        return
    finished = is_finished(out)
    batch_size = args.batch_size
    if batch_size is None:
        batch_size = begun.batch_size if begun else fitting_batch_size(backbone, spec.streams)
    start = time.perf_counter()
    try:
        cache = build(
            dataset,
            backbone,
            out,
            **choice,
            storage=storage,
            batch_size=batch_size,
            append=args.append,
            strict=args.strict,
            workers=args.workers,
            engine=engine_of(args, job, devices, world),
            stop=_stop_at_ctrl_c(),
            backbone_name=args.backbone,
            inner_rows=args.shards,
        )
    except KeyboardInterrupt:
        print(
            f"\nstopped; what is finished lies in {at(out)}. Repeat the command to go on from there.",
            file=sys.stderr,
        )
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        if isinstance(error, (CacheError, BrokenPipeError)):
            raise
        raise CacheError(
            f"{out} cannot be written ({error}); what is finished is kept: make room or choose another --out; repeat"
        ) from error
    same = finished and begun is not None and cache.header.digest == begun.digest
    conclude(cache, None if same else time.perf_counter() - start, fresh=begun is None)


def _stop_at_ctrl_c() -> Event:
    """An event that the first Ctrl-C sets; the second interrupts at once."""
    stop = Event()

    def first(*_: object) -> None:
        print(
            "\nfinishing the chunk in hand; Ctrl-C again stops at once", file=sys.stderr, flush=True
        )
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, first)
    return stop


def _begun(path: "Path") -> "Header | None":
    """What a cache that was begun already claims to be: it keeps its batches and its storage."""
    from cache_builder.header import read_header
    from cache_builder.place import at

    try:
        return read_header(at(path))
    except CacheError:
        return None


def is_finished(path: Path) -> bool:
    """Is there a whole cache already, so that nothing is left to do?"""
    from cache_builder.cache import FeatureCache

    try:
        return not FeatureCache.open(path).pending()
    except CacheError:
        return False


def conclude(cache: "FeatureCache", seconds: float | None, *, fresh: bool = False) -> None:
    """What came of it; `seconds` is None if there was nothing left to do, `fresh` if all of it was done in them."""
    dataset, bad = cache.spec.dataset, cache.quarantined
    content = f"{dataset.n_images} images and {dataset.n_texts} texts"
    if seconds is None:
        print(f"{content}: this cache was finished already, nothing to do")
    else:
        known = fresh and dataset.n_images
        rate = f" ({dataset.n_images / seconds:,.1f} images/s)" if known else ""
        print(f"{content} in {seconds:.1f} s{rate}")
    if bad:
        print(f"{len(bad)} images could not be used; they are in {cache.place}/quarantine.jsonl:")
        for name, reason in list(bad.items())[:3]:
            print(f"  {name}: {reason}")
    print(f"cache: {cache.place}")


def options_of(dataset: str, settings: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as the options that the data set's `load` takes; numbers and true/false are read as such.

    Raises:
        UnknownName: no such option; names the nearest.
    """
    from cache_builder import ADDED
    from cache_builder.plugins import find

    load: Callable[..., Any] = find("cache_builder.datasets", dataset).load
    parameters = inspect.signature(load).parameters.values()
    known = [*(p.name for p in parameters if p.kind is p.KEYWORD_ONLY), *ADDED]
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
