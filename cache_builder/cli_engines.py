"""Who encodes, by what the command line says: this process, ranks of this machine or of torchrun, or a Ray cluster."""

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from cache_builder.errors import UnknownName

if TYPE_CHECKING:
    from cache_builder.engines import Job
    from cache_builder.units import Engine


def devices_of(args: argparse.Namespace, rank: int, world: int) -> list[str]:
    """Torch's names of the devices to use; the first is this process's own."""
    from cache_builder import check_device

    named = [d.strip() for d in (args.devices or args.device).split(",")]
    found = [f"cuda:{d}" if d.isdigit() else d for d in named]
    if not all(found):
        raise UnknownName(f"--devices {args.devices!r} names an empty device; write e.g. 0,1")
    if world == 1:
        for device in dict.fromkeys(found):
            check_device(device)
        return found
    local = int(os.environ.get("LOCAL_RANK", rank))
    if len(found) > 1:
        return [found[local % len(found)]]
    return [f"cuda:{local}" if found[0] == "cuda" else found[0]]


def engine_of(
    args: argparse.Namespace, job: "Job", devices: list[str], world: int
) -> "Engine | None":
    """Who helps."""
    import torch

    from cache_builder.engines import Ranks, Ray, Torchrun

    on_cpu = [d for d in devices if d == "cpu"]
    if len(on_cpu) > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // len(on_cpu)))
    job = replace(job, threads=torch.get_num_threads())
    if args.engine == "ray":
        return Ray(job, args.address)
    if args.address:
        raise UnknownName("--address is of a Ray cluster; add --engine ray")
    if world > 1:
        return Torchrun()
    return Ranks(job, devices) if len(devices) > 1 else None


def share_rank(job: "Job", cache: str, rank: int, world: int) -> None:
    """Help a build that rank 0 of torchrun has laid out."""
    import torch

    from cache_builder.rank import passes_of
    from cache_builder.units import share

    job = replace(job, cache=cache, threads=torch.get_num_threads())
    passes = passes_of(job)
    with passes.cache.place.helping():
        share(passes, rank, world)
