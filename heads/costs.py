"""What a run costs beside its training: the bytes that it reads of every image, and the building of its cache."""

from typing import Any

from cache_builder import FeatureCache
from cache_builder.build_log import build_seconds
from heads.base import Needs
from heads.block_names import array_of


def costs(cache: FeatureCache, needs: Needs) -> dict[str, Any]:
    """For `run.json`.

    Args:
        cache: what was trained on.
        needs: of training and scoring together.

    Returns:
        `bytes_per_image`: of the image streams that are read, as they lie in the cache, scales included, chunks'
        padding not. `build_seconds`: of the whole cache, at least, or None where nobody knows, as of an imported one.
    """
    streams = {array_of(cache, s) for s in needs.queries | needs.candidates}
    images = {s for s in streams if s.startswith(("image/", "crop/")) and s in cache.streams}
    n = cache.spec.dataset.n_images
    total = sum(cache.stored_bytes(stream) for stream in images)
    return {
        "bytes_per_image": round(total / n) if n else 0,
        "build_seconds": build_seconds(cache.place),
    }
