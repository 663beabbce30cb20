"""Verbs of this room: build · plan · triplets · info · verify · export · import · browse.

Nothing heavy is imported until one runs.
"""

import argparse
import json
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from cache_builder.cli_browse import add_browse
from cache_builder.cli_build import add_build, conclude, is_finished, options_of
from cache_builder.cli_ending import INTERRUPTED, Verbs, run
from cache_builder.cli_plan import add_plan
from cache_builder.cli_triplets import add_triplets
from cache_builder.errors import CacheError, UnknownName

FORMS = {".h5": "h5", ".hdf5": "h5", ".npz": "npz", ".parquet": "parquet"}
"""End of a name → form of an export."""


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m cache_builder`: the verbs of this room alone; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cache_builder", description=__doc__)
    add_verbs(parser.add_subparsers(dest="verb", required=True))
    return run(parser, argv, (CacheError,))


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs of this room."""
    add_build(verbs)
    add_plan(verbs)
    add_triplets(verbs)
    info = verbs.add_parser(
        "info", help="what a cache holds", description="Print what a cache claims to be."
    )
    info.add_argument("cache", type=Path, help="folder or URL of a cache")
    info.set_defaults(func=_info)

    verify = verbs.add_parser(
        "verify",
        help="check every byte of a cache",
        description="Compare every chunk with its checksum. Exit status 1, and every bad chunk, if there is one.",
    )
    verify.add_argument("cache", type=Path, help="folder or URL of a cache")
    verify.set_defaults(func=_verify)

    export = verbs.add_parser(
        "export",
        help="a cache as one .h5 file, or as .npz or parquet for other programs",
        description="Write a sealed cache for somebody else: .h5, from which `headstart import` makes it again byte by "
        "byte; .npz, for numpy; or a folder of parquet tables. What is there already is never overwritten.",
    )
    export.add_argument("cache", type=Path, help="folder or URL of a cache")
    target = export.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "file", type=Path, nargs="?", help="what it ends in decides: .h5, .npz or .parquet"
    )
    target.add_argument("--h5", type=Path, metavar="FILE", help="one HDF5 file, exact")
    target.add_argument("--npz", type=Path, metavar="FILE", help="one archive of numpy's arrays")
    target.add_argument(
        "--parquet", type=Path, metavar="FOLDER", help="a table of images, and one of texts"
    )
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
    add_browse(verbs)


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

    form, target = _asked_form(args)
    cache = FeatureCache.open(args.cache)
    with _writing(target, "nothing was left there; repeat the command to begin again"):
        if form == "h5":
            from cache_builder.hdf5 import export_hdf5 as export
        elif form == "npz":
            from cache_builder.npz import export_npz as export
        else:
            from cache_builder.parquet_writing import export_parquet as export
        export(cache, target, progress=True)
    files = sorted(target.iterdir()) if target.is_dir() else [target]
    size = sum(file.stat().st_size for file in files)
    print(f"{target}: {size / 1e6:,.1f} MB, every chunk compared with its checksum")
    if cache.quarantined and form != "h5":
        print(
            f"left out {len(cache.quarantined)} images that are quarantined; `quarantine` lists them"
        )


def _asked_form(args: argparse.Namespace) -> tuple[str, Path]:
    """Which form of export, and where to: as an option says, or the end of the name."""
    for form in ("h5", "npz", "parquet"):
        if (target := getattr(args, form)) is not None:
            return form, target
    form = FORMS.get(args.file.suffix.lower())
    if form is None:
        raise UnknownName(
            f"{args.file} does not end in {', '.join(FORMS)}, so its form is not known; say it by --h5, --npz or "
            "--parquet"
        )
    return form, args.file


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
def _writing(path: Path, then: str) -> Generator[None]:
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
