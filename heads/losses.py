"""Contrastive losses over a score matrix: rows are queries (images), columns are candidates (texts).

One formula, ½ [CE over rows + CE over the columns that are somebody's positive]; what the batch brings makes it the
three objectives of the fine-tuning code of the BiVLC authors (IMirandaM/BiVLC):

    objective   batch                            S          image→text over        text→image for
    plain       I I …     × T⁺ T⁺ …              (B, B)     all texts              every text
    txt         I I …     × T⁺ T⁺ … T⁻ T⁻ …      (B, 2B)    positives, negatives   positives only
    img+txt     I0 I1 …   × T0 T1 …              (2B, 2B)   all texts              every text

With labelled candidates (czsl: the train pairs, of which many images may share one) there is the row part alone: a
pair is a class, and its other images are no negatives.

The sampled form scores few cells: of each row its positive, its own hard negatives and some of the candidates that the
backbone finds closest. The same formula then runs over the drawn cells; when every cell is drawn it is the full loss.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from heads.features import Batch, Features


class Drawn(NamedTuple):
    """Cells to score, a rectangle.

    Attributes:
        columns: candidates of each query, (B, K).
        valid: False where a column only fills the rectangle and must not count, (B, K).

    """

    columns: Int[Tensor, "b k"]
    valid: Bool[Tensor, "b k"]


def contrastive(
    scores: Float[Tensor, "b m"], batch: Batch, *, drawn: Drawn | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this module's table, in float32, and its parts.

    Args:
        scores: every cell, or the drawn ones as `scatter` places them.
        batch: which cell is whose positive, and which cells count as nothing.
        drawn: the cells that were scored; None is all of them.

    Returns:
        The scalar loss; `image_to_text_loss`, `text_to_image_loss` where it exists, and `batch_accuracy`: the
        fraction of queries whose positive beats every other counted cell of its row (strictly). Not comparable
        between batch sizes.
    """
    scores = scores.float()
    own = F.one_hot(batch.target, scores.shape[1]).bool()
    counted = own | ~batch.ignore
    if drawn is not None:
        cells = torch.zeros_like(own, dtype=torch.int64)
        cells.scatter_add_(1, drawn.columns, drawn.valid.long())
        counted = counted & (cells > 0)
    masked = scores.masked_fill(~counted, -torch.inf)

    rows = F.cross_entropy(masked, batch.target)
    best_other = masked.detach().masked_fill(own, -torch.inf).amax(1)
    hit = scores.detach().gather(1, batch.target[:, None])[:, 0] > best_other
    parts = {"image_to_text_loss": rows.detach(), "batch_accuracy": hit.float().mean()}
    if has_classes(batch):
        return rows, parts

    # Column target[i] over all images; its positive is image i.
    columns = F.cross_entropy(
        masked[:, batch.target].T, torch.arange(len(scores), device=scores.device)
    )
    parts["text_to_image_loss"] = columns.detach()
    return (rows + columns) / 2, parts


def products(a: Float[Tensor, "q d"], b: Float[Tensor, "c d"]) -> Float[Tensor, "q c"]:
    """Inner products of all pairs in float32, also under autocast: a softmax of rounded scores is another one."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().T


def weighted_contrastive(
    scores: Float[Tensor, "b b"], barred: Bool[Tensor, "b b"], weight: Float[Tensor, " b"]
) -> tuple[Tensor, dict[str, Tensor]]:
    """½ · mean of w_i [CE of row i + CE of column i], both of class i, in float32, and its parts.

    Args:
        scores: of query i with target j, over the temperature.
        barred: cells that count as nothing; the diagonal counts always.
        weight: w, of mean 1.
    """
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    masked = scores.float().masked_fill(barred & ~own, -torch.inf)
    target = torch.arange(len(scores), device=scores.device)
    rows, columns = (F.cross_entropy(s, target, reduction="none") for s in (masked, masked.T))
    best_other = masked.detach().masked_fill(own, -torch.inf).amax(1)
    hit = (masked.detach().diagonal() > best_other).float().mean()
    loss = (weight * (rows + columns)).mean() / 2
    return loss, {"batch_accuracy": hit, "largest_weight": weight.max()}


def entropy_weights(
    base: Float[Tensor, "b b"], barred: Bool[Tensor, "b b"], strength: float
) -> Float[Tensor, " b"]:
    """w_i = exp(β_w H_i / log B) / mean: larger where a base model is unsure of query i; no gradient (our choice).

    Args:
        base: its scores over the temperature; H_i is the entropy of the softmax of row i.
        barred: cells that count as nothing; the diagonal counts always.
        strength: β_w; 0 gives 1 everywhere.
    """
    with torch.no_grad():
        own = torch.eye(len(base), dtype=torch.bool, device=base.device)
        log = base.float().masked_fill(barred & ~own, -torch.inf).log_softmax(1)
        entropy = -torch.where(log.isinf(), 0.0, log.exp() * log).sum(1)
        grown = (strength * entropy / torch.tensor(float(max(2, len(base)))).log()).exp()
        return grown / grown.mean()


def has_classes(batch: Batch) -> bool:
    """True where candidates are labelled classes (czsl's pairs), which many queries may share."""
    return "attr" in batch.candidates.labels


def draw(batch: Batch, *, n_sampled: int, top_sampled: int) -> Drawn:
    """Choose the cells of the sampled form, with torch's global generator.

    Each query gets its positive, its own hard negatives, and `n_sampled` others, without replacement, from the
    `top_sampled` candidates whose pooled embeddings are closest to its own. Cells to ignore are never drawn; a
    query with too few candidates gets fewer.

    Args:
        batch: with `image/pooled` and `text/pooled`, unless `top_sampled` is 0.
        n_sampled: others per query.
        top_sampled: how many of the closest they are drawn from; 0 draws from all candidates alike.
    """
    if top_sampled:
        cosine = _cosines(batch.queries, batch.candidates)
    else:
        cosine = torch.zeros(batch.ignore.shape, device=batch.ignore.device)
    has_negative = batch.negative >= 0
    negative = torch.where(has_negative, batch.negative, batch.target[:, None])
    barred = batch.ignore.scatter(1, batch.target[:, None], True).scatter(1, negative, True)

    n_top = min(top_sampled or cosine.shape[1], cosine.shape[1])
    closest = cosine.masked_fill(barred, -torch.inf).topk(n_top, dim=1)
    lottery = torch.rand_like(closest.values).masked_fill(closest.values == -torch.inf, -1.0)
    winners = lottery.topk(min(n_sampled, n_top), dim=1)
    others = closest.indices.gather(1, winners.indices)

    own = batch.target[:, None]
    return Drawn(
        torch.cat([own, negative, others], dim=1),
        torch.cat([torch.ones_like(own).bool(), has_negative, winners.values >= 0], dim=1),
    )


def scatter(cells: Float[Tensor, "b k"], drawn: Drawn, width: int) -> Float[Tensor, "b m"]:
    """Place drawn cells in a matrix of `width` columns; the rest is -inf, which the loss never counts."""
    out = cells.new_full((len(cells), width + 1), -torch.inf)
    columns = torch.where(
        drawn.valid, drawn.columns, width
    )  # fillers go to a column that is cut off
    return out.scatter(1, columns, cells)[:, :width]


def orthogonality(slots: Float[Tensor, "b s w"]) -> Tensor:
    """Mean squared difference between the cosines of an item's slots and the unit matrix."""
    unit = F.normalize(slots.float(), dim=-1)
    gram = unit @ unit.mT
    return (gram - torch.eye(slots.shape[1], device=slots.device)).square().mean()


def smoothed(
    target: Int[Tensor, " b"], others: Int[Tensor, "b k"], share: float, n: int
) -> Float[Tensor, "b n"]:
    """Target distributions over n classes: `share`/K on each of the others, the rest on the target.

    Args:
        target: true class.
        others: K classes that are also right, -1 where there are fewer; what those would have had stays on the target.
        share: all that K others take together, 0 to 1.
        n: number of classes.
    """
    given = (share / max(1, others.shape[1])) * (others >= 0).float()
    out = given.new_zeros(len(target), n)
    out.scatter_add_(1, others.clamp(min=0), given)
    return out.scatter_add(1, target[:, None], 1 - given.sum(1, keepdim=True))


def masked_cross_entropy(
    logits: Float[Tensor, "b n"], target: Float[Tensor, "b n"], valid: Bool[Tensor, " b"]
) -> Tensor:
    """Cross-entropy with target distributions, mean over valid rows; 0 where no row is valid."""
    each = F.cross_entropy(logits.float(), target, reduction="none")
    return torch.where(valid, each, 0.0).sum() / valid.sum().clamp(min=1)


def _cosines(queries: Features, candidates: Features) -> Float[Tensor, "b m"]:
    with torch.no_grad(), torch.autocast(queries["image/pooled"].device.type, enabled=False):
        q = F.normalize(queries["image/pooled"].float(), dim=-1)
        c = F.normalize(candidates["text/pooled"].float(), dim=-1)
        return q @ c.T
