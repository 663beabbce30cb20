"""A cache whose chunks come from somewhere else than a backbone: begun, filled, sealed; repeating it finishes it.

What `build` does for encoded batches, for whole chunks that are there already: the same lock, the same journals, the
same states, so a kill at any moment leaves a cache from which the same command goes on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tqdm import tqdm

from cache_builder.cache import FeatureCache, resumed
from cache_builder.errors import CacheCorrupt, CacheIncomplete
from cache_builder.header import read_header
from cache_builder.lock import clear_remnant, is_remnant, locked
from cache_builder.place import Place, at


def receive(
    path: str | Path,
    begin: Callable[[], FeatureCache],
    check: Callable[[FeatureCache], None],
    chunk: Callable[[str, int], NDArray[Any]],
    *,
    digest: str | None = None,
    progress: bool = False,
) -> FeatureCache:
    """Make a sealed cache, or finish the one begun here.

    Args:
        path: folder of the cache: free, or what an earlier call left.
        begin: lays out the new cache, with everything in it but the embeddings.
        check: raises if the cache found or begun here is not the one that is coming.
        chunk: (array, chunk) → its values, of the layout's `chunk_shape` and type, padding included.
        digest: what the content has to be, where that is known.
        progress: show a bar.

    Raises:
        CacheLocked: another process writes this cache.
        CacheNotFound: the path holds something that is no cache; it is not touched.
        CacheCorrupt: the content is not that of `digest`; the cache stays unsealed.
    """
    place = at(path)
    with locked(place):
        cache = _begun(place)
        if cache is None:
            cache = begin()
        check(cache)
        pending = cache.pending()
        if lost := [
            f"{array} ({n})" for array, n in pending if array not in cache.header.embedded()
        ]:
            raise CacheIncomplete(
                f"{place} lost {', '.join(lost)}, which are written at the beginning only: remove the cache and repeat"
            )
        if pending and cache.state == "sealed":
            cache.unseal()  # a chunk's file was lost or cut: repair
        for array, n in tqdm(pending, "import", unit="chunk", disable=not progress):
            cache.write_chunk(array, n, chunk(array, n))
        if cache.state != "sealed":
            if digest not in (None, cache.digest()):
                raise CacheCorrupt(
                    f"what was received into {place} has the content digest {cache.digest()[:12]}, not {digest[:12]}; "
                    "remove it, and import an undamaged file"
                )
            cache.seal()
    return FeatureCache.open(place)


def _begun(place: Place) -> FeatureCache | None:
    """The cache begun here, or None where there is none yet."""
    try:
        header = read_header(place)
    except CacheIncomplete:
        assert is_remnant(place)
        clear_remnant(place)
        return None
    return resumed(place, header)
