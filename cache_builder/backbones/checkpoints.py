"""From what stands after the colon to a loaded open_clip model with its tokenizer and transform. No family itself.

    arch/tag             hub weights of a published tag, or the filled hub cache when offline
    arch/tag@file        weights from the file; transform and activation from open_clip's entry of the tag; no network
    directory            open_clip_config.json (model_cfg, preprocess_cfg), weights, and tokenizer files if it names any

Why so strict: open_clip applies OpenAI's mean and crop to a file without a tag, loads QuickGELU weights with GELU (it
only warns), and resamples positions of another image size; all three cost accuracy and raise no error.
"""

import difflib
import hashlib
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import (
    download_pretrained,
    get_pretrained_cfg,
    list_pretrained_tags_by_model,
)
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, default_bpe
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors import safe_open
from torch import Tensor, nn

from cache_builder.backbones.two_towers import DTYPES
from cache_builder.errors import CacheError, UnknownName

CONVERT = (
    "python -c \"import torch, safetensors.torch as s; m = torch.jit.load('{path}', map_location='cpu').state_dict(); "
    "drop = ('input_resolution', 'context_length', 'vocab_size'); "
    "s.save_file({{k: v.float().contiguous() for k, v in m.items() if k not in drop}}, '{out}')\""
)
"""For OpenAI's TorchScript archives, whose code we do not run."""


class CheckpointError(CacheError, ValueError):
    """A checkpoint cannot be loaded as asked: ambiguous, of another family, damaged, or not obtainable."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A frozen model in evaluation mode, and what belongs to it.

    Attributes:
        name: what was asked for, the same on every machine.
        model: open_clip's `CLIP` or `CustomTextCLIP`, float32; `visual` is its image tower.
        transform: PIL picture → (3, height, width), open_clip's evaluation transform.
        preprocessing: that transform as canonical text.
        tokenizer: texts → ids, padded and cut to the context length.
        tokenizer_text: class, normaliser, context length and vocabulary hash as canonical text.
        weights: sha256 of the loaded tensors.
        architecture: open_clip's configuration, flat.
        versions: release numbers of the libraries that touch pixels, ids or states.
        dtype, device: as asked for.

    """

    name: str
    model: nn.Module
    visual: Any
    transform: Any
    preprocessing: str
    tokenizer: Any
    tokenizer_text: str
    weights: str
    architecture: dict[str, str]
    versions: dict[str, str]
    dtype: str
    device: str


def load_checkpoint(checkpoint: str, family: str, *, dtype: str, device: str) -> Loaded:
    """The model called `checkpoint`, frozen, on `device`.

    Args:
        checkpoint: see the module's first lines.
        family: for messages, e.g. "clip".
        dtype: compute type: "float32", "bfloat16" or "float16".
        device: torch's name of it.

    Raises:
        UnknownName: no such architecture, tag or dtype; names the nearest.
        CheckpointError: anything else that keeps the model from being loaded exactly as asked.
    """
    check_dtype(dtype)
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        name, source, options = (
            path.resolve().name,
            f"local-dir:{path}",
            _read_directory(path, family),
        )
    elif path.is_file() or checkpoint.startswith((".", "/", "~")):
        raise _refused_path(path, family)
    else:
        name, source, options = _resolve_tag(checkpoint, family)
    try:
        model = open_clip.create_model(source, **options)
        tokenizer = open_clip.get_tokenizer(source)
    except (
        Exception
    ) as error:  # open_clip, torch, safetensors and transformers each raise their own
        raise CheckpointError(
            f"{family}:{checkpoint} could not be loaded: {first_line(error)}"
        ) from error
    model.eval().requires_grad_(False)
    visual: Any = model.visual
    config = PreprocessCfg(**visual.preprocess_cfg)
    also = ["transformers"] if isinstance(tokenizer, HFTokenizer) else []
    also += ["timm"] if hasattr(visual, "trunk") else []
    check_finite(model, f"{family}:{checkpoint}")
    return Loaded(
        name=name,
        weights=weights_digest(model),
        architecture=flat(architecture(checkpoint) or {}),
        model=model.to(device),
        visual=visual,
        transform=image_transform_v2(config, is_train=False),
        preprocessing=f"open_clip image_transform_v2 {json.dumps(vars(config), sort_keys=True)}",
        tokenizer=tokenizer,
        tokenizer_text=describe_tokenizer(tokenizer),
        versions=releases("torch", "torchvision", "open_clip_torch", "pillow", *also),
        dtype=dtype,
        device=device,
    )


def architecture(checkpoint: str) -> Mapping[str, Any] | None:
    """open_clip's configuration of what `checkpoint` names, without loading weights; None if it names nothing."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        return _model_cfg(path)
    return open_clip.get_model_config(_split(checkpoint)[0])


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files that hold a vocabulary; one is enough."""

UNSEEN = frozenset(
    [
        "quick_gelu",
        "hidden_act",
        "projector_hidden_act",
        "hf_tokenizer_name",
        "tokenizer_kwargs",
        "vision_feature_layer",
        "attn_implementation",
        "_attn_implementation",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "architectures",
        "id2label",
        "label2id",
        "initializer_range",
        "initializer_factor",
        "return_dict",
        "output_hidden_states",
        "problem_type",
        "output_attentions",
        "use_cache",
        "chunk_size_feed_forward",
        "timm_model_pretrained",
    ]
)
"""Keys of configurations that `flat` leaves out: another field of a spec has them, or no number depends on them."""


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """A nested configuration with dotted keys and values as JSON, without what is None or `UNSEEN`."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if key in UNSEEN or value is None:
            continue
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = json.dumps(value, sort_keys=True)
    return found


def check_dtype(dtype: str) -> None:
    """`UnknownName` unless it is a compute type."""
    if dtype not in DTYPES:
        raise UnknownName(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")


def check_finite(model: nn.Module, name: str) -> None:
    """`CheckpointError` that names the first tensor with a NaN or an infinity: a damaged file, or a failed training."""
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{name}: tensor {key} holds values that are not finite; fetch the weights again"
            )


def weights_digest(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor of the state, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe_tokenizer(tokenizer: Any) -> str:
    """Class, normaliser, context length and vocabulary hash: what decides the ids of a string."""
    clean = tokenizer.clean_fn.__name__.removeprefix("_clean_")
    cut = "right"
    if isinstance(tokenizer, SimpleTokenizer):
        if tokenizer.reduction_fn is not None:
            raise CheckpointError(
                "the tokenizer's reduction_mask leaves out words at random, so no two passes over a text agree; remove "
                "it from tokenizer_kwargs"
            )
        digest = hashlib.sha256(Path(default_bpe()).read_bytes()).hexdigest()
    elif isinstance(tokenizer, HFTokenizer):
        digest, cut = vocabulary_digest(tokenizer.tokenizer), tokenizer.tokenizer.truncation_side
    else:
        raise CheckpointError(f"tokenizer {type(tokenizer).__name__} cannot be described")
    return (
        f"{type(tokenizer).__name__} clean={clean} context={tokenizer.context_length} cut={cut} "
        f"sha256={digest}"
    )


def vocabulary_digest(tokenizer: Any) -> str:
    """sha256 of a transformers tokenizer without padding and truncation, which each call sets."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    rest = {k: v for k, v in whole.items() if k not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def releases(*packages: str) -> dict[str, str]:
    """Public release numbers; a local suffix such as +cu128 is cut, as it names a build and not a version."""
    return {package: version(package).partition("+")[0] for package in packages}


def _split(checkpoint: str) -> tuple[str, str, str]:
    """Architecture, tag and file of `arch/tag@file`; open_clip writes a slash in an architecture as a dash."""
    head, _, file = checkpoint.partition("@")
    arch, _, tag = head.rpartition("/")
    return arch.replace("/", "-"), tag, file


def _resolve_tag(checkpoint: str, family: str) -> tuple[str, str, dict[str, Any]]:
    """Name, architecture and `create_model` arguments of `arch/tag` or `arch/tag@file`."""
    arch, tag, file = _split(checkpoint)
    known = open_clip.list_models()
    if arch not in known:
        asked = arch or tag
        tags = list_pretrained_tags_by_model(asked)
        if asked in known:
            raise UnknownName(
                f"{family}:{checkpoint} names no weights; add a tag, {family}:{asked}/{tags[0] if tags else 'TAG'} "
                f"(known: {', '.join(tags) or 'none'})"
            )
        near = difflib.get_close_matches(
            f"{arch}-{tag}" if arch else tag, [*known, "demo"], n=3, cutoff=0.5
        )
        raise UnknownName(
            f"{family}:{checkpoint} is neither a directory nor an open_clip architecture with a tag: no architecture "
            f"{asked!r}; nearest: {', '.join(near) or 'none'}"
        )
    entry = get_pretrained_cfg(arch, tag)
    if not entry:
        tags = list_pretrained_tags_by_model(arch)
        near = difflib.get_close_matches(tag, tags, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownName(f"{arch} has no tag {tag!r}{hint} (known: {', '.join(tags) or 'none'})")
    config = open_clip.get_model_config(arch) or {}
    if config.get("quick_gelu", False) and not entry.get("quick_gelu", False):
        raise CheckpointError(
            f"{family}:{checkpoint}: {arch} computes QuickGELU but {tag!r} was trained with GELU; ask for "
            f"{arch.removesuffix('-quickgelu')}/{tag}"
        )
    weights = Path(file).expanduser() if file else _download(arch, tag, entry, family)
    if not weights.is_file():
        raise CheckpointError(f"{family}:{checkpoint}: there is no weights file {weights}")
    _check_weights(weights, config)
    options = {
        "pretrained": str(weights),
        "force_quick_gelu": entry.get("quick_gelu", False),
        "force_preprocess_cfg": {
            k: entry[k] for k in ("mean", "std", "interpolation", "resize_mode") if k in entry
        },
    }
    return f"{arch}/{tag}", arch, options


def _download(arch: str, tag: str, entry: Mapping[str, Any], family: str) -> Path:
    """The file of a published tag, from the hub or its local cache."""
    try:
        return Path(download_pretrained(dict(entry)))
    except Exception as error:  # requests, hub and OS errors
        place = entry.get("hf_hub") or entry.get("url")
        raise CheckpointError(
            f"the weights of {family}:{arch}/{tag} ({place}) are not in the local cache and could not be downloaded; "
            f"give a file with {family}:{arch}/{tag}@FILE, or a directory with {family}:DIRECTORY"
        ) from error


def _check_weights(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse TorchScript, and positions that open_clip would silently resample to another size."""
    if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                out = path.with_suffix(".safetensors")
                raise CheckpointError(
                    f"{path} is a TorchScript archive, which is code; convert it with: "
                    + CONVERT.format(path=path, out=out)
                )
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    expected = {
        "positional_embedding": text.get("context_length", 77),
        "text.positional_embedding": text.get("context_length", 77),
    }
    if "patch_size" in vision and not isinstance(vision.get("image_size"), list):
        patches = (vision["image_size"] // vision["patch_size"]) ** 2
        expected["visual.positional_embedding"] = patches + 1  # timm's trunks are loaded strictly
    shapes = _shapes_of(path)
    for name, rows in expected.items():
        if name in shapes and shapes[name][:1] != (rows,):
            raise CheckpointError(
                f"{path}: {name} has {shapes[name][0]} rows where this architecture has {rows}: "
                "the file belongs to another image size, patch size or context length"
            )
    _check_scalars(path, shapes, has_bias=config.get("init_logit_bias") is not None)


def _check_scalars(path: Path, shapes: Mapping[str, tuple[int, ...]], *, has_bias: bool) -> None:
    """open_clip puts zero where a bias is missing, and stumbles over one too many."""
    if ("logit_bias" in shapes) != has_bias and "logit_scale" in shapes:
        there = "no tensor logit_bias, which" if has_bias else "a tensor logit_bias, which only"
        raise CheckpointError(f"{path} has {there} an architecture with init_logit_bias needs")
    for name in ("logit_scale", "logit_bias"):
        if math.prod(shapes.get(name, ())) != 1:
            raise CheckpointError(f"{path}: {name} has shape {shapes[name]}, but is one number")


def _shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a file; reads its header only."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118 (not a dict)
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # damaged files raise nearly anything
        raise CheckpointError(
            f"{path} is not a readable weights file: {first_line(error)}"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    return {key: tuple(value.shape) for key, value in tensors.items()}


def _model_cfg(directory: Path) -> dict[str, Any] | None:
    try:
        return json.loads((directory / "open_clip_config.json").read_text("utf-8")).get("model_cfg")
    except (OSError, ValueError):
        return None


def _read_directory(path: Path, family: str) -> dict[str, Any]:
    """`create_model` arguments of a directory, once it is known to be complete."""
    file = path / "open_clip_config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        held = sorted(p.name for p in path.iterdir())[:5]
        raise CheckpointError(
            f"{family}:{path} has no open_clip_config.json (it holds {', '.join(held) or 'nothing'}); a directory "
            "needs that file, with model_cfg and preprocess_cfg, and open_clip_model.safetensors beside it"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    missing = [key for key in ("model_cfg", "preprocess_cfg") if not config.get(key)]
    if missing:
        raise CheckpointError(f"{file} lacks {' and '.join(missing)}; open_clip would guess them")
    weights = path / "open_clip_model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{family}:{path} has no {weights.name}, the weights")
    _check_weights(weights, config["model_cfg"])
    if config["model_cfg"].get("text_cfg", {}).get("hf_tokenizer_name"):
        check_tokenizer_files(path, family)
    return {}


def check_tokenizer_files(directory: Path, family: str) -> None:
    """`CheckpointError` unless there is some tokenizer in a directory that needs one of its own."""
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise CheckpointError(
            f"{family}:{directory} has no tokenizer.json; put the tokenizer files of this checkpoint beside its weights"
        )


def _refused_path(path: Path, family: str) -> CheckpointError:
    if not path.exists():
        return CheckpointError(f"{family}:{path}: there is no such directory")
    return CheckpointError(
        f"{family}:{path} is a bare weights file: its activation, mean, std and crop are unknown; name the "
        f"tag it came from, {family}:ARCH/TAG@{path}"
    )


def first_line(error: Exception) -> str:
    """The beginning of a library's message, for one sentence of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__
