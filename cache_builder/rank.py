"""A process that helps to build a cache: `python -m cache_builder.rank`, its job as one line of JSON on standard input.

When that is closed, because who started it stops or dies, it finishes the chunk in hand and ends.
"""

import json
import secrets
import sys
import threading
from dataclasses import replace

import torch

from cache_builder import load_backbone, load_dataset
from cache_builder.cache import FeatureCache
from cache_builder.engines import Job
from cache_builder.errors import CacheError
from cache_builder.header import check_spec, read_header
from cache_builder.passes import Passes
from cache_builder.place import at
from cache_builder.request import cache_spec
from cache_builder.units import share

INTERRUPTED = 130
"""Exit status of a helper that was told to stop."""


def passes_of(job: Job) -> Passes:
    """The passes of a job, over a cache that lists what it finishes in a journal of its own.

    Raises:
        CacheMismatch: this process would fill the cache with something else: other weights, other samples.
    """
    torch.set_num_threads(job.threads)
    dataset = load_dataset(job.dataset, job.root or None, **(job.options or {}))
    backbone = load_backbone(
        job.backbone, dtype=job.dtype, device=job.device, compiled=job.compiled
    )
    place = at(job.cache)
    header = read_header(place)
    rules = header.spec.rules
    spec = cache_spec(
        dataset,
        backbone,
        streams=header.spec.streams,
        storage=header.spec.storage,
        crops=rules["crop"].partition(":")[0] if "crop" in rules else "all",
        order_seed=header.spec.order_seed,
    ).model_copy(update={"generations": header.spec.generations})
    check_spec(place, header.spec, spec)
    cache = FeatureCache(place, header, writer=secrets.token_hex(4))
    previous = FeatureCache.open(job.previous, check="read") if job.previous else None
    return Passes(cache, dataset, backbone, job.workers, previous=previous)


def main() -> int:
    """Help until nothing is missing."""
    job = Job(**json.loads(sys.stdin.readline()))
    stop = threading.Event()
    threading.Thread(target=_until_closed, args=(stop,), daemon=True).start()
    try:
        passes = replace(passes_of(job), stop=stop)
        with passes.cache.place.helping():
            share(passes, job.rank, job.world)
    except KeyboardInterrupt:
        return INTERRUPTED
    except CacheError as error:
        sys.stderr.write(f"rank {job.rank}: {error}\n")
        return 1
    return 0


def _until_closed(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
