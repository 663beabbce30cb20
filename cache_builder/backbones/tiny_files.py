"""What the families' `tiny()` write: a random-weight model and a tokenizer made in memory. No family itself."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


def write_tiny(
    directory: Path,
    model_class: Callable[..., nn.Module],
    model_cfg: Mapping[str, Any],
    tokenizer: Any,
    preprocess: Mapping[str, Any] | None = None,
) -> None:
    """An open_clip directory with random weights, the same ones every time; the global random state is left alone.

    Args:
        directory: to be created.
        model_class: open_clip's class, called with `model_cfg`.
        model_cfg: the architecture, as in `open_clip_config.json`.
        tokenizer: a transformers tokenizer, saved beside the weights.
        preprocess: as in `open_clip_config.json`; CLIP's mean, std and crop by default.
    """
    directory.mkdir(parents=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess or {"resize_mode": "shortest"}}
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    tokenizer.save_pretrained(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(**{k: v for k, v in model_cfg.items() if k != "custom_text"})
        perturb(model)
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")


def perturb(model: nn.Module) -> None:
    """Move every vector and scalar from where it starts: a fresh LayerNorm is the identity and would hide a mistake."""
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            parameter.data += 0.2 * torch.randn_like(parameter)


def clip_tokenizer(context: int) -> Any:
    """One token per byte, lower-cased: padding 0, bytes 1-256, start 257, end 258, the largest: pooled at argmax."""
    return _byte_tokenizer(context, [PAD], [START, END], f"{START} $A {END}")


def gemma_tokenizer(context: int) -> Any:
    """One token per byte, lower-cased: padding 0, end 1, no begin, bytes from 4."""
    return _byte_tokenizer(context, [PAD, END, START, "<unk>"], [], f"$A {END}")


def llama_tokenizer(context: int) -> Any:
    """One token per byte: padding 0, begin 1, end 2, `<image>` 3, bytes from 4; begin before a text, no end."""
    specials = [PAD, START, END, IMAGE]
    made = _byte_tokenizer(context, specials, [], f"{START} $A", ("input_ids", "attention_mask"))
    made.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return made


PAD, START, END, IMAGE = "<pad>", "<start_of_text>", "<end_of_text>", "<image>"


def _byte_tokenizer(
    context: int,
    before: list[str],
    after: list[str],
    template: str,
    names: tuple[str, ...] = ("input_ids",),
) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*before, *sorted(pre_tokenizers.ByteLevel.alphabet()), *after]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    used = [(t, words.index(t)) for t in template.split() if t != "$A"]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        padding_side="right",
        model_max_length=context,
        model_input_names=list(names),
    )
