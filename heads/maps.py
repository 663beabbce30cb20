"""What a head shows of itself on one picture: the contract behind `headstart score RUN --pictures N`.

A head that has something to show has a method `maps`; nothing else is asked of it, and nothing lists such heads.

    query (one image) ──┐             looks (M, N)   a weight for every patch, once for each of M names
                        ├─ maps ──▶   names (M,)     a word, "slot 1", …; None: the tokens of the text
    candidate (one text)┘             strip (S, K)   what is the same for every picture, e.g. masks over channels
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from heads.features import Features


@dataclass(frozen=True, slots=True)
class Maps:
    """Maps of one image with one text.

    Attributes:
        looks: weight of every patch of a square grid, row by row; any scale, larger is more.
        names: what each map is of; None: one map for every token of the text.
        says: one sentence for people: what a weight is.
        strip: name → rows of numbers that no picture changes, with `strip_says`; none where there are none.

    """

    looks: Float[Tensor, "m n"]
    names: tuple[str, ...] | None
    says: str
    strip: Mapping[str, Float[Tensor, " k"]] = field(default_factory=dict)
    strip_says: str = ""


@runtime_checkable
class Mapped(Protocol):
    """A head that has maps."""

    def maps(self, query: Features, candidate: Features) -> Maps:
        """Maps of one image with one text, in evaluation mode.

        Args:
            query: one row.
            candidate: one row: the text that is asked about; of czsl the pair predicted, with its labels.

        Raises:
            ConfigError: this configuration has nothing to show.
        """
        ...
