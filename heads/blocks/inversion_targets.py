"""SEARLE's two losses: targets v* found image by image, and a φ that learns to give them at once.

    v*   minimise  1 · (1 - cos(E_T("a photo of v"), f)) + 0.5 · (1 - cos(E_T(phrase with v), E_T(phrase)))
         350 steps of AdamW, learning rate 0.02, weight decay 0.01, from N(0, 0.02²); the moving average (0.99) is v*
    φ    minimise  1 · contrastive(v*, φ(f); τ 0.25) + 0.75 · (1 - cos(E_T(phrase with φ(f)), E_T(phrase)))

A phrase is a sentence about a concept that the image resembles, and "with v" puts v in the place of the concept.

Paper:    SEARLE, arXiv 2303.15247; the numbers from miccunifi/SEARLE (read for these facts, not copied).
Differs:  the first objective is summed over images, where the release has a weighted mean: AdamW does not see the
          factor, and what an image gets does not hang on how many are inverted with it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Encode = Callable[[Tensor], Tensor]
"""Pseudo-words (B, V) → pooled texts (B, D) of a template with them; another template each call, if one likes."""

Phrases = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pseudo-words (B, V) → pooled texts (B, D) of a phrase for each image with them, and of the same phrase as it was."""


def invert(
    encode: Encode,
    images: Float[Tensor, "b d"],
    width: int,
    phrases: Phrases | None = None,
    *,
    steps: int = 350,
    lr: float = 2e-2,
    weight_decay: float = 0.01,
    decay: float = 0.99,
    phrase_weight: float = 0.5,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b v"]:
    """v* of every image. Leaves gradients of whatever `encode` runs as they are.

    Args:
        encode: with gradients to its argument.
        images: pooled, of any length.
        width: V of a word.
        phrases: None leaves their term out.
        steps, lr, weight_decay: of AdamW.
        decay: of the moving average.
        phrase_weight: of the phrases' term.
        generator: of the starting values, on the device of `images`; None is torch's own.
    """
    start = torch.randn(
        len(images), width, device=images.device, dtype=torch.float32, generator=generator
    )
    v = (0.02 * start).requires_grad_()
    average = v.detach().clone()
    optimizer = torch.optim.AdamW([v], lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        with torch.enable_grad():
            loss = _apart(encode(v), images).sum()
            if phrases is not None:
                loss = loss + phrase_weight * _apart(*phrases(v)).sum()
        (v.grad,) = torch.autograd.grad(loss, [v])
        optimizer.step()
        average.lerp_(v.detach(), 1 - decay)
    return average


def distillation(
    found: Float[Tensor, "b v"],
    targets: Float[Tensor, "b v"],
    phrases: tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]] | None = None,
    *,
    temperature: float = 0.25,
    phrase_weight: float = 0.75,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of φ in float32, and its parts.

    Args:
        found: φ(f).
        targets: v* of the same images.
        phrases: what `Phrases` gives for `found`; None leaves their term out.
        temperature: of the contrastive part.
        phrase_weight: of the phrases' term.

    Returns:
        The scalar loss; `distillation_loss` and, with phrases, `phrase_loss`, both without their weight.
    """
    loss = pair_contrastive(targets, found, temperature)
    parts = {"distillation_loss": loss.detach()}
    if phrases is not None:
        phrase = _apart(*phrases).mean()
        parts["phrase_loss"] = phrase.detach()
        loss = loss + phrase_weight * phrase
    return loss, parts


def pair_contrastive(
    first: Float[Tensor, "b v"], second: Float[Tensor, "b v"], temperature: float
) -> Float[Tensor, ""]:
    """Each of 2B vectors has its partner to find among all 2B - 1 others, its own side's too; mean, in float32."""
    with torch.autocast(first.device.type, enabled=False):
        rows = F.normalize(torch.cat([first, second]).float(), dim=-1)
        logits = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
        partner = torch.arange(len(rows), device=rows.device).roll(len(first))
        return F.cross_entropy(logits, partner)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine, row by row, in float32."""
    with torch.autocast(a.device.type, enabled=False):
        return 1 - (F.normalize(a.float(), dim=-1) * F.normalize(b.float(), dim=-1)).sum(-1)
