"""Train the bundled LLaVA: a captioner of toy-world scenes on the frozen tower of the bundled CLIP.

    python -m cache_builder.demo.train_llava --out cache_builder/demo/llava --checkpoint /tmp/llava.safetensors

Made the way LLaVA was made, in miniature. The vision tower is the bundled CLIP's, frozen, read one block before its
end; the projector and the language model learn to predict the alt-texts after the patches. LLaVA's language model had
read text before it saw a picture, so in a share of the rows here the patches are left out, and the text stands alone.

    with picture   <bos> <image> × 49  a red cup <eos>        predicted: what follows the patches
    text alone     <bos> a red cup <eos>                      predicted: everything
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from cache_builder.demo.draw import IMAGE_SIZE
from cache_builder.demo.pretraining import (
    TEXTS_PER_SCENE,
    Training,
    flags,
    half,
    render_scenes,
    replace_weights,
    run,
)
from cache_builder.demo.tokenizer import IMAGE, learn_llama_tokenizer

CLIP = Path(__file__).parent / "clip"
PATCH = 8
LONGEST = 30
"""Tokens of an alt-text; the few longer ones are cut."""

TEXT_ALONE = 0.3
"""Share of rows without their picture."""


def vision_config() -> CLIPVisionConfig:
    """The bundled CLIP's tower in transformers' words."""
    found = json.loads((CLIP / "open_clip_config.json").read_text())["model_cfg"]
    shape = found["vision_cfg"]
    return CLIPVisionConfig(
        hidden_size=shape["width"],
        intermediate_size=4 * shape["width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["width"] // shape["head_width"],
        image_size=shape["image_size"],
        patch_size=shape["patch_size"],
        projection_dim=found["embed_dim"],
        hidden_act="quick_gelu" if found["quick_gelu"] else "gelu",
    )


def clip_tower_state() -> dict[str, Tensor]:
    """The bundled CLIP's image tower under the names transformers gives its parts."""
    found = load_file(CLIP / "open_clip_model.safetensors")
    state = {
        "embeddings.class_embedding": found["visual.class_embedding"],
        "embeddings.patch_embedding.weight": found["visual.conv1.weight"],
        "embeddings.position_embedding.weight": found["visual.positional_embedding"],
        **_pair("pre_layrnorm", found, "visual.ln_pre"),
        **_pair("post_layernorm", found, "visual.ln_post"),
    }
    for k in range(vision_config().num_hidden_layers):
        here, there = f"encoder.layers.{k}", f"visual.transformer.resblocks.{k}"
        for part in ("weight", "bias"):
            joined = found[f"{there}.attn.in_proj_{part}"].chunk(3)
            for name, value in zip("qkv", joined, strict=True):
                state[f"{here}.self_attn.{name}_proj.{part}"] = value
        state |= _pair(f"{here}.self_attn.out_proj", found, f"{there}.attn.out_proj")
        state |= _pair(f"{here}.layer_norm1", found, f"{there}.ln_1")
        state |= _pair(f"{here}.layer_norm2", found, f"{there}.ln_2")
        state |= _pair(f"{here}.mlp.fc1", found, f"{there}.mlp.c_fc")
        state |= _pair(f"{here}.mlp.fc2", found, f"{there}.mlp.c_proj")
    return {name: value.float() for name, value in state.items()}


def _pair(name: str, found: dict[str, Tensor], there: str) -> dict[str, Tensor]:
    return {f"{name}.{part}": found[f"{there}.{part}"] for part in ("weight", "bias")}


def new_model(vocabulary: int, image_token: int) -> LlavaForConditionalGeneration:
    """Random projector and language model on the frozen tower."""
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=144,
            intermediate_size=432,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        ),
        image_token_index=image_token,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    tower: Any = model.model.vision_tower
    tower.load_state_dict(clip_tower_state())
    tower.requires_grad_(False)
    return model


@torch.no_grad()
def all_patches(tower: CLIPVisionModel, images: np.ndarray, batch: int = 512) -> Tensor:
    """What the frozen tower makes of every picture, fp16 (n, N, W): it is needed in every epoch and never changes."""
    found = []
    for start in range(0, len(images), batch):
        pixels = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2) / 127.5 - 1
        states = tower(pixels, output_hidden_states=True).hidden_states
        assert states is not None
        found.append(states[-2][:, 1:].half())
    return torch.cat(found)


def caption_loss(model: LlavaForConditionalGeneration, patches: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token.

    Args:
        model: projector and language model are trained.
        patches: (B, N, W) of the frozen tower.
        ids: (B + A, l) begin, text, end, padded with 0; the first B rows come with their picture, the rest alone.
    """
    inner: Any = model.model
    words = inner.language_model.embed_tokens(ids)
    b, n = len(patches), patches.shape[1]
    seen = torch.cat([words[:b, :1], inner.multi_modal_projector(patches), words[:b, 1:]], 1)
    real = ids != 0
    ones = torch.ones(b, n, dtype=torch.bool)
    total, count = torch.zeros(()), torch.zeros(())
    for states, mask, target in (
        (seen, torch.cat([ones, real[:b]], 1), ids[:b]),
        (words[b:], real[b:], ids[b:]),
    ):
        if not len(states):
            continue
        out = inner.language_model(inputs_embeds=states, attention_mask=mask, use_cache=False)
        guesses = model.lm_head(out.last_hidden_state[:, -target.shape[1] : -1])
        total = total + cross_entropy(
            guesses.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0, reduction="sum"
        )
        count = count + (target[:, 1:] != 0).sum()
    return total / count


def save_llava(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Write what `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor` read; weights in fp16."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(out)
    processor.save_pretrained(out)
    state = half(model)
    state.pop("lm_head.weight")  # tied to the embedding
    replace_weights(state, out / "model.safetensors")


def train(args: argparse.Namespace) -> None:
    """Render, learn the tokenizer, encode the pictures once, train, save."""
    started = time.time()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    scenes = render_scenes(args.seed, args.scenes)
    tokenizer = learn_llama_tokenizer(scenes.all_texts, 64)
    flat = tokenizer(
        [f"{text}{tokenizer.eos_token}" for text in scenes.all_texts],
        padding="max_length",
        truncation=True,
        max_length=LONGEST + 2,
        return_tensors="np",
    )
    ids = flat.input_ids.reshape(args.scenes, TEXTS_PER_SCENE, -1).astype(np.int16)
    image_token = tokenizer.get_vocab()[IMAGE]
    model = new_model(len(tokenizer), image_token)
    model.train()
    model.model.vision_tower.eval()
    patches = all_patches(model.model.vision_tower, scenes.images)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )

    def loss(rows: np.ndarray, variant: np.ndarray) -> Tensor:
        texts = torch.from_numpy(ids[rows, variant].astype(np.int64))
        texts = texts[:, : int((texts != 0).sum(1).max())]
        pictured = round(len(rows) * (1 - TEXT_ALONE))
        return caption_loss(model, patches[torch.from_numpy(rows[:pictured])].float(), texts)

    run(Training(model, loss, lambda: save_llava(model, processor, args.out)), args, started)


def main() -> None:
    """Read the flags and train."""
    train(flags(__doc__, "train_llava.safetensors").parse_args())


if __name__ == "__main__":
    main()
