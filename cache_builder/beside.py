"""Copies to and from an accelerator beside its computing: one queue of work per direction, tied by events.

    stack thread    pinned memory ─▶ device      on a stream of its own; encoding waits for it, not for later copies
    store thread    cast, quantise ─▶ memory     on a stream of its own; waits for its batch, not for the next one

On a CPU nothing of this is needed, and nothing is done.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


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

    def after(
        self, outputs: Mapping[str, Tensor] | None, work: Callable[[], None]
    ) -> Callable[[], None]:
        """`work` on outputs that the device has been told to make, for another thread."""
        if not self.cuda or outputs is None:
            return work
        made = torch.cuda.Event()
        made.record(torch.cuda.current_stream(self.device))

        def later() -> None:
            with torch.cuda.stream(self._storing):
                torch.cuda.current_stream(self.device).wait_event(made)
                for tensor in outputs.values():
                    tensor.record_stream(torch.cuda.current_stream(self.device))
                work()

        return later


class Coming:
    """Tensors on their way to the device."""

    def __init__(self, tensors: Any, event: Any) -> None:
        self.tensors, self.event = tensors, event


def each(inputs: Any, action: Callable[[Tensor], Any]) -> Any:
    """`action` on every tensor of what an encoder takes."""
    if isinstance(inputs, Mapping):
        return {name: each(value, action) for name, value in inputs.items()}
    return action(inputs)
