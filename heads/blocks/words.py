"""A trained table of word vectors, and the network that takes them to the space of images."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class WordEmbedder(nn.Module):
    """word(u) = Linear(V → hidden), BN, ReLU, dropout, Linear(hidden → out), on all words at once.

    The norm's statistics are over the vocabulary, so a forward pass always sees the whole of it.

    Args:
        table: first values, one row a word; trained, and not shared with the argument.
        hidden, out: widths.
        dropout: probability.

    """

    def __init__(self, table: Float[Tensor, "r v"], hidden: int, out: int, dropout: float) -> None:
        super().__init__()
        self.table = nn.Parameter(table.detach().clone().float())
        self.layers = nn.Sequential(
            nn.Linear(table.shape[1], hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, out),
        )

    def forward(self) -> Float[Tensor, "r w"]:
        """Embeddings of the whole vocabulary, in the order of the table, in float32."""
        with torch.autocast(self.table.device.type, enabled=False):
            return self.layers(self.table)
