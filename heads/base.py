"""The contract of a head: it scores queries against candidates, and says what it reads.

A method file in `heads/methods` has two handles: `Config`, a frozen pydantic model, and `Head`, a concrete class
below one of the bases here. Hyper-parameters come in through `Config`, facts about the data through `Context`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from cache_builder import FeatureCache
from cache_builder.spec import BackboneSpec
from heads.errors import TaskError
from heads.features import Batch, Features

ScoreSpace = Literal["cosine", "logit", "probability"]
Training = Literal["gradient", "closed_form", "none"]


class HeadConfig(BaseModel):
    """Hyper-parameters of a method; every field's description says meaning, unit and source of its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Needs:
    """Streams a head reads, per role. What is not listed here is not in its `Features`.

    Attributes:
        queries, candidates: streams of their rows.
        unless_none: those of `queries` that are left out where the backbone makes none: image/prefix, of a backbone
            without prefix rows.
        live: sides of the backbone that the head runs itself, frozen, through `heads/live.py`: {"text"} for prompts.
        partners: kinds of other examples that its loss wants beside every query, with the streams of queries; of
            `samplers.PARTNERS`, for czsl.

    """

    queries: frozenset[str]
    candidates: frozenset[str]
    unless_none: frozenset[str] = frozenset()
    live: frozenset[str] = frozenset()
    partners: frozenset[str] = frozenset()

    def __or__(self, other: "Needs") -> "Needs":
        """What two heads that read the same rows need together."""
        mine = (getattr(self, f.name) | getattr(other, f.name) for f in fields(self))
        return Needs(*mine)


@dataclass(frozen=True, slots=True)
class Context:
    """Facts a head is built from, saved with it so that it can be rebuilt without the cache.

    Attributes:
        shapes: stream → shape of one row, e.g. {"image/patches": (49, 128), "image/pooled": (128,)}; the length
            axis of a ragged stream is its longest possible one.
        readout: the backbone's frozen tensors between raw tokens and joint space.
        attrs, objs: vocabularies of the czsl task, empty for other tasks.
        tables: first values of what a method trains or keeps beyond these, e.g. word vectors. Saved by shape alone: a
            saved head holds what they became.
        backbone: what made the cache, for heads that run a side of it; None where nobody said.
        backbone_name: where to load it from, `family:checkpoint`.

    """

    shapes: Mapping[str, tuple[int, ...]]
    readout: Mapping[str, Tensor] = field(default_factory=dict)
    attrs: tuple[str, ...] = ()
    objs: tuple[str, ...] = ()
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    backbone: BackboneSpec | None = None
    backbone_name: str = ""


class Head(nn.Module, ABC):
    """Scores queries against candidates. Larger is better."""

    score_space: ClassVar[ScoreSpace]
    training_kind: ClassVar[Training] = "gradient"
    tasks: ClassVar[frozenset[str]] = frozenset({"czsl", "matching", "two_by_two", "retrieval"})
    """Tasks it can score. One of composed retrieval scores that alone."""

    def __init__(self, config: Any, context: Context) -> None:
        super().__init__()
        self.config = config
        self.context = context

    @classmethod
    @abstractmethod
    def needs(cls, config: Any) -> Needs:
        """Streams read under `config`."""

    @classmethod
    def training_needs(cls, config: Any) -> Needs:
        """Streams of the batches that it is trained on; those of `needs`, unless it learns from another task."""
        return cls.needs(config)

    @classmethod
    def learns_from(cls, config: Any) -> str | None:
        """What it is trained on, of `heads.tasks`, where that is not the task it is trained for."""
        return None

    @classmethod
    def trained_by(cls, config: Any) -> Training:
        """How its parameters come about; `training_kind`, unless some configurations need no training."""
        return cls.training_kind

    @classmethod
    def prepare(cls, config: Any, context: Context, cache: FeatureCache) -> Context:
        """`context` with the tables this method starts from, read from the cache it will be trained on; once."""
        return context

    @classmethod
    def miniature(cls, config: Any, context: Context) -> Context:
        """`context` with small stand-ins for what `prepare` reads, so that `check_head` needs no cache."""
        return context

    @abstractmethod
    def forward(self, queries: Features, candidates: Features) -> Float[Tensor, "q c"]:
        """Score of every query with every candidate."""

    @abstractmethod
    def paired(self, queries: Features, candidates: Features) -> Float[Tensor, " b"]:
        """Score of query i with candidate i."""

    def undecayed(self) -> frozenset[str]:
        """Trained matrices, by their full name, that weight decay spares; what has fewer axes it spares anyway."""
        return frozenset()

    @property
    def training_by(self) -> Training:
        """`trained_by` of its own configuration."""
        return self.trained_by(self.config)

    def n_trained(self) -> int:
        """How many numbers training decides."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def before_training(self, examples: Iterable[Features]) -> Mapping[str, Tensor]:
        """Streams to lay beside the queries of every batch, which no step of training changes: computed once.

        Args:
            examples: queries of the train set, part by part, in the order of the data.

        Returns:
            Name → (n, …), a row for every example; none by default, and then `examples` is not read.
        """
        return {}

    def remarks(self) -> Mapping[str, Any]:
        """What is worth knowing of the trained head besides its metrics, for people and for `run.json`.

        Returns:
            What it is a number of → the number; a float is a share.
        """
        return {}

    def noticed(self) -> set[str]:
        """What training adds to and `remarks` count, besides weights: an interrupted training goes on with it."""
        return set()

    def lr_shares(self) -> Mapping[str, float]:
        """Trained parameters, by their full name, that learn at this share of `train.lr`; all others at 1."""
        return {}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar training loss, and parts of it worth logging (detached)."""
        raise TypeError(f"{type(self).__module__} has nothing to train by gradient")

    def candidates(self) -> Sequence[Any]:
        """Configurations that a closed-form head is solved under; the best on validation stays. One: its own."""
        return (self.config,)

    def solve(self, batch: Batch, seed: int) -> dict[str, float]:
        """Fit in closed form (or by a solver) on the whole training set as one batch."""
        raise TypeError(f"{type(self).__module__} has no closed-form fit")


class EmbeddingHead(Head, ABC):
    """A head whose score is an inner product: a gallery is embedded once."""

    @abstractmethod
    def embed_queries(self, queries: Features) -> Float[Tensor, "q d"]:
        """Query vectors, with every scale already in them."""

    @abstractmethod
    def embed_candidates(self, candidates: Features) -> Float[Tensor, "c d"]:
        """Candidate vectors."""

    def offset(self) -> Tensor | float:
        """Constant added to every score (the logit bias of a sigmoid-trained backbone)."""
        return 0.0

    def forward(self, queries: Features, candidates: Features) -> Float[Tensor, "q c"]:
        """Inner products of all pairs, in float32 also under autocast: half precision would make ties."""
        q, c = self.embed_queries(queries), self.embed_candidates(candidates)
        with torch.autocast(q.device.type, enabled=False):
            return q.float() @ c.float().T + self.offset()

    def paired(self, queries: Features, candidates: Features) -> Float[Tensor, " b"]:
        """Inner products row by row."""
        q, c = self.embed_queries(queries), self.embed_candidates(candidates)
        return (q.float() * c.float()).sum(-1) + self.offset()


class CrossHead(Head, ABC):
    """A head that must look at query and candidate together: only `paired` is written."""

    def forward(self, queries: Features, candidates: Features) -> Float[Tensor, "q c"]:
        """All pairs, one query at a time, so that memory grows with C alone."""
        c = len(candidates)
        device = next(iter(queries.streams.values())).device
        rows = [
            self.paired(queries.take(torch.full((c,), i, device=device)), candidates)
            for i in range(len(queries))
        ]
        return torch.stack(rows)


class SetHead(Head, ABC):
    """A head that must know the whole candidate set before it meets a query.

    As a rule because its scores are probabilities over the candidates: cutting them into blocks would change them. So
    it is scored in two steps: it gathers the whole set once, part by part, and then meets the queries, some at a time.
    A table is the same for any cut.
    """

    relative: ClassVar[bool] = True
    """Does a candidate's score depend on which others there are? False: the set is gathered once to save work alone."""

    @abstractmethod
    def gather(self, parts: Iterable[Features]) -> Any:
        """All that is to be known of a candidate set, which comes in parts, in order."""

    @abstractmethod
    def against(self, queries: Features, gathered: Any) -> Float[Tensor, "q c"]:
        """Scores of queries with every candidate of what `gather` returned."""

    def first(self, gathered: Any, n: int) -> Any:
        """What `gather` would have returned for the first n candidates alone; a relative head says it."""
        raise TaskError(
            f"{type(self).__module__} scores by what all candidates are together, and does not say how by the first "
            f"{n} of them, which feasibility asks for; give its Head a method `first`"
        )

    def nested(
        self, queries: Features, gathered: Any, sizes: Sequence[int]
    ) -> Iterator[Float[Tensor, "q n"]]:
        """Scores of queries with the first n candidates where these are all there are, for every n of `sizes`.

        Args:
            queries, gathered: as for `against`.
            sizes: descending, each at least 1. What was yielded for one may be overwritten by the next.
        """
        whole = None if self.relative else self.against(queries, gathered)
        for n in sizes:
            yield (
                self.against(queries, self.first(gathered, n)) if whole is None else whole[:, :n]
            )

    def forward(self, queries: Features, candidates: Features) -> Float[Tensor, "q c"]:
        """Scores where `candidates` are all there are."""
        return self.against(queries, self.gather([candidates]))

    def paired(self, queries: Features, candidates: Features) -> Float[Tensor, " b"]:
        """Score of query i with candidate i, where the candidates are all there are."""
        return self(queries, candidates).diagonal()
