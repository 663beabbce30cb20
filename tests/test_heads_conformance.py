"""Every method file passes check_head under its default and its variants; and check_head can fail."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache_builder import plugins
from heads import load_method, miniature, testing
from heads.base import EmbeddingHead, HeadConfig, Needs

SMALL = {"layers": 2, "dim": 8, "heads": 2, "ffn": 12}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "tf_local": [
        SMALL,
        {**SMALL, "layers": 1},
        {**SMALL, "layers": 3, "residual_global": True},
        {**SMALL, "pos": "none", "space": "joint"},
        {**SMALL, "keep_prefix": True},
        {**SMALL, "n_sampled": 2, "top_sampled": 3},
        {**SMALL, "chunk": 7},
        {**SMALL, "variant": "global"},
        {**SMALL, "variant": "global", "residual_global": True, "n_sampled": 1},
        {**SMALL, "variant": "late_maxsim", "layers": 4},
        {**SMALL, "variant": "late_maxsim", "n_sampled": 2, "space": "joint", "keep_prefix": True},
    ],
    "linear_probe": [
        {},
        {"normalise": "standardise", "C": 1.0},
        {"normalise": "none", "C": 1.0},
        {"target": "pair"},
        {"target": "pair", "unseen": "none"},
    ],
    "eva_head": [
        {},
        {"train_tau": True, "tau": 2.0},
        {"base": "linear_probe", "settings": {"target": "pair", "C": 1.0}},
        {"base": "csp", "train_tau": True},
        {"base": "branch_blocks", "primitive_score": "probability", "tau": 30.0},
        {"base": "tf_local", "settings": SMALL, "train_tau": True},
        {"base": "trident", "settings": {"n_local": 1}, "beta": 0.1},
    ],
    "trident": [
        {},
        {"train_gates": False, "gate": "relu", "mask": "softplus", "n_local": 1},
        {"global_stream": "pooled", "mask": "ones", "smoothing": 0.0, "words_lr": 1.0},
        {"n_local": 0, "n_global": 1, "mask": "ones"},
    ],
}
"""Configurations to check; a method that is not listed is checked under its default."""

CASES = [
    pytest.param(name, values, id=f"{name}-{i}")
    for name in plugins.names("heads.methods")
    for i, values in enumerate(VARIANTS.get(name, [{}]))
]


@pytest.mark.parametrize(("name", "values"), CASES)
def test_a_method_keeps_the_promises_of_a_head(name: str, values: dict[str, Any]) -> None:
    method = load_method(name)
    testing.check_head(method, method.Config(**values))


class Honest(EmbeddingHead):
    """A linear map of pooled images: the smallest trainable head."""

    score_space = "logit"

    def __init__(self, config: HeadConfig, context: Any) -> None:
        super().__init__(config, context)
        self.map = nn.Linear(miniature.D, miniature.D)

    @classmethod
    def needs(cls, config: Any) -> Needs:
        return Needs(frozenset({"image/pooled"}), frozenset({"text/pooled"}))

    def embed_queries(self, queries: Any) -> Tensor:
        return self.map(queries["image/pooled"])

    def embed_candidates(self, candidates: Any) -> Tensor:
        return candidates["text/pooled"]

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return nn.functional.cross_entropy(self(batch.queries, batch.candidates), batch.target), {}


class Undeclared(Honest):
    def embed_queries(self, queries: Any) -> Tensor:
        extra = queries.streams["image/prefix"].mean() if "image/prefix" in queries.streams else 0.0
        return self.map(queries["image/pooled"]) + extra


class RowsMixed(Honest):
    def embed_queries(self, queries: Any) -> Tensor:
        return self.map(queries["image/pooled"] - queries["image/pooled"].mean(0))


class CandidatesMixed(Honest):
    def embed_candidates(self, candidates: Any) -> Tensor:
        return candidates["text/pooled"] * torch.arange(1, 1 + len(candidates))[:, None]


class Unused(Honest):
    def __init__(self, config: HeadConfig, context: Any) -> None:
        super().__init__(config, context)
        self.idle = nn.Parameter(torch.ones(2))


class OtherPairs(Honest):
    def paired(self, queries: Any, candidates: Any) -> Tensor:
        return super().paired(queries, candidates) + 1


class Unsaved(Honest):
    def __init__(self, config: HeadConfig, context: Any) -> None:
        super().__init__(config, context)
        self.noise = torch.rand(miniature.D) + torch.rand(miniature.D)

    def embed_queries(self, queries: Any) -> Tensor:
        return self.map(queries["image/pooled"]) + self.noise


class Overflowing(Honest):
    def embed_queries(self, queries: Any) -> Tensor:
        x = self.map(queries["image/pooled"])
        return x / (x.dtype == torch.float32)


class Rounded(Honest):
    def forward(self, queries: Any, candidates: Any) -> Tensor:
        return 30 * (self.embed_queries(queries) @ self.embed_candidates(candidates).T)

    def paired(self, queries: Any, candidates: Any) -> Tensor:
        return 30 * super().paired(queries, candidates)


class TrainsTheReadout(Honest):
    def __init__(self, config: HeadConfig, context: Any) -> None:
        super().__init__(config, context)
        self.proj = nn.Parameter(context.readout["image/proj"])


class StrangeRates(Honest):
    def lr_shares(self) -> dict[str, float]:
        return {"mapp.weight": 0.1}


def as_method(head: type[EmbeddingHead]) -> ModuleType:
    module = ModuleType("method")
    vars(module).update(Head=head, Config=HeadConfig)
    return module


def test_an_honest_head_passes() -> None:
    testing.check_head(as_method(Honest))


@pytest.mark.parametrize(
    ("head", "promise"),
    [
        (Undeclared, "beyond those that `needs` declares"),
        (RowsMixed, "one query and one candidate|other queries"),
        (CandidatesMixed, "permuting candidates"),
        (Unused, "idle gets no gradient"),
        (StrangeRates, "lr_shares names .'mapp.weight'., which are not trained"),
        (OtherPairs, "diagonal"),
        (Unsaved, "bit for bit"),
        (Overflowing, "bf16"),
        (Rounded, "under bf16 `paired` must be the diagonal"),
        (TrainsTheReadout, "readout/image/proj is frozen"),
    ],
)
def test_a_broken_promise_is_named(head: type[EmbeddingHead], promise: str) -> None:
    with pytest.raises(testing.NotConforming, match=promise):
        testing.check_head(as_method(head))
