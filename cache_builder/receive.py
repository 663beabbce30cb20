"""A cache whose chunks come from somewhere else than a backbone: begun, filled, sealed; repeating it finishes it.

What `build` does for encoded batches, for whole chunks that are there already: the same lock, the same journals, the
same states, so a kill at any moment leaves a cache from which the same command goes on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tqdm import tqdm

from cache_builder.cache import FeatureCache
from cache_builder.errors import CacheCorrupt
from cache_builder.lock import locked
from cache_builder.place import at
from cache_builder.takeup import taken_up


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
        cache = taken_up(place, lambda _: None)
        if cache is None:
            cache = begin()
        check(cache)
        pending = cache.pending()
        cache.check_repairable()
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
