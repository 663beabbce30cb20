"""What a build does beside an accelerator, shown on stand-ins: what it waits for, and how large a batch may be.

The stand-in of a device computes when it is told to and takes its time; telling it takes none, and whoever needs a
number from it, or waits for one of its events, waits until it has come that far.
"""

import time
import weakref
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import StandIn, dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cache_builder import build, passes
from cache_builder.batch_size import BROUGHT, HELD, MOST, fitting_batch_size
from cache_builder.beside import Beside
from cache_builder.cache import FeatureCache
from cache_builder.filler import Filler


class Queue:
    """The work of a device, in order; events and streams are of it."""

    def __init__(self) -> None:
        self.busy_until = 0.0

    def compute(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, time.monotonic()) + seconds

    def Event(self, **_: Any) -> "Event":
        return Event(self)

    def wait_event(self, event: "Event") -> None:
        """What is asked of the stream next gives numbers to who asked, and that waits for the device."""
        event.synchronize()


class Event:
    def __init__(self, queue: Queue) -> None:
        self.queue, self.at = queue, 0.0

    def record(self, stream: object) -> None:
        self.at = self.queue.busy_until

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - time.monotonic()))


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """A device to build beside, in the place of CUDA's."""
    made = Queue()
    monkeypatch.setattr(torch.cuda, "Event", made.Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: made)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)

    def beside(device: str) -> Beside:
        found = Beside(device)
        found.cuda = True
        return found

    monkeypatch.setattr(passes, "Beside", beside)
    return made


def slowed(action: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*given: Any) -> Any:
        time.sleep(seconds)
        return action(*given)

    return slow


@pytest.mark.parametrize("slow", ["the backbone", "the casting", "the disk", "the pictures"])
def test_the_bar_says_what_is_really_waited_for(
    slow: str,
    queue: Queue,
    fast_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def encoded(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        queue.compute(0.02 if slow == "the backbone" else 0.002)
        return outputs

    backbone = StandIn(encoded)
    if slow == "the casting":
        monkeypatch.setattr(Filler, "_stored", slowed(Filler._stored, 0.02))
    elif slow == "the disk":
        monkeypatch.setattr(FeatureCache, "write_chunk", slowed(FeatureCache.write_chunk, 0.02))
    elif slow == "the pictures":
        monkeypatch.setattr(backbone, "preprocess", slowed(backbone.preprocess, 0.02))
    streams = ["image/patches"]
    path = fast_path / "c.zarr"
    cache = build(dataset(40), backbone, path, streams=streams, batch_size=2, chunk_bytes=60)
    bar = [line for line in capsys.readouterr().err.split("\r") if line.startswith("images: 100%")]
    assert bar[-1].rstrip().endswith(f"waits for {slow}]")
    assert cache.verify().ok


class Memory(TorchDispatchMode):
    """Of the device `meta`: as many bytes as it has, and what lies there.

    Attributes:
        left: bytes.
        least: that were ever left.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.left = self.least = size

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _there(t)}
        for tensor in filter(_there, tree_leaves(found)):
            if tensor.untyped_storage()._cdata not in given:  # else it is a view
                self._take(tensor.nbytes)
                weakref.finalize(tensor, self._take, -tensor.nbytes)
        return found

    def _take(self, size: int) -> None:
        if size > self.left:
            raise torch.OutOfMemoryError("the stand-in's memory is full")
        self.left -= size
        self.least = min(self.least, self.left)


def _there(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


class Elsewhere(StandIn):
    """Lies on the device `meta`; its streams are small beside its inputs."""

    device = "meta"

    def encode_images(self, pixels: Any, blocks: Collection[int] = ()) -> dict[str, Tensor]:
        n = len(pixels.to(self.device))
        made = {"pooled": torch.zeros(n, 7, device=self.device)}
        return made | {f"block_{k}": torch.zeros(n, 7, 3, device=self.device) for k in blocks}


INPUT = 3 * 6 * 6 * 4
"""Bytes of a picture's pixels."""


@pytest.mark.parametrize("streams", [("image/pooled",), ("image/pooled", "image/view_flip/pooled")])
def test_batches_that_wait_to_be_encoded_count_too(streams: tuple[str, ...]) -> None:
    """Seven batches are on the device at once: three are brought ahead, four are encoded or stored."""
    waiting, looks = HELD + BROUGHT, len(streams)
    assert waiting == 7
    for size in (1, 32, MOST):
        # Inputs of so many batches just do not fit twice as large; streams take some of the rest.
        with Memory(2 * size * waiting * looks * INPUT - 1) as memory:
            assert fitting_batch_size(Elsewhere(), streams) == size
        assert memory.least < memory.left
    with Memory(waiting * looks * INPUT - 1), pytest.raises(torch.OutOfMemoryError):
        fitting_batch_size(Elsewhere(), streams)


def test_larger_streams_make_smaller_batches() -> None:
    sizes = []
    for streams in (("image/pooled",), ("image/pooled", "image/block_0", "image/block_1")):
        with Memory(120_000):
            sizes.append(fitting_batch_size(Elsewhere(), streams))
    assert sizes[0] > sizes[1]
