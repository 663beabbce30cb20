"""Texts as a stream: UTF-8 bytes, so that a head which runs a text tower gets what to write, not what somebody wrote.

    text/string (B, L) uint8     "add a hat"  →  97 100 100 32 97 32 104 97 116 0 0 …     0 ends a text

A prompt such as "a photo of $ that add a hat" cannot be made of stored token ids: some tokenizers write a word at the
start of a text in another way than inside one.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from heads.errors import TaskError

STREAM = "text/string"


def pack(texts: Sequence[str]) -> UInt8[Tensor, "b l"]:
    """Texts as rows of bytes, padded with 0.

    Raises:
        TaskError: one holds the character NUL, which ends a text here.
    """
    if bad := next((text for text in texts if "\0" in text), None):
        raise TaskError(
            f"the text {bad!r:.60} holds the character NUL; take it out of the data set"
        )
    written = [text.encode() for text in texts]
    out = np.zeros((len(written), max(map(len, written), default=0)), dtype=np.uint8)
    for row, text in zip(out, written, strict=True):
        row[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    return torch.from_numpy(out)


def unpack(rows: UInt8[Tensor, "b l"]) -> list[str]:
    """The texts that `pack` was given."""
    return [bytes(row).rstrip(b"\0").decode() for row in rows.cpu().numpy()]
