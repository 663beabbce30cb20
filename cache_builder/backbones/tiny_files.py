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
) -> None:
    """An open_clip directory with random weights, the same ones every time; the global random state is left alone.

    Args:
        directory: to be created.
        model_class: open_clip's class, called with `model_cfg`.
        model_cfg: the architecture, as in `open_clip_config.json`.
        tokenizer: a transformers tokenizer, saved beside the weights.
    """
    directory.mkdir(parents=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"resize_mode": "shortest"}}
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    tokenizer.save_pretrained(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(**model_cfg)
        for parameter in model.parameters():
            if parameter.ndim <= 1:  # a fresh LayerNorm is the identity, and would hide a mistake
                parameter.data += 0.2 * torch.randn_like(parameter)
    save_file(model.state_dict(), directory / "open_clip_model.safetensors")


def byte_tokenizer(context: int) -> Any:
    """One token per byte, lower-cased: padding 0, bytes 1-256, start 257, end 258.

    The end is the largest id, as CLIP pools at argmax.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, start, end = "<pad>", "<start_of_text>", "<end_of_text>"
    words = [pad, *sorted(pre_tokenizers.ByteLevel.alphabet()), start, end]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 257), (end, 258)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        padding_side="right",
        model_max_length=context,
        model_input_names=["input_ids"],
    )
