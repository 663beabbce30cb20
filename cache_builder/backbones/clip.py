"""CLIP through open_clip: OpenAI, LAION, DataComp, DFN, MetaCLIP and every other ViT with a class token.

Library:   open_clip 3.3 (mlfoundations/open_clip), classes `CLIP` and `CustomTextCLIP` with its native towers.
Raw:       image = input of `visual.ln_post`; text = input of `ln_final`. Prefix = the class token.
Pooled:    ln_post(class token) @ proj; ln_final(row of the end-of-text token) @ text_projection.
Refused:   CoCa, HF text towers, ResNets, attention and average pooling, timm towers (SigLIP2, PE: own families).

    ids   49406 a photo of … 49407 0 0 0        stored rows of `tokens`: from the start up to and including 49407,
            │                  └ pooled row     `length` of them; id 0 after that is padding, but "!" before it
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.tokenizer import SimpleTokenizer
from PIL.Image import Image
from torch import Tensor, nn

from cache_builder.backbones.checkpoints import (
    CheckpointError,
    Loaded,
    architecture,
    load_checkpoint,
)
from cache_builder.backbones.tiny_files import byte_tokenizer, write_tiny
from cache_builder.spec import BackboneSpec

TINY: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 12, "patch_size": 8},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 259,
        "width": 40,
        "heads": 4,
        "layers": 3,
        "hf_tokenizer_name": "beside this file",
        "tokenizer_kwargs": {"clean": "lower"},
    },
}
"""The architecture of `tiny`; all sizes differ, so that a transposition cannot pass."""

DEMO = Path(__file__).parent.parent / "demo" / "clip"
"""The bundled tiny CLIP, called `clip:demo`."""


def load(checkpoint: str, *, dtype: str = "float32", device: str = "cpu") -> "Clip":
    """A frozen CLIP.

    Args:
        checkpoint: `arch/tag`, `arch/tag@file`, a directory, or `demo`.
        dtype: compute type, "float32", "bfloat16" or "float16".
        device: torch's name of it.

    Raises:
        UnknownName: no such architecture, tag or dtype.
        CheckpointError: not a CLIP of this shape, or not loadable exactly as asked.
    """
    source = str(DEMO) if checkpoint == "demo" else checkpoint
    config = architecture(source)
    if config is not None:
        refuse_other_shapes(config, checkpoint)
    return Clip(
        load_checkpoint(source, "clip", dtype=dtype, device=device), checkpoint, dtype, device
    )


def tiny(directory: Path | None = None) -> "Clip":
    """A random-weight CLIP of the true class: 16 patches × 48, text width 40, joint space 24, 259 byte tokens.

    Args:
        directory: where to leave its files, so that `load` can be tried on them; a temporary one by default.
    """
    with tempfile.TemporaryDirectory() as scratch:
        where = directory or Path(scratch) / "tiny"
        write_tiny(where, open_clip.CLIP, TINY, byte_tokenizer(TINY["text_cfg"]["context_length"]))
        return load(str(where))


class Clip:
    """A loaded CLIP behind the contracts `Backbone` and `OpenBackbone`."""

    streams = frozenset(
        {"image/pooled", "image/patches", "image/prefix", "text/pooled", "text/tokens"}
    )

    def __init__(self, loaded: Loaded, checkpoint: str, dtype: str, device: str) -> None:
        self.model: Any = loaded.model
        self.visual: Any = self.model.visual
        self.text: Any = getattr(self.model, "text", self.model)
        self.device = device
        self.transform = loaded.transform
        self.tokenizer = loaded.tokenizer
        self.context = int(self.text.context_length)
        self.pool_type = getattr(self.text, "pool_type", None) or self.model.text_pool_type
        self.image_dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(
            dtype, torch.float32
        )
        self.start, self.end, self.pad, self.reserved = _special_ids(self.tokenizer)
        self._check_tokenizer(checkpoint)
        joint = self.visual.proj.shape[1]
        self.spec = BackboneSpec(
            family="clip",
            checkpoint="demo" if checkpoint == "demo" else loaded.name,
            weights=loaded.weights,
            preprocessing=loaded.preprocessing,
            tokenizer=loaded.tokenizer_text,
            layer="last block, before the final norm",
            dims={
                "image_size": self.visual.image_size[0],
                "patches": self.visual.grid_size[0] * self.visual.grid_size[1],
                "prefix": 1,
                "image_width": self.visual.ln_post.normalized_shape[0],
                "text_width": self.text.ln_final.normalized_shape[0],
                "context": self.context,
                "joint": joint,
            },
            activation=_activation(self.visual, self.text),
            compute=f"{dtype}, nn.MultiheadAttention",
            versions=loaded.versions,
        )

    def preprocess(self, image: Image) -> Float[Tensor, "3 height width"]:
        """open_clip's evaluation transform, pixel for pixel."""
        return self.transform(image)

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "b l"]:
        """Ids padded and cut to the context length, on the CPU.

        Raises:
            CheckpointError: a text spells a special token, which open_clip would encode as one: the pooled row would
                then lie in the middle of the text. Names the text.
        """
        ids = self.tokenizer(list(texts))
        ends = self._ends(ids)
        column = torch.arange(ids.shape[1])
        after, before = column > ends[:, None], column < ends[:, None]
        inside = before & (column > 0) & torch.isin(ids, torch.tensor(self.reserved))
        strays = inside | (after & (ids != self.pad))
        for row in strays.any(1).nonzero().flatten().tolist():
            raise CheckpointError(
                f"text {texts[row]!r} spells a special token of the tokenizer and would be pooled in its middle; "
                "reword it"
            )
        return ids

    def vocabulary(self) -> list[str]:
        """The string of every token id, in order, without the marks of word ends."""
        decode = getattr(self.tokenizer, "tokenizer", self.tokenizer).decode
        return [decode([i]).strip() for i in range(_vocabulary_size(self.tokenizer))]

    def truncated(self, texts: Sequence[str]) -> int:
        """How many texts do not fit the context length; open_clip overwrites their last id by end-of-text."""
        longer = self.tokenizer(list(texts), context_length=self.context + 1)
        return int((self._ends(longer) == self.context).sum())

    def lengths(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """Tokens up to and including end-of-text, of each text."""
        return self._ends(ids) + 1

    @torch.no_grad()
    def encode_images(self, pixels: Float[Tensor, "b 3 height width"]) -> dict[str, Tensor]:
        """`pooled` (B, D), `patches` (B, N, W), `prefix` (B, 1, W), on the backbone's device."""
        out = self.visual.forward_intermediates(
            pixels.to(self.device, self.image_dtype),
            indices=1,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        return {
            "pooled": out["image_features"],
            "patches": out["image_intermediates"][-1],
            "prefix": out["image_intermediates_prefix"][-1],
        }

    @torch.no_grad()
    def encode_texts(self, ids: Int[Tensor, "b l"]) -> dict[str, Tensor]:
        """`pooled` (B, D), `tokens` (B, L, V), `length` (B,), on the backbone's device.

        `ids` may be cut after the longest text of the batch: causal attention makes the rows the same up to 1e-6, and
        the pass up to five times cheaper. At full width the pooled rows equal `encode_text` exactly.
        """
        ids = ids.to(self.device)
        return self.encode_embedded(self.embed_tokens(ids), self._ends(ids))

    def readout(self) -> dict[str, Tensor]:
        """The frozen tensors between raw tokens and joint space, float32 on the CPU; names as in `Backbone.readout`."""
        found: dict[str, Tensor] = {
            "image/norm.weight": self.visual.ln_post.weight,
            "image/norm.bias": self.visual.ln_post.bias,
            "image/proj": self.visual.proj,
            "image/eps": torch.tensor(self.visual.ln_post.eps),
            "text/norm.weight": self.text.ln_final.weight,
            "text/norm.bias": self.text.ln_final.bias,
            "text/eps": torch.tensor(self.text.ln_final.eps),
            "logit_scale": self.model.logit_scale.reshape(()),
        }
        projection = self.text.text_projection
        if isinstance(projection, nn.Linear):
            found["text/proj.weight"] = projection.weight
            if projection.bias is not None:
                found["text/proj.bias"] = projection.bias
        else:
            found["text/proj"] = projection
        if self.model.logit_bias is not None:
            found["logit_bias"] = self.model.logit_bias.reshape(())
        return {k: v.detach().to("cpu", torch.float32).clone() for k, v in found.items()}

    def tower(self, side: str) -> nn.Module:
        """The stack of one side; its `resblocks` are what adapters wrap and hooks enter."""
        return {"image": self.visual, "text": self.text}[side].transformer

    def embed_tokens(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """Token embeddings before positions, on the backbone's device."""
        return self.text.token_embedding(ids.to(self.device)).to(self.image_dtype)

    def encode_embedded(
        self, embedded: Float[Tensor, "b l v"], end: Int[Tensor, " b"]
    ) -> dict[str, Tensor]:
        """Text streams from embedded tokens, any l up to the context length; row `end` is pooled. Keeps gradients."""
        states = embedded + self.text.positional_embedding[: embedded.shape[1]].to(embedded.dtype)
        raw = self.resume_from("text", 0, states)
        end = end.to(raw.device)
        pooled = self.text.ln_final(raw)[torch.arange(len(raw), device=raw.device), end]
        projection = self.text.text_projection
        pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return {"pooled": pooled, "tokens": raw, "length": end + 1}

    def resume_from(
        self, side: str, block: int, states: Float[Tensor, "b n w"]
    ) -> Float[Tensor, "b n w"]:
        """Run blocks `block`… on activations that enter block `block`; returns the raw tokens. Keeps gradients.

        Args:
            side: "image" (rows: class token, then patches) or "text".
            block: 0 … depth; at depth the states are returned as they are.
            states: activations, after positions (and, for images, after `ln_pre`) where `block` is 0.
        """
        blocks: Any = self.tower(side).resblocks
        assert 0 <= block <= len(blocks), f"block {block} of {len(blocks)}"
        length = states.shape[1]
        mask = None if side == "image" else self.text.attn_mask[:length, :length].to(states.dtype)
        for layer in blocks[block:]:
            states = layer(states, attn_mask=mask)
        return states

    def _ends(self, ids: Tensor) -> Tensor:
        """Position of the end-of-text id, (B,); the first one, which is the one the library pools."""
        return ids.argmax(-1) if self.pool_type == "argmax" else (ids == self.end).int().argmax(-1)

    def _check_tokenizer(self, checkpoint: str) -> None:
        """The end-of-text id must be found where the library looks for it, and ids must fit the embedding."""
        size = self.text.token_embedding.num_embeddings
        largest = _vocabulary_size(self.tokenizer) - 1
        if self.pool_type == "argmax" and self.end != largest:
            raise CheckpointError(
                f"clip:{checkpoint} pools at the largest id, but its tokenizer's end-of-text is {self.end} and its "
                f"largest {largest}; texts would be pooled at random"
            )
        probe = self.tokenizer(["a photo"])
        fits = largest < size and probe.shape == (1, self.context)
        if not fits or int((probe == self.end).sum()) == 0 or int(probe[0, 0]) != self.start:
            raise CheckpointError(
                f"clip:{checkpoint}: the tokenizer does not fit the text tower: {largest + 1} ids for {size} "
                f"embeddings, 'a photo' → {probe[0, :8].tolist()} of length {probe.shape[1]} for {self.context} "
                f"positions, start {self.start}, end {self.end}"
            )


def refuse_other_shapes(config: Mapping[str, Any], checkpoint: str) -> None:
    """A `CheckpointError` that names what is different, for every open_clip architecture this file cannot read."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    timm = vision.get("timm_model_name", "")
    faults = {
        "a CoCa, which pools by cross-attention": "multimodal_cfg" in config
        or text.get("embed_cls"),
        f"built on the Hugging Face text tower {text.get('hf_model_name')}": "hf_model_name"
        in text,
        "a SigLIP model, of family siglip2": "siglip" in timm,
        "a Perception Encoder, of family pe": timm.startswith("vit_pe"),
        f"built on the timm tower {timm}": timm,
        "a ResNet, whose maps are not tokens": isinstance(vision.get("layers"), list),
        "pooled by attention": vision.get("attentional_pool"),
        f"pooled by {vision.get('pool_type')} over the patches": vision.get("pool_type", "tok")
        != "tok",
        "normed after pooling": vision.get("final_ln_after_pool")
        or text.get("final_ln_after_pool"),
        f"pooled at the {text.get('pool_type')} text position": text.get("pool_type", "argmax")
        not in ("argmax", "eos"),
        "built on a text tower without causal mask": text.get("no_causal_mask"),
        "without a text projection": text.get("proj_type", "linear") != "linear",
    }
    found = [what for what, here in faults.items() if here]
    if found:
        raise CheckpointError(
            f"clip:{checkpoint} is {found[0]}; family clip reads ViTs with a class token and causal text towers"
        )


def _special_ids(tokenizer: Any) -> tuple[int, int, int, list[int]]:
    """Start, end and padding id, and those that no word may have."""
    if isinstance(tokenizer, SimpleTokenizer):
        start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
        return start, end, 0, [start, end]  # 0 pads, but is also the word "!"
    inner = tokenizer.tokenizer
    missing = [n for n in ("bos_token", "eos_token", "pad_token") if getattr(inner, n) is None]
    if missing:
        raise CheckpointError(f"the tokenizer in use declares no {' and no '.join(missing)}")
    special = [inner.bos_token_id, inner.eos_token_id, inner.pad_token_id]
    return (*special, special)


def _vocabulary_size(tokenizer: Any) -> int:
    return (
        tokenizer.vocab_size if isinstance(tokenizer, SimpleTokenizer) else len(tokenizer.tokenizer)
    )


def _activation(visual: Any, text: Any) -> str:
    """`QuickGELU()` or `GELU(approximate='none')`, per tower where they differ."""
    image_act, text_act = (repr(t.transformer.resblocks[0].mlp.gelu) for t in (visual, text))
    return image_act if image_act == text_act else f"image {image_act}, text {text_act}"
