"""What a head may see: the streams of some rows, and nothing else.

Axis letters, everywhere in this room:
    B items · Q queries · C candidates · N patches · L text tokens · D joint dim · W image width · V text width ·
    H heads · E experts · R rank · K top-k; A, O, P numbers of attributes, objects, pairs. Type strings use the same
    letters in lower case.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Features:
    """Rows of one side, image or text (or both, for composed queries).

    Attributes:
        streams: name → values, first axis `B`. Text tokens are padded to the longest of these rows: `text/tokens`
            (B, L, V) with `text/mask` (B, L), True where a token is real, and `text/ids` (B, L) int64, 0 where padded;
            patches of pictures that keep their shape likewise, with `image/mask` (B, N). `image/pixels` is (B, 3, H, W)
            uint8; `image/block_-4` is a block counted from the end.
        labels: name → int64 (B,): `attr`, `obj` (indices into the task's vocabularies), where the rows have them.
    """

    streams: Mapping[str, Tensor]
    labels: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of rows B."""
        return len(next(iter({**self.labels, **self.streams}.values())))

    def __getitem__(self, stream: str) -> Tensor:
        """The values of a stream; a `KeyError` names what is there."""
        if stream not in self.streams:
            raise KeyError(f"no stream {stream!r} among {', '.join(sorted(self.streams))}")
        return self.streams[stream]

    def take(self, index: Int[Tensor, " k"]) -> "Features":
        """Rows `index`, in that order; rows may repeat."""
        return Features(
            {k: v.index_select(0, index) for k, v in self.streams.items()},
            {k: v.index_select(0, index) for k, v in self.labels.items()},
        )

    def only(self, streams: Collection[str]) -> "Features":
        """The same rows, of their streams only these, with the masks beside them."""
        beside = {f"{name.rpartition('/')[0]}/mask" for name in streams}
        kept = {k: v for k, v in self.streams.items() if k in streams or k in beside}
        return Features(kept, self.labels)

    def to(self, device: torch.device | str) -> "Features":
        """The same rows on a device."""
        return Features(
            {k: v.to(device, non_blocking=True) for k, v in self.streams.items()},
            {k: v.to(device, non_blocking=True) for k, v in self.labels.items()},
        )


@dataclass(frozen=True, slots=True)
class Partner:
    """Another example for every query, e.g. one with the same attr and another obj.

    Attributes:
        features: B rows of the query side, with their own labels; an arbitrary row stands in where there is no partner.
        target: column of each partner's own positive, (B,).
        valid: False where a row only stands in, (B,).

    """

    features: Features
    target: Int[Tensor, " b"]
    valid: Bool[Tensor, " b"]

    def to(self, device: torch.device | str) -> "Partner":
        """The same on a device."""
        target, valid = (t.to(device, non_blocking=True) for t in (self.target, self.valid))
        return Partner(self.features.to(device), target, valid)


@dataclass(frozen=True, slots=True)
class Batch:
    """Queries, candidates, and which cell of the score matrix is right.

    Attributes:
        queries: B images, or B images with a text each (composed queries).
        candidates: M texts, or M images.
        target: column of each query's own positive, (B,).
        ignore: (B, M), True where a cell other than the target must not count as a negative (another true
            caption, the same pair, the same image).
        negative: columns of each query's own hard negatives, (B, K), -1 where there is none; K may be 0.
        partners: those that the head's `Needs` names, by name.
        index: of each query the number of its example in the order of the data.

    """

    queries: Features
    candidates: Features
    target: Int[Tensor, " b"]
    ignore: Bool[Tensor, "b m"]
    negative: Int[Tensor, "b k"]
    partners: Mapping[str, Partner] = field(default_factory=dict)
    index: Int[Tensor, " b"] | None = None

    def only(
        self, queries: Collection[str], candidates: Collection[str], partners: Collection[str]
    ) -> "Batch":
        """The same batch, with only these streams of each role, and only these kinds of partners."""
        return replace(
            self,
            queries=self.queries.only(queries),
            candidates=self.candidates.only(candidates),
            partners={
                name: replace(partner, features=partner.features.only(queries))
                for name, partner in self.partners.items()
                if name in partners
            },
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        target, ignore, negative = (
            t.to(device, non_blocking=True) for t in (self.target, self.ignore, self.negative)
        )
        partners = {name: partner.to(device) for name, partner in self.partners.items()}
        index = None if self.index is None else self.index.to(device, non_blocking=True)
        sides = self.queries.to(device), self.candidates.to(device)
        return Batch(*sides, target, ignore, negative, partners, index)
