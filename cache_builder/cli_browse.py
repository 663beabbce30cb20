"""`headstart browse`: a page, on this machine only, to look through caches. Nothing heavy is imported until it runs."""

import argparse
import importlib.util
import secrets
from contextlib import suppress
from pathlib import Path

from cache_builder.cli_ending import Verbs
from cache_builder.errors import UnknownName

PARTS = ("nicegui", "fastapi", "uvicorn")
"""What the extra `browse` brings, as far as it is imported here."""


def add_browse(verbs: Verbs) -> None:
    """Add the verb."""
    browse = verbs.add_parser(
        "browse",
        help="look through caches on a local page: neighbours and similar patches, backbone by backbone",
        description="Serve a page on 127.0.0.1, and nowhere else, until Ctrl-C: pictures and what is said of them, the "
        "nearest images per backbone, images for a cached text, and on a click which patches are alike. Several caches "
        "must hold the same samples.",
    )
    browse.add_argument("caches", nargs="+", metavar="CACHE")
    browse.add_argument(
        "--port", type=int, default=0, help="default: any free one; the address is printed"
    )
    browse.add_argument("--split", help="only its images, e.g. test (default: all)")
    browse.add_argument(
        "--most",
        type=int,
        metavar="N",
        help="images looked at, the first of the row order, which is random (default: 20,000; 2,000 where a cache has "
        "no pooled embeddings, so that patches are read)",
    )
    browse.add_argument("-k", type=int, default=8, help="neighbours shown (default: 8)")
    browse.add_argument(
        "--root", type=Path, metavar="FOLDER", help="where the data set's pictures lie now"
    )
    browse.set_defaults(func=_browse)


def _browse(args: argparse.Namespace) -> None:
    if missing := [name for name in PARTS if importlib.util.find_spec(name) is None]:
        raise UnknownName(f"browsing needs {', '.join(missing)}: pip install 'headstart[browse]'")
    for name, value in (("--most", args.most), ("-k", args.k)):
        if value is not None and value < 1:
            raise UnknownName(f"{name} {value} shows nothing; it must be at least 1")
    from cache_builder.browse import spaces_of, uses_means
    from cache_builder.browse_pictures import pictures_of
    from cache_builder.browse_samples import MOST, MOST_MEANS, samples_of
    from cache_builder.browse_server import listening, serve
    from cache_builder.cache import FeatureCache

    caches = [FeatureCache.open(place, check="read") for place in args.caches]
    default = MOST_MEANS if any(uses_means(cache) for cache in caches) else MOST
    samples = samples_of(caches, args.split, args.most or default)
    with listening(args.port) as place:
        spaces = spaces_of(caches, samples)
        pictures = pictures_of(caches[0], args.root and str(args.root))
        if pictures.missing:
            print(pictures.missing)
        host, port = place.getsockname()
        key = secrets.token_urlsafe(16)
        print(
            f"http://{host}:{port}/?key={key}  (only on this machine; Ctrl-C ends it)", flush=True
        )
        with suppress(KeyboardInterrupt):
            serve(samples, spaces, pictures, args.k, place, key)
        print("\nstopped", flush=True)
