"""Image blocks counted from the end, so that one head fits backbones of any depth: `image/block_-4`.

    image/block_-4    the states that enter the fourth image block from the end
    depth 24          the array image/block_20 of the cache; batches and `Context.shapes` keep the declared name

The depth stands in `BackboneSpec.dims["image_blocks"]`. No array of a cache has a negative number.
"""

import re

from cache_builder import FeatureCache
from heads.errors import MissingStream

FROM_END = re.compile(r"(image(?:/view_[a-z0-9_]+)?/block_)-([1-9][0-9]*)")


def array_of(cache: FeatureCache, stream: str) -> str:
    """The stream of a cache that a declared one is read from: itself, or the block by its real number.

    Raises:
        MissingStream: the backbone has fewer blocks, or the cache does not say how many.
    """
    counted = FROM_END.fullmatch(stream)
    if not counted:
        return stream
    spec, k = cache.spec.backbone, int(counted[2])
    depth = spec.dims.get("image_blocks")
    if depth is None:
        raise MissingStream(
            f"{stream} is counted from the last image block, but {cache.place} does not say how many blocks "
            f"{spec.family}:{spec.checkpoint} has; build it again, or name the block by its number (image/block_<k>)"
        )
    if k > depth:
        raise MissingStream(
            f"{stream} is the {k}th image block from the end, but {spec.family}:{spec.checkpoint} of {cache.place} has "
            f"{depth}: ask for image/block_-1 … image/block_-{depth}"
        )
    return f"{counted[1]}{depth - k}"


def counted_from_end(cache: FeatureCache) -> dict[str, str]:
    """Of every block that a cache holds, its name counted from the end → the stream; none where the depth is unknown.

    What leaves the last block is entered by none and has no such name.
    """
    depth = cache.spec.backbone.dims.get("image_blocks", 0)
    found: dict[str, str] = {}
    for stream in cache.streams:
        start, _, number = stream.rpartition("_")
        if start.endswith("/block") and int(number) < depth:
            found[f"{start}_-{depth - int(number)}"] = stream
    return found
