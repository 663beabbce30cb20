"""Linear probe: logistic regression on pooled image embeddings; how much is linearly present without any text.

Paper:      the linear-probe protocol of CLIP, arXiv 2103.00020 (ICML 2021), section 3.2; its use for pairs is ours.
Reference:  scikit-learn LogisticRegression (lbfgs, max_iter 1000); log-probabilities equal its `predict_log_proba`.
Symbols:    x → unit(`image/pooled`); C → `C`, the inverse L2 penalty; w_p, b_p → rows of `pair_weight`.
Differs:    not a published CZSL method, so no published numbers. Of two classes scikit-learn stores one row w; here
            they are ±w/2, the same probabilities. CLIP sweeps C on a finer grid than `C_GRID`.
Mode, cost: cache-only, `image/pooled`; (D+1)(A+O) parameters for `factorised`, (D+1)·P for `pair`; seconds to
            minutes on a CPU.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from heads import base
from heads.base import Context, HeadConfig, Needs
from heads.errors import ConfigError
from heads.features import Batch, Features

C_GRID = tuple(10.0**k for k in range(-2, 5))
"""Values that are tried, one a decade (our choice; CLIP sweeps a finer log grid)."""

USUAL_C = 100.0
"""Where there is no validation to choose by (our choice)."""


class Config(HeadConfig):
    """Provenance in brackets: P paper, C code, O our choice."""

    target: Literal["factorised", "pair"] = Field(
        default="factorised",
        description="two classifiers, log p(attr) + log p(obj), or one over the train pairs (O)",
    )
    unseen: Literal["compose", "none"] = Field(
        default="compose",
        description="score of a pair without training images under target 'pair': weights composed from seen pairs "
        "with its attr and with its obj, or -inf, and then only the seen accuracy means anything (O)",
    )
    normalise: Literal["none", "unit", "standardise"] = Field(
        default="unit",
        description="embeddings as cached, with unit length, or with mean 0 and variance 1 per axis (O)",
    )
    C: float | None = Field(
        default=None,
        gt=0,
        description="inverse penalty; none: the best on validation of 1e-2 to 1e4, one a decade, or 100 without "
        "validation (O)",
    )
    max_iter: int = Field(default=1000, ge=1, description="lbfgs iterations at most (C)")
    n_pairs: int = Field(
        default=0,
        ge=0,
        description="train pairs that target 'pair' found; filled in by training, so that a saved head knows its size",
    )


class Head(base.Head):
    """Linear classifiers of primitives or of pairs; candidates need only their (attr, obj) labels."""

    score_space = "logit"
    training_kind = "closed_form"
    tasks = frozenset({"czsl"})

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        if not (context.attrs and context.objs):
            raise ConfigError(
                "linear_probe classifies attrs and objs, but this task has no such vocabularies; it needs a czsl task"
            )
        dim = context.shapes["image/pooled"][0]
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        if config.target == "factorised":
            self.attr = _Classes(len(context.attrs), dim)
            self.obj = _Classes(len(context.objs), dim)
        else:
            self.register_buffer(
                "pair_row", torch.full((len(context.attrs), len(context.objs)), -1)
            )
            self.pair = _Classes(config.n_pairs, dim)

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Pooled images; of candidates the labels alone."""
        return Needs(frozenset({"image/pooled"}), frozenset())

    def n_trained(self) -> int:
        """Weights and biases of the classifiers; they are buffers, because no gradient reaches them."""
        classes = [m for m in self.modules() if isinstance(m, _Classes)]
        return sum(c.weight.numel() + c.bias.numel() for c in classes)

    def candidates(self) -> Sequence[Config]:
        """Every C of the grid, smallest first, unless one is set."""
        grid = C_GRID if self.config.C is None else (self.config.C,)
        return tuple(self.config.model_copy(update={"C": c}) for c in grid)

    def solve(self, batch: Batch, seed: int) -> dict[str, float]:
        """Fit on the whole training set.

        Args:
            batch: all training images, with labels `attr` and `obj`.
            seed: unused, lbfgs draws nothing; here because every closed-form head takes one.

        Returns:
            C, accuracy on the training images, and how many primitives had none.
        """
        attr, obj = (batch.queries.labels[k].cpu().numpy() for k in ("attr", "obj"))
        pooled = batch.queries["image/pooled"].float()
        if self.config.normalise == "standardise":
            self.get_buffer("mean").copy_(pooled.mean(0))
            # A constant axis says nothing: dividing by 1 leaves it at zero.
            std = pooled.std(0, correction=0)
            self.get_buffer("std").copy_(torch.where(std > 0, std, torch.ones_like(std)))
        x = self._inputs(pooled).cpu().numpy()
        report: dict[str, float] = {"C": self.config.C or USUAL_C}
        if self.config.target == "factorised":
            for name, classes, labels in (("attr", self.attr, attr), ("obj", self.obj, obj)):
                report[f"train_{name}_acc"] = self._fit(classes, x, labels)
                report[f"{name}s_without_images"] = float((~classes.present).sum())
        else:
            report["train_pair_acc"] = self._fit_pairs(x, attr, obj)
        return report

    def forward(self, queries: Features, candidates: Features) -> Float[Tensor, "q c"]:
        """Scores of all pairs; a candidate's score depends on its labels alone."""
        x = self._inputs(queries["image/pooled"].float())
        attr, obj = candidates.labels["attr"], candidates.labels["obj"]
        if self.config.target == "factorised":
            return self.attr.log_probability(x)[:, attr] + self.obj.log_probability(x)[:, obj]
        return self._pair_scores(x, attr, obj)

    def paired(self, queries: Features, candidates: Features) -> Float[Tensor, " b"]:
        """Scores row by row."""
        return self(queries, candidates).diagonal()

    def _inputs(self, pooled: Tensor) -> Tensor:
        if self.config.normalise == "unit":
            return F.normalize(pooled, dim=-1)
        return (pooled - self.get_buffer("mean")) / self.get_buffer("std")

    def _fit(self, classes: "_Classes", x: np.ndarray, labels: np.ndarray) -> float:
        """Fit one classifier into `classes`; returns its accuracy on the training images."""
        found = np.unique(labels)
        if len(found) == 1:  # nothing to tell apart: probability 1 for the only class
            classes.fill(found, np.zeros((1, x.shape[1])), np.zeros(1))
            return 1.0
        model: Any = LogisticRegression(C=self.config.C or USUAL_C, max_iter=self.config.max_iter)
        model.fit(x, labels)  # scikit-learn itself warns when `max_iter` is too small
        weight, bias = model.coef_, model.intercept_
        if len(found) == 2:
            weight, bias = (np.concatenate([-v, v]) / 2 for v in (weight, bias))
        classes.fill(model.classes_, weight, bias)
        return float(model.score(x, labels))

    def _fit_pairs(self, x: np.ndarray, attr: np.ndarray, obj: np.ndarray) -> float:
        n_objs = len(self.context.objs)
        keys, labels = np.unique(attr * n_objs + obj, return_inverse=True)
        device = self.get_buffer("mean").device
        self.config = self.config.model_copy(update={"n_pairs": len(keys)})
        self.pair = _Classes(len(keys), x.shape[1]).to(device)
        rows = self.get_buffer("pair_row").fill_(-1)
        rows.view(-1)[torch.from_numpy(keys).to(device)] = torch.arange(len(keys), device=device)
        return self._fit(self.pair, x, labels)

    def _pair_scores(self, x: Tensor, attr: Tensor, obj: Tensor) -> Tensor:
        """w_p·x + b_p; composed or -inf where p has no weight; the row's minimum where a primitive has none."""
        seen_scores = x @ self.pair.weight.T + self.pair.bias
        table = self.get_buffer("pair_row")
        row = table[attr, obj]
        seen = row >= 0
        if self.config.unseen == "none":
            scores = seen_scores[:, row.clamp(min=0)]
            return scores.masked_fill(~seen, -torch.inf)
        weight, bias, known = compose(self.pair.weight, self.pair.bias, table, attr, obj)
        composed = x @ weight.T + bias
        composed = torch.where(known, composed, seen_scores.amin(1, keepdim=True))
        return torch.where(seen, seen_scores[:, row.clamp(min=0)], composed)


class _Classes(nn.Module):
    """Weights of one multinomial classifier; rows of absent classes are zero and marked."""

    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"]
    present: Bool[Tensor, " k"]

    def __init__(self, k: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(k, dim))
        self.register_buffer("bias", torch.zeros(k))
        self.register_buffer("present", torch.zeros(k, dtype=torch.bool))

    def fill(self, classes: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> None:
        """Put fitted rows where their label says: `classes_` is sorted and omits absent labels."""
        rows = torch.from_numpy(classes).to(self.weight.device)
        self.weight.zero_()[rows] = torch.from_numpy(weight).to(self.weight)
        self.bias.zero_()[rows] = torch.from_numpy(bias).to(self.bias)
        self.present.fill_(False)[rows] = True

    def log_probability(self, x: Float[Tensor, "q d"]) -> Float[Tensor, "q k"]:
        """Log-probability of each class; an absent class gets the smallest of its row."""
        logits = (x @ self.weight.T + self.bias).masked_fill(~self.present, -torch.inf)
        out = logits.log_softmax(-1)
        lowest = out.masked_fill(~self.present, torch.inf).amin(-1, keepdim=True)
        return torch.where(self.present, out, lowest)


def compose(
    weight: Float[Tensor, "p d"],
    bias: Float[Tensor, " p"],
    table: Int[Tensor, "a o"],
    attr: Int[Tensor, " c"],
    obj: Int[Tensor, " c"],
) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"], Bool[Tensor, " c"]]:
    """Weights of pairs from those of seen pairs: mean with the attr + mean with the obj - mean of all.

    Exact for additive weights on a complete grid.

    Args:
        weight, bias: of the seen pairs.
        table: (attr, obj) → row of `weight`, -1 where the pair is unseen.
        attr, obj: the pairs wanted.

    Returns:
        Weights, biases, and where they are known: False where the attr or the obj occurs in no seen pair.
    """
    both = torch.cat([weight, bias[:, None]], dim=1)
    row_attr, row_obj = torch.where(table >= 0)
    rows = both[table[row_attr, row_obj]]

    def mean_by(index: Tensor, n: int) -> tuple[Tensor, Tensor]:
        count = torch.bincount(index, minlength=n)
        total = rows.new_zeros(n, rows.shape[1]).index_add_(0, index, rows)
        return total / count.clamp(min=1)[:, None], count > 0

    of_attr, has_attr = mean_by(row_attr, table.shape[0])
    of_obj, has_obj = mean_by(row_obj, table.shape[1])
    out = of_attr[attr] + of_obj[obj] - rows.mean(0)
    return out[:, :-1], out[:, -1], has_attr[attr] & has_obj[obj]
