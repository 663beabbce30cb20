"""LLaVA-1.5 through transformers: patches of its vision tower before the projector, word states of its language model.

Paper:     "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744; for words: TRIDENT, 2411.12584.
Library:   transformers 5 `LlavaForConditionalGeneration`; towers CLIP or SigLIP, language models of Llama's shape.
Raw:       image = hidden state −2 of the tower (the configuration's `vision_feature_layer`), without its final norm;
           text = input of the language model's norm. Prefix = class token, where the tower has one.
Pooled:    nothing, and no logit scale: there is no joint space, so methods that need one refuse these caches.
Readout:   `image/projector.*` takes patches into the language model's space; `text/norm` is a root-mean-square norm.
Words:     `word/states`: bare phrases without begin of text; a compound is split at `_` and `-`, its parts run apart.
Pixels:    padded to a square with the mean colour, as LLaVA was trained; `NAME@crop` takes transformers' crop instead.
Memory:    `NAME@vision` loads tower and projector alone (7B: 1.3 GB in float32 instead of 27).
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from cache_builder.backbones.base import Blocks, Pixels
from cache_builder.backbones.cards import Card, hub_folder
from cache_builder.backbones.checkpoints import (
    CheckpointError,
    check_dtype,
    check_finite,
    flat,
    releases,
    weights_digest,
)
from cache_builder.backbones.hub_files import (
    canonical_name,
    describe_hub_tokenizer,
    describe_processor,
    kernels_of,
    load_model,
    load_processor,
    load_tokenizer,
    read_config,
    save_model,
)
from cache_builder.backbones.llama_text import LONGEST, LlavaText
from cache_builder.backbones.llava_files import tower_alone
from cache_builder.backbones.open_clip_model import compute_text
from cache_builder.backbones.scaling import Scaling, of_processor
from cache_builder.backbones.tiny_files import llama_tokenizer, perturb
from cache_builder.backbones.two_towers import TwoTowers
from cache_builder.errors import UnknownName
from cache_builder.spec import BackboneSpec, with_depth

SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": {},
    "llava-hf/llava-1.5-13b-hf": {"text_config": {"hidden_size": 5120, "num_hidden_layers": 40}},
    "llava-hf/bakLlava-v1-hf": {"text_config": {"model_type": "mistral"}},
    "xtuner/llava-llama-3-8b-v1_1-transformers": {"text_config": {"vocab_size": 128320}},
    "llava-hf/llava-interleave-qwen-0.5b-hf": {
        "text_config": {"model_type": "qwen2", "hidden_size": 1024, "num_hidden_layers": 24},
        "vision_config": SIGLIP,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "llava-hf/llava-interleave-qwen-7b-hf": {
        "text_config": {"model_type": "qwen2", "hidden_size": 4096, "num_hidden_layers": 32},
        "vision_config": SIGLIP,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}
"""Checkpoints that people use, with what their published configuration says beside the class's defaults, as far as it
decides what is cached: so `headstart list backbones` can compute their cost without a network."""

PARTS = {
    "vision_config": ("clip_vision_model", "siglip_vision_model"),
    "text_config": ("llama", "mistral", "qwen2"),
}
"""What a LLaVA may be made of. Other models have layers of the same names that compute something else."""

OPTIONS = ("crop", "vision")
"""What may follow an @, separated by commas."""

DEMO = Path(__file__).parent.parent / "demo" / "llava"
"""The bundled tiny LLaVA, called `llava:demo`."""


def load(
    checkpoint: str, *, dtype: str = "float32", device: str = "cpu", compiled: bool = False
) -> TwoTowers:
    """A frozen LLaVA.

    Args:
        checkpoint: a hub name, a directory, or `demo`; options behind an @: `NAME@vision`, `NAME@crop,vision`.
        dtype: compute type, "float32", "bfloat16" or "float16".
        device: torch's name of it.
        compiled: run the blocks through torch.compile.

    Raises:
        UnknownName: no such checkpoint, option or dtype.
        CheckpointError: not a LLaVA, or not loadable exactly as asked.
    """
    check_dtype(dtype)
    source, options = _parted(checkpoint)
    source = str(DEMO) if source == "demo" else source
    name = f"llava:{checkpoint}"
    config = read_config(source, "llava", ("llava",))
    kept_blocks(config)  # refuses several layers, before any weights are read
    _refuse_other_parts(config, name)
    processor = _processor(source, config, pad="crop" not in options)
    model = tower_alone(source, config) if "vision" in options else _whole(source)
    check_finite(model, name)
    image = LlavaImage(model, config, processor, name)
    text = tokenizer = None
    if "vision" not in options:
        tokenizer = load_tokenizer(source, "llava")
        text = LlavaText(model, tokenizer, config, name)
    architecture = flat({**config.to_dict(), **({} if text else {"text_config": None})})
    towers = [image.tower, text.lm] if text else [image.tower]
    spec = BackboneSpec(
        family="llava",
        checkpoint="@".join(
            [_spec_name(checkpoint, source), *([",".join(options)] * bool(options))]
        ),
        weights=weights_digest(model),
        preprocessing=describe_processor(processor),
        tokenizer=describe_hub_tokenizer(tokenizer, text.tokens.rule) if text else "none",
        layer=f"image: hidden state {config.vision_feature_layer}; text: last block, before the final norm",
        dims={**image.dims, **(text.dims if text else {})},
        architecture=architecture,
        activation=f"image {image.activation}" + (f", text {text.activation}" if text else ""),
        compute=compute_text(dtype, kernels_of(*towers), compiled, device),
        versions=releases("torch", "torchvision", "transformers", "tokenizers", "pillow"),
    )
    return TwoTowers(
        model.to(device),
        image,
        text,
        spec,
        device=device,
        dtype=dtype,
        scalars={},
        compiled=compiled,
    )


def card(checkpoint: str) -> Card:
    """Shapes of what `load` would give; reads no weights and needs no network.

    Raises:
        UnknownName: neither published nor on this machine, or no such option.
        CheckpointError: not a LLaVA.
    """
    from transformers import LlavaConfig

    source, options = _parted(checkpoint)
    folder = hub_folder(str(DEMO) if source == "demo" else source)
    if folder is None and source not in PUBLISHED:
        raise UnknownName(
            f"llava:{source} is not on this machine, and not one of {', '.join(PUBLISHED)}"
        )
    if folder is None:
        config: Any = LlavaConfig(**PUBLISHED[source])
    else:
        config = read_config(str(folder), "llava", ("llava",))
    dims, depth = image_dims(config), {"image": kept_blocks(config)}
    if "vision" in options:
        return Card(with_depth(dims, depth), depth)
    text = config.text_config
    context = min(LONGEST, text.max_position_embeddings)
    dims |= {"text_width": text.hidden_size, "context": context}
    depth |= {"text": text.num_hidden_layers}
    return Card(with_depth(dims, depth), depth)


def tiny(directory: Path | None = None) -> TwoTowers:
    """A random-weight LLaVA of the true class: 16 patches × 48 at layer −2 of 3, language model 40 wide.

    Args:
        directory: where to leave its files, so that `load` can be tried on them; a temporary one by default.
    """
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = llama_tokenizer(64)
    vision = {"model_type": "clip_vision_model", "hidden_size": 48, "intermediate_size": 96}
    vision |= {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32}
    vision |= {"patch_size": 8, "projection_dim": 24}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 40}
    text |= {"intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "max_position_embeddings": 96}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-2
    )
    size = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    with tempfile.TemporaryDirectory() as scratch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        perturb(model)
        where = directory or Path(scratch) / "tiny"
        save_model(model, where)
        processor.save_pretrained(where)
        return load(str(where))


class LlavaImage:
    """An `ImageTower` over LLaVA's vision tower, up to the layer its projector reads.

    Args:
        model: with `vision_tower` and `multi_modal_projector` below it.
        config: LLaVA's configuration.
        processor: the picture's transform.
        name: of the checkpoint, for messages.
    """

    pools = False
    ragged = False

    def __init__(self, model: Any, config: Any, processor: Any, name: str) -> None:
        inner = getattr(model, "model", model)
        self.tower, self.projector = inner.vision_tower, inner.multi_modal_projector
        self.processor, self.config = processor, config
        layers = self.tower.encoder.layers
        self.module: nn.Module = self.tower.encoder
        self.blocks: Blocks = layers[: kept_blocks(config)]
        act = type(self.projector.act).__name__
        if act != "GELUActivation":
            raise CheckpointError(
                f"{name}: its projector computes {act} where LLaVA-1.5 has an exact GELU; it cannot be read out"
            )
        self.dims = image_dims(config)
        self.n_prefix = self.dims["prefix"]

    @property
    def activation(self) -> str:
        """Of the feed-forward part."""
        return repr(self.tower.encoder.layers[0].mlp.activation_fn)

    def preprocess(self, image: Image) -> Pixels:
        """The processor's own result for one picture."""
        return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]

    def scaling(self) -> Scaling:
        """How the processor scales 8-bit levels."""
        return of_processor(self.processor)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """The same for every picture: it is padded or cropped to one square."""
        del width, height
        side = self.dims["image_size"] // self.config.vision_config.patch_size
        return side, side

    def embed(self, pixels: Tensor) -> tuple[Tensor, None]:
        """Class token and patches with positions, through CLIP's first norm."""
        states = self.tower.embeddings(pixels)
        before = getattr(self.tower, "pre_layrnorm", None)  # so spelt in the library
        return states if before is None else before(states), None

    def run(self, block: nn.Module, states: Tensor, mask: Tensor | None, n_prompts: int) -> Tensor:
        """One layer without a mask."""
        del n_prompts
        assert mask is None
        return block(states, attention_mask=None)

    def pool(self, raw: Tensor, mask: Tensor | None) -> Tensor:
        """LLaVA pools nothing."""
        raise NotImplementedError

    def readout(self) -> dict[str, Tensor]:
        """The projector's two layers."""
        found = {}
        for name, layer in (("fc1", self.projector.linear_1), ("fc2", self.projector.linear_2)):
            found[f"projector.{name}.weight"] = layer.weight
            if layer.bias is not None:
                found[f"projector.{name}.bias"] = layer.bias
        return found


def _refuse_other_parts(config: Any, name: str) -> None:
    """A `CheckpointError` for towers and language models whose layers this family would run wrongly."""
    for part, known in PARTS.items():
        found = getattr(config, part).model_type
        if found not in known:
            raise CheckpointError(
                f"{name}: its {part.replace('_', ' ')} is a {found}; family llava reads {', '.join(known)}"
            )


def kept_blocks(config: Any) -> int:
    """Blocks of the tower below the layer that LLaVA reads: hidden state j is the input of block j."""
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int):
        raise CheckpointError(f"this LLaVA joins the layers {layer}; family llava reads one layer")
    block = layer if layer >= 0 else depth + 1 + layer
    if not 0 <= block <= depth:
        raise CheckpointError(
            f"this LLaVA reads hidden state {layer}, but its vision tower has hidden states 0 … {depth}"
        )
    return block


def image_dims(config: Any) -> dict[str, int]:
    """The image part of `BackboneSpec.dims`, from a configuration alone."""
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    return {
        "image_size": vision.image_size,
        "patches": side * side,
        "prefix": int(vision.model_type == "clip_vision_model"),
        "image_width": vision.hidden_size,
    }


def _parted(checkpoint: str) -> tuple[str, list[str]]:
    source, _, given = checkpoint.partition("@")
    options = sorted({*given.split(",")} - {""})
    if unknown := [o for o in options if o not in OPTIONS]:
        raise UnknownName(
            f"llava:{checkpoint}: no option {unknown[0]!r} (known: {', '.join(OPTIONS)})"
        )
    return source, options


def _spec_name(checkpoint: str, source: str) -> str:
    return "demo" if checkpoint.partition("@")[0] == "demo" else canonical_name(source)


def _processor(source: str, config: Any, *, pad: bool) -> Any:
    """The checkpoint's image processor, or the same with padding where it would crop."""
    import transformers

    found = load_processor(source, "llava")
    if not pad or not getattr(found, "do_center_crop", False):
        return found
    side = config.vision_config.image_size
    fields = {k: v for k, v in found.to_dict().items() if v is not None}
    for key in ("image_processor_type", "processor_class"):
        fields.pop(key, None)
    # A square is resized to the crop itself, so that nothing is cut.
    fields |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    padding: Any = transformers.LlavaImageProcessor
    return padding(**fields, do_pad=True)


def _whole(source: str) -> Any:
    from transformers import LlavaForConditionalGeneration

    return load_model(LlavaForConditionalGeneration, source, "llava")
