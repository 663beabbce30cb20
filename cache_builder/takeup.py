"""A build that was begun, taken up again where it was left."""

from collections.abc import Callable

from cache_builder.cache import FeatureCache
from cache_builder.errors import CacheIncomplete
from cache_builder.header import Header, read_header
from cache_builder.lock import clear_remnant
from cache_builder.place import Place


def taken_up(place: Place, check: Callable[[Header], None]) -> FeatureCache | None:
    """The cache begun here, for who holds its lock; None where creation has still to happen, or to happen again.

    What crashes have left is cleared, what helpers have listed is brought in.

    Args:
        place: where.
        check: raises if another cache is wanted; then nothing is touched.

    Raises:
        CacheCorrupt: a journal is damaged; nothing was touched.
    """
    try:
        header = read_header(place)
    except CacheIncomplete:
        clear_remnant(place)
        return None
    check(header)
    cache = FeatureCache(place, header)
    if cache.state == "sealed":
        cache.check_journals()
    _ = cache.bad_images()
    with place.alone():
        for journal in ("manifest.jsonl", "quarantine.jsonl"):
            place.heal(journal)
        place.sweep()
    cache.settle()
    return cache
