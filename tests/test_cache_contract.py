"""What the backbones take from their libraries, name by name: a release that renames one fails here, and says which.

Most of these names are private or undocumented, so nothing else promises them. The last test reads our own sources, so
that the lists stay complete.
"""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import kinds
import pytest

from cache_builder.backbones import clip

NATIVE = """_embeds _pool proj ln_post.weight ln_post.bias ln_post.eps ln_post.normalized_shape grid_size image_size
    patch_dropout preprocess_cfg transformer.resblocks transformer.resblocks.0.mlp.gelu"""

TRUNK = """_pos_embed norm_pre patch_embed patch_embed.grid_size blocks blocks.0.mlp.act blocks.0.attn.fused_attn
    num_prefix_tokens embed_dim global_pool fc_norm norm.weight norm.bias norm.eps attn_pool head forward_head"""

POOL = """latent q kv proj norm.eps mlp.fc1 mlp.fc2 mlp.act num_heads pos_embed q_norm fused_attn"""

OPEN_CLIP_TEXT = """token_embedding.num_embeddings positional_embedding attn_mask ln_final.weight ln_final.bias
    ln_final.eps ln_final.normalized_shape text_projection context_length transformer.resblocks
    transformer.resblocks.0.mlp.gelu"""

HUB_IMAGE = """embeddings encoder.layers encoder.layers.0.mlp.activation_fn post_layernorm.weight post_layernorm.bias
    post_layernorm.eps use_head head.probe head.attention.in_proj_weight head.attention.in_proj_bias
    head.attention.out_proj head.attention.num_heads head.layernorm.eps head.mlp.fc1 head.mlp.fc2 config.model_type
    config.patch_size config.hidden_size config.hidden_act config._attn_implementation"""

HUB_TEXT = """embeddings.token_embedding.num_embeddings embeddings.position_embedding.weight encoder.layers
    encoder.layers.0.mlp.activation_fn final_layer_norm.weight final_layer_norm.bias final_layer_norm.eps head.weight
    head.bias config.max_position_embeddings config.hidden_size config._attn_implementation"""

LLAVA = """model.vision_tower.embeddings model.vision_tower.pre_layrnorm model.vision_tower.encoder.layers
    model.vision_tower.encoder.layers.0.mlp.activation_fn model.vision_tower.config._attn_implementation
    model.multi_modal_projector.linear_1.weight model.multi_modal_projector.linear_1.bias
    model.multi_modal_projector.linear_2.weight model.multi_modal_projector.act model.language_model.embed_tokens
    model.language_model.embed_tokens.num_embeddings model.language_model.layers
    model.language_model.layers.0.mlp.act_fn model.language_model.norm.weight
    model.language_model.norm.variance_epsilon model.language_model.rotary_emb
    model.language_model.config._attn_implementation model.language_model.config.hidden_size
    config.vision_feature_layer config.vision_config.num_hidden_layers config.vision_config.image_size
    config.vision_config.patch_size config.vision_config.model_type config.vision_config.hidden_size
    config.text_config.max_position_embeddings config.text_config.num_hidden_layers"""

HUB_TOKENIZER = """all_special_ids unk_token_id eos_token_id pad_token_id bos_token_id
    backend_tokenizer.to_str decode"""

NAMES = {
    # kind, where → names below it
    ("clip", "model.visual"): NATIVE,
    ("clip", "model"): f"{OPEN_CLIP_TEXT} text_pool_type text_eos_id logit_scale logit_bias visual",
    ("siglip2", "model"): "logit_scale logit_bias visual text",
    ("siglip2", "model.visual"): "trunk head image_size preprocess_cfg",
    ("siglip2", "model.visual.trunk"): TRUNK,
    ("siglip2", "model.visual.trunk.attn_pool"): POOL,
    ("siglip2", "model.text"): f"{OPEN_CLIP_TEXT} pool_type eos_id use_pad_mask cls_emb",
    ("pe", "model.visual"): "trunk head image_size preprocess_cfg",
    (
        "pe",
        "model.visual.trunk",
    ): f"{TRUNK} rope.get_embed rope_mixed blocks.0.attn.num_prefix_tokens",
    ("pe", "model.visual.trunk.attn_pool"): POOL,
    ("pe", "model.text"): f"{OPEN_CLIP_TEXT} pool_type eos_id use_pad_mask cls_emb",
    ("siglip2-hub", "model"): "logit_scale logit_bias vision_model text_model config.to_dict",
    ("siglip2-hub", "model.vision_model"): f"{HUB_IMAGE} config.image_size",
    ("siglip2-hub", "model.text_model"): HUB_TEXT,
    ("siglip2-naflex", "model"): "logit_scale logit_bias vision_model text_model config.to_dict",
    ("siglip2-naflex", "model.vision_model"): HUB_IMAGE,
    ("siglip2-naflex", "model.text_model"): HUB_TEXT,
    ("siglip2-naflex", "image.processor"): "patch_size max_num_patches to_dict",
    ("llava", "model"): LLAVA,
    ("llava", "image.processor"): "do_center_crop to_dict",
    ("llava", "text.tokens.tokenizer"): HUB_TOKENIZER,
}
MODULES = {
    "open_clip": "create_model get_tokenizer get_model_config list_models CLIP",
    "open_clip.model": "CustomTextCLIP",
    "open_clip.pretrained": "download_pretrained get_pretrained_cfg list_pretrained_tags_by_model",
    "open_clip.tokenizer": "HFTokenizer SimpleTokenizer default_bpe",
    "open_clip.transform": "PreprocessCfg image_transform_v2",
    "timm.models": "register_model generate_default_cfgs",
    "timm.models.eva": "Eva _create_eva",
    "timm.models.vision_transformer": "VisionTransformer _create_vision_transformer",
    "transformers": "AutoConfig AutoImageProcessor AutoModel AutoTokenizer LlavaForConditionalGeneration "
    "LlavaImageProcessor Siglip2Model SiglipModel",
    "transformers.masking_utils": "create_bidirectional_mask",
    "transformers.models.llava.modeling_llava": "LlavaMultiModalProjector",
    "transformers.models.siglip2.image_processing_siglip2": "get_image_size_for_max_num_patches",
    "transformers.utils.logging": "is_progress_bar_enabled disable_progress_bar enable_progress_bar get_verbosity "
    "set_verbosity set_verbosity_error",
    "huggingface_hub": "snapshot_download",
}

ARGUMENTS = {
    # what is called, with which names
    "open_clip.factory.create_model": "pretrained force_quick_gelu force_preprocess_cfg",
    "open_clip.transformer.ResidualAttentionBlock.forward": "attn_mask",
    "open_clip.tokenizer.SimpleTokenizer.__call__": "context_length",
    "open_clip.tokenizer.HFTokenizer.__call__": "context_length",
    "timm.models.eva.EvaBlock.forward": "rope",
    "timm.models.vision_transformer._create_vision_transformer": "pretrained",
    "transformers.models.siglip.modeling_siglip.SiglipEncoderLayer.forward": "attention_mask",
    "transformers.models.siglip2.modeling_siglip2.Siglip2EncoderLayer.forward": "attention_mask",
    "transformers.models.siglip2.modeling_siglip2.Siglip2MultiheadAttentionPoolingHead.forward": "attention_mask",
    "transformers.models.siglip2.modeling_siglip2.Siglip2VisionEmbeddings.forward": "spatial_shapes",
    "transformers.models.clip.modeling_clip.CLIPEncoderLayer.forward": "attention_mask",
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward": "attention_mask position_embeddings "
    "position_ids",
    "transformers.models.llama.modeling_llama.LlamaRotaryEmbedding.forward": "position_ids",
    "transformers.masking_utils.create_bidirectional_mask": "config inputs_embeds attention_mask",
    "transformers.tokenization_utils_base.PreTrainedTokenizerBase.__call__": "padding padding_side truncation "
    "max_length return_tensors add_special_tokens verbose",
}


def below(thing: Any, name: str) -> Any:
    for part in name.split("."):
        thing = thing[int(part)] if part.isdigit() else getattr(thing, part)
    return thing


@pytest.mark.parametrize(
    ("kind", "where", "name"),
    [(kind, where, n) for (kind, where), names in NAMES.items() for n in names.split()],
)
def test_an_attribute_of_a_model_is_there(kind: str, where: str, name: str) -> None:
    below(below(kinds.model(kind), where), name)


@pytest.mark.parametrize(
    ("module", "name"), [(m, n) for m, names in MODULES.items() for n in names.split()]
)
def test_a_name_of_a_library_is_there(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("function", "name"), [(f, n) for f, names in ARGUMENTS.items() for n in names.split()]
)
def test_an_argument_of_a_library_s_function_is_there(function: str, name: str) -> None:
    head, tail, thing = function, "", None
    while thing is None:
        head, _, last = head.rpartition(".")
        tail = f"{last}.{tail}" if tail else last
        try:
            thing = importlib.import_module(head)
        except ImportError:
            continue
    assert name in inspect.signature(inspect.unwrap(below(thing, tail))).parameters


def test_clip_s_own_tokenizer_has_what_is_taken_from_it() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=77)
    ids = (tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.vocab_size)
    assert ids == (49406, 49407, 49408)
    assert tokenizer.decode([320]).strip() == "a"
    assert tokenizer.clean_fn.__name__ == "_clean_lower"
    assert tokenizer.context_length == 77


SOURCES = Path(clip.__file__).parent

ROOTS = {
    # variable or attribute of ours → where the names taken from it are listed
    "visual": (("clip", "model.visual"), ("siglip2", "model.visual")),
    "trunk": (("pe", "model.visual.trunk"),),
    "vision": (("siglip2-hub", "model.vision_model"),),
    "lm": (("llava", "model"),),
    "projector": (("llava", "model"),),
    "tower": (("llava", "model"),),
    "text": (
        ("siglip2", "model.text"),
        ("siglip2-hub", "model.text_model"),
        ("clip", "model"),
        ("llava", "model"),
    ),
    "pool": (("pe", "model.visual.trunk.attn_pool"),),
    "attention": (("siglip2-hub", "model.vision_model"), ("pe", "model.visual.trunk")),
}

OURS = {"dims", "activation", "tokens", "kernel", "rule", "lm", "get"}
"""Attributes of our towers and of configurations, which some of these names also stand for."""


@pytest.mark.parametrize(
    "file", ["clip.py", "timm_image.py", "open_clip_text.py", "hub_siglip.py", "llava.py"]
)
def test_every_name_that_a_tower_takes_is_listed_here(file: str) -> None:
    taken: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse((SOURCES / file).read_text("utf-8"))):
        if isinstance(node, ast.Attribute):
            root = node.value
            name = root.id if isinstance(root, ast.Name) else getattr(root, "attr", "")
            if name in ROOTS and node.attr not in OURS:
                taken.add((name, node.attr))
    assert taken
    for root, name in sorted(taken):
        listed = {p for where in ROOTS[root] for n in NAMES[where].split() for p in n.split(".")}
        assert name in listed, f"{root}.{name} of {file} is not in the lists of this test"
