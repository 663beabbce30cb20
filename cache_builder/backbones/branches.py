"""The two residual branches of a transformer block, found by the names that three libraries give them.

    x = h + attention(norm(h))       norm ─▶ … ─▶ end        what goes into `norm` is the residual stream,
    h' = x + feed forward(norm(x))   norm ─▶ … ─▶ end        what comes out of `end` is added to it

So an adapter beside a branch needs two hooks, and no module of the library is touched.
"""

from typing import NamedTuple

from torch import nn

from cache_builder.errors import UnknownName

NAMES = (
    (
        "ln_1",
        "ls_1",
        "ln_2",
        "ls_2",
    ),  # open_clip; `ls` is an identity where there is no layer scale
    ("norm1", "drop_path1", "norm2", "drop_path2"),  # timm, likewise
    ("layer_norm1", "self_attn", "layer_norm2", "mlp"),  # transformers: CLIP, SigLIP
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),  # transformers: Llama
)
"""Attention's norm and end, then those of the feed-forward part."""


class Branch(NamedTuple):
    """One residual branch.

    Attributes:
        norm: its first module.
        end: its last; what it returns, or the first of a tuple, is added to the residual stream.
    """

    norm: nn.Module
    end: nn.Module


class Branches(NamedTuple):
    """Those of a block, in the order in which they are run."""

    attention: Branch
    feed_forward: Branch


def branches_of(block: nn.Module) -> Branches:
    """The branches of a block that norms before each of them.

    Raises:
        UnknownName: it is of another shape; names its class.
    """
    kind = type(block).__name__
    for names in NAMES:
        found = [getattr(block, name, None) for name in names]
        modules = [module for module in found if isinstance(module, nn.Module)]
        if len(modules) == len(names) and "Post" not in kind:
            return Branches(Branch(*modules[:2]), Branch(*modules[2:]))
    raise UnknownName(
        f"a block of class {kind} has not the two pre-normed residual branches that adapters stand beside"
    )
