"""Rows through a tower some at a time, each part run again in the backward pass: memory of one part, not of all.

Where several processes train together, each runs its share of the rows (heads/ranks.py).
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heads.ranks import Run, shared


def in_parts(run: Run, rows: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
    """What `run` makes of rows, at most `size` of them at once.

    Args:
        run: from some rows to tensors of as many rows; what else it needs, parameters too, it holds itself. It enters
            every context it computes under, as it may be called again later.
        rows: tensors of equal first axis.
        size: of a part. One part alone keeps its activations; of several, with gradients, none does.
    """

    def all_of(*rows: Tensor) -> tuple[Tensor, ...]:
        parts = list(zip(*(r.split(size) for r in rows), strict=True))
        again = len(parts) > 1 and torch.is_grad_enabled()
        some = partial(checkpoint, run, use_reentrant=False) if again else run
        found = [some(*part) for part in parts]
        return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))

    return shared(all_of, rows)
