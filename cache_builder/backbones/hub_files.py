"""From a directory or hub name in transformers' format to a frozen model, processor and tokenizer. No family itself.

    config.json                 names the class by `model_type`
    model.safetensors           all of its tensors, or several files with an index
    preprocessor_config.json    or processor_config.json: the picture's transform
    tokenizer.json              with tokenizer_config.json

transformers only warns when tensors are missing and then draws them at random; here that is an error.
"""

import difflib
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.utils import logging

from cache_builder.backbones.checkpoints import (
    CheckpointError,
    check_tokenizer_files,
    first_line,
    vocabulary_digest,
)
from cache_builder.errors import UnknownName

HARMLESS = ("position_ids", "rotary_emb.inv_freq", "image_newline")
"""Ends of names that a file may hold besides: buffers that newer classes compute, the row between a LLaVA's tiles."""


def is_hub_directory(path: Path) -> bool:
    """Does a directory hold a checkpoint in transformers' format, and not in open_clip's?"""
    return (path / "config.json").is_file() and not (path / "open_clip_config.json").is_file()


def looks_like_a_hub_name(checkpoint: str) -> bool:
    """`owner/name`, as on the hub, where no open_clip architecture is called `owner`, or nearly so."""
    owner, slash, name = checkpoint.partition("/")
    near = difflib.get_close_matches(owner, open_clip.list_models(), n=1, cutoff=0.8)
    return bool(slash and name) and "/" not in name and not near


def canonical_name(checkpoint: str) -> str:
    """What a spec calls it: a directory by its name alone, so that it may lie anywhere."""
    path = Path(checkpoint).expanduser()
    return path.resolve().name if path.is_dir() else checkpoint


def read_config(checkpoint: str, family: str, model_types: Sequence[str]) -> Any:
    """The configuration of a directory or hub name.

    Raises:
        UnknownName: it cannot be found, neither here nor on the hub.
        CheckpointError: it is of another `model_type` than the family reads.
    """
    path = Path(checkpoint).expanduser()
    local = path.exists() or checkpoint.startswith((".", "/", "~"))
    if path.is_file():
        raise CheckpointError(
            f"{family}:{path} is a bare weights file: name its directory, which also holds config.json and tokenizer"
        )
    if local and not path.is_dir():
        raise CheckpointError(f"{family}:{path}: there is no such directory")
    if local and (path / "open_clip_config.json").is_file():
        raise CheckpointError(
            f"{family}:{path} is in open_clip's format; family {family} reads {' and '.join(model_types)} in "
            "transformers' format here"
        )
    if local and not (path / "config.json").is_file():
        held = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(
            f"{family}:{path} has neither config.json (transformers) nor open_clip_config.json (open_clip); it holds "
            f"{held}"
        )
    try:
        config = AutoConfig.from_pretrained(str(path) if local else checkpoint)
    except Exception as error:  # OSError, ValueError, hub and JSON errors
        if local:
            raise CheckpointError(
                f"{path / 'config.json'} is not understood: {first_line(error)}"
            ) from error
        raise UnknownName(
            f"{family}:{checkpoint} is neither a directory nor in the local hub cache, and could not be fetched from "
            f"the hub ({first_line(error)}){_nearest(checkpoint, family)}"
        ) from error
    if config.model_type not in model_types:
        raise CheckpointError(
            f"{family}:{checkpoint} is a {config.model_type} model; family {family} reads {' and '.join(model_types)} "
            "in transformers' format"
        )
    return config


def load_model(model_class: Any, checkpoint: str, family: str) -> nn.Module:
    """The model in float32, frozen and in evaluation mode, every tensor from the files.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or a file is damaged; names it.
    """
    source = str(Path(checkpoint).expanduser())
    try:
        with silently():
            model, found = model_class.from_pretrained(
                source, dtype="float32", output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # transformers, safetensors, torch and the hub raise their own
        raise CheckpointError(
            f"{family}:{checkpoint} could not be loaded: {first_line(error)}"
        ) from error
    shapes = {
        k: f"{k} has shape {tuple(a)}, not {tuple(b)}" for k, a, b in found["mismatched_keys"]
    }
    missing = {k: f"there is no tensor {k}" for k in found["missing_keys"]}
    extra = {
        k: f"the model has no place for {k}"
        for k in found["unexpected_keys"]
        if not k.endswith(HARMLESS)
    }
    failed = {str(error): first_line(error) for error in map(ValueError, found["error_msgs"])}
    for wrong in (shapes, missing, extra, failed):
        if wrong:
            raise CheckpointError(
                f"{family}:{checkpoint}: the weights do not fit the configuration beside them: "
                f"{_first(wrong)}; transformers would go on, and draw what is missing at random"
            )
    return model.eval().requires_grad_(False)


def _first(wrong: Mapping[str, str]) -> str:
    more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
    return wrong[min(wrong)] + more


def save_model(model: Any, directory: Path) -> None:
    """`save_pretrained`, silently: SigLIP's own default text configuration, with which the model's is compared to write
    only what differs, is warned of, as its begin and end lie outside its vocabulary.
    """
    with silently():
        model.save_pretrained(directory)


@contextmanager
def silently() -> Generator[None]:
    """No bars, the builder has its own; no report of tensors that do not fit, which become one error."""
    shown, before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if shown:
            logging.enable_progress_bar()


def load_processor(checkpoint: str, family: str) -> Any:
    """The image processor, with the torchvision backend that transformers uses where torchvision is installed."""
    return _loaded(AutoImageProcessor, checkpoint, family, "image processor")


def load_tokenizer(checkpoint: str, family: str) -> Any:
    """The tokenizer."""
    directory = Path(checkpoint).expanduser()
    if directory.is_dir():
        check_tokenizer_files(directory, family)
    return _loaded(AutoTokenizer, checkpoint, family, "tokenizer")


def kernels_of(*towers: Any) -> str:
    """The attention kernels that transformers has chosen for loaded towers."""
    return "; ".join(dict.fromkeys(tower.config._attn_implementation for tower in towers))


def describe_processor(processor: Any) -> str:
    """An image processor as canonical text: its class, and every setting that differs from None."""
    fields = {k: v for k, v in processor.to_dict().items() if v is not None}
    skipped = ("image_processor_type", "processor_class", "data_format", "device")
    fields = {k: v for k, v in fields.items() if k not in skipped}
    text = json.dumps(fields, sort_keys=True, default=str)
    return f"transformers {type(processor).__name__} {text}"


def describe_hub_tokenizer(tokenizer: Any, rule: str) -> str:
    """Class, rule and vocabulary hash of a transformers tokenizer: what decides the ids of a string."""
    rule = f"{rule} cut={tokenizer.truncation_side}"
    return f"{type(tokenizer).__name__} {rule} sha256={vocabulary_digest(tokenizer)}"


def _loaded(kind: Any, checkpoint: str, family: str, what: str) -> Any:
    try:
        return kind.from_pretrained(str(Path(checkpoint).expanduser()))
    except Exception as error:
        raise CheckpointError(
            f"{family}:{checkpoint}: its {what} could not be loaded: {first_line(error)}; the directory needs the "
            "files that were published with it"
        ) from error


def _nearest(checkpoint: str, family: str) -> str:
    from importlib import import_module

    known = import_module(f"cache_builder.backbones.{family}").PUBLISHED
    near = difflib.get_close_matches(checkpoint, list(known), n=3, cutoff=0.4)
    return f"; nearest: {', '.join(near)}" if near else ""
