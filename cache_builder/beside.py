"""Copies to and from an accelerator beside its computing: one queue of work per direction, tied by events.

    stack thread    pinned memory ─▶ device      on a stream of its own; encoding waits for it, not for later copies
    store thread    cast, quantise ─▶ memory     on a stream of its own; waits for its batch, not for the next one

Telling the device to compute takes no time, so whoever wants to know what is waited for waits for a mark (`Told`).
On a CPU nothing of this is needed, and nothing is done.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Beside:
    """The queues of one device.

    Args:
        device: torch's name of it.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self._loading = torch.cuda.Stream(self.device) if self.cuda else None
        self._storing = torch.cuda.Stream(self.device) if self.cuda else None

    def bring(self, inputs: Any) -> Any:
        """Inputs on the device; `ready` must be called on them before they are used."""
        if not self.cuda:
            return each(inputs, lambda t: t.to(self.device))
        with torch.cuda.stream(self._loading):
            moved = each(inputs, lambda t: t.pin_memory().to(self.device, non_blocking=True))
            event = torch.cuda.Event()
            event.record(self._loading)
        return Coming(moved, event)

    def ready(self, inputs: Any) -> Any:
        """What `bring` was given, once the device has it."""
        if not isinstance(inputs, Coming):
            return inputs
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(inputs.event)
        each(inputs.tensors, lambda t: t.record_stream(stream))
        return inputs.tensors

    def told(self) -> "Told":
        """A mark behind all that the device has been told to compute; on a CPU that is done by then."""
        if not self.cuda:
            return Told(None)
        event = torch.cuda.Event(blocking=True)  # whoever waits for it leaves the core to others
        event.record(torch.cuda.current_stream(self.device))
        return Told(event)

    def after(
        self, told: "Told", outputs: Mapping[str, Tensor] | None, work: Callable[[], T]
    ) -> Callable[[], T]:
        """`work` on outputs that the device makes before the mark `told`, for another thread."""
        if told.event is None or outputs is None:
            return work

        def later() -> T:
            told.wait()
            with torch.cuda.stream(self._storing):
                for tensor in outputs.values():
                    tensor.record_stream(torch.cuda.current_stream(self.device))
                return work()

        return later


class Told:
    """A mark in the device's queue; without an event it is passed already."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        """Until the device has come there."""
        if self.event is not None:
            self.event.synchronize()


class Coming:
    """Tensors on their way to the device."""

    def __init__(self, tensors: Any, event: Any) -> None:
        self.tensors, self.event = tensors, event


def each(inputs: Any, action: Callable[[Tensor], Any]) -> Any:
    """`action` on every tensor of what an encoder takes."""
    if isinstance(inputs, Mapping):
        return {name: each(value, action) for name, value in inputs.items()}
    return action(inputs)
