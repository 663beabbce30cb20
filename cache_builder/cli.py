"""Verbs of this room: build · plan · triplets · info · verify · export · import; nothing heavy until one runs."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cache_builder.cli_build import INTERRUPTED, add_build, conclude, is_finished, options_of
from cache_builder.cli_plan import add_plan
from cache_builder.cli_triplets import add_triplets
from cache_builder.errors import CacheError, UnknownName
from cache_builder.pipe import quiet_when_unread


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; a user's error is one sentence on stderr and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m cache_builder.cli", description=__doc__)
    add_verbs(parser.add_subparsers(dest="verb", required=True))
    with quiet_when_unread():
        args = parser.parse_args(argv)
    try:
        with quiet_when_unread():
            args.func(args)
    except (CacheError, FileNotFoundError) as error:
        print(f"{args.verb}: {error}", file=sys.stderr)
        return 1
    return 0


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verbs of this room."""
    add_build(verbs)
    add_plan(verbs)
    add_triplets(verbs)
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

    export = verbs.add_parser(
        "export",
        help="a cache as one .h5 file",
        description="Write a sealed cache into one HDF5 file, from which `headstart import` makes it again.",
    )
    export.add_argument("cache", type=Path)
    export.add_argument("file", type=Path, help="the .h5 file to write; never overwritten")
    export.set_defaults(func=_export)

    come = verbs.add_parser(
        "import",
        help="a cache from an exported .h5 file, or from foreign feature files",
        description="Make a cache from what `headstart export` wrote, or from .h5, .npz or .npy files of features that "
        "a small mapping describes (docs/exchange.md). Repeat the command after a stop: it resumes.",
    )
    come.add_argument("file", type=Path, help="an exported .h5 file, or a mapping, NAME.toml")
    come.add_argument("--out", type=Path, required=True, help="folder of the cache")
    come.add_argument(
        "--dataset", help="of a mapping: joins ids, texts and tasks; see `headstart list datasets`"
    )
    come.add_argument("--root", type=Path, help="folder of the data set")
    come.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of the data set, e.g. world=open; may be repeated",
    )
    come.set_defaults(func=_import)


def _info(args: argparse.Namespace) -> None:
    from cache_builder.cache import FeatureCache

    cache = FeatureCache.open(args.cache, allow_building=True)
    header, spec = cache.header, cache.spec
    total, missing = cache.chunks.total, len(cache.chunks.unlisted())
    print(
        f"{cache.place}: {cache.state}, {total - missing} of {total} chunks, schema {header.schema_version}"
    )
    _print_fields("backbone", spec.backbone.model_dump())
    _print_fields("dataset", {**spec.dataset.model_dump(), "root": header.root, **header.counts})
    for stream in spec.streams:
        layout = cache.layout(stream)
        size = layout.row_bytes * layout.shape[0] / 1e6
        print(
            f"{stream:24} {layout.dtype} {list(layout.shape)}, {layout.n_chunks} chunks, {size:,.1f} MB"
        )
        if lost := header.report.get(stream):
            print(
                f"{'':24} whitened cosine with what was computed {lost.white_mean:.5f}, at worst {lost.white_min:.5f}"
            )
    print(f"{'storage':24} {spec.storage}")
    if spec.generations:
        held = ", ".join(
            f"{images} images and {texts} texts" for images, texts, _ in spec.generations
        )
        print(f"{'before it was added to':24} {held}")
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


def _export(args: argparse.Namespace) -> None:
    from cache_builder.cache import FeatureCache
    from cache_builder.hdf5 import export_hdf5

    cache = FeatureCache.open(args.cache)
    with _writing(args.file, "nothing was left there; repeat the command to begin again"):
        export_hdf5(cache, args.file, progress=True)
    print(
        f"{args.file}: {args.file.stat().st_size / 1e6:,.1f} MB, every chunk compared with its checksum"
    )


def _import(args: argparse.Namespace) -> None:
    from cache_builder import load_dataset

    foreign = args.file.suffix.lower() == ".toml"
    if not foreign and (args.dataset or args.root or args.set):
        raise UnknownName(
            f"--dataset, --root and --set belong to a mapping (.toml), but {args.file} is none; an exported cache "
            "holds its ids and tasks already"
        )
    dataset = None
    if args.dataset:
        dataset = load_dataset(args.dataset, args.root, **options_of(args.dataset, args.set))
    finished = is_finished(args.out)
    start = time.perf_counter()
    with _writing(args.out, "repeat the command to go on from there"):
        if foreign:
            from cache_builder.foreign import import_features

            cache = import_features(args.file, args.out, dataset=dataset, progress=True)
            for what, count in cache.header.counts.items():
                print(f"{what:24} {count}")
        else:
            from cache_builder.hdf5 import import_hdf5

            cache = import_hdf5(args.file, args.out, progress=True)
    conclude(cache, None if finished else time.perf_counter() - start)


@contextmanager
def _writing(path: Path, then: str) -> Iterator[None]:
    """A stop or a full disk in one sentence."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped while writing {path}; {then}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        if isinstance(error, (CacheError, BrokenPipeError)):
            raise
        raise CacheError(
            f"{path} cannot be written ({error}); make room or choose another place; {then}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
