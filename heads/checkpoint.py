"""A trained head on disk, rebuilt without its cache: `config.json` and `model.safetensors`.

    config.json         {"format": 1, "method": "tf_local", "config": {…}, "context": {"shapes", "attrs", …}}
    model.safetensors   head/<name> every parameter and buffer · readout/<name> the backbone's frozen readout

The context of a head that runs a side of the backbone also says which one ("backbone", "backbone_name"): its weights
are not saved, and loaded again from there.

The method is stored by its name, never as a Python path, except a user's own dotted module. Nothing is pickled.

    Pretrained(head).push_to_hub("me/tf-local-photos")      Pretrained.from_pretrained("me/tf-local-photos").head
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_builder import FeatureCache
from cache_builder.spec import BackboneSpec
from heads import load_method
from heads.base import Context, Head
from heads.block_names import array_of
from heads.config import parse
from heads.errors import CheckpointMismatch, ConfigError
from heads.source import check_streams

FORMAT = 1
METHODS = "heads.methods."
FILES = ("config.json", "model.safetensors")


def method_name(head: Head) -> str:
    """The method's file name, or the dotted name of a module outside `heads/methods`."""
    return type(head).__module__.removeprefix(METHODS)


def save(head: Head, directory: str | Path) -> Path:
    """Write a head into `directory`, which is made if need be; returns it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    context = head.context
    tensors = {f"head/{name}": value for name, value in head.state_dict().items()}
    tensors |= {f"readout/{name}": value for name, value in context.readout.items()}
    # Cloned, because safetensors refuses tensors that share memory.
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(plain, directory / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(_description(head), indent=2, ensure_ascii=False)
    (directory / "config.json").write_text(f"{text}\n", encoding="utf-8")
    return directory


def load(
    directory: str | Path, device: str | torch.device = "cpu", *, backbone: str | None = None
) -> Head:
    """Rebuild the head saved in `directory`, in evaluation mode.

    Args:
        directory: a run's, or any that `save` wrote.
        device: where it is put.
        backbone: where the backbone lies that the head runs a side of, `family:checkpoint`; None is where it lay
            in training.

    Raises:
        FileNotFoundError: no saved head there.
        CheckpointMismatch: damaged, of a newer format, not of the shapes its method builds today, or its backbone is
            not where it is said to be.
        ConfigError: `backbone` is given for a head that runs none.
    """
    directory, description = Path(directory), describe(directory)
    try:
        tensors = load_file(directory / "model.safetensors")
    except SafetensorError as error:
        raise _damaged(directory, error) from error
    if backbone is not None:
        refuse_unused(description["context"].get("backbone") is not None, description["method"])
        description["context"]["backbone_name"] = backbone
    head = _build(description, _below(tensors, "readout/"))
    state = _below(tensors, "head/")
    _check_state(head, state, directory)
    head.load_state_dict(state)
    return head.to(device).eval()


def describe(directory: str | Path) -> dict[str, Any]:
    """What `config.json` of a saved head says: its method, configuration and context; no tensor is read.

    Raises:
        FileNotFoundError: no saved head there.
        CheckpointMismatch: damaged, or of a newer format.
    """
    directory = Path(directory)
    for name in FILES:
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"no trained head in {directory}: {name} is missing; a run directory is made by `headstart train`"
            )
    try:
        description = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(directory, error) from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        raise CheckpointMismatch(
            f"{directory}/config.json is of checkpoint format {found!r}, and this version reads {FORMAT}; train the "
            "head again, or use the headstart that saved it"
        )
    return description


class Pretrained(ModelHubMixin):
    """A head with `save_pretrained`, `from_pretrained` and `push_to_hub`.

    Around the head and not a base of it: the mixin rebuilds from JSON arguments, and a head's include tensors.
    """

    def __init__(self, head: Head) -> None:
        self.head = head

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self.head, save_directory)

    def generate_model_card(self, *, repo: str = "OWNER/NAME") -> ModelCard:
        """The page beside it; `headstart push` has the run's record too, and says more."""
        from heads.model_card import model_card  # which needs eval, as no checkpoint does

        return model_card(_description(self.head), backbone=self.head.context.backbone, repo=repo)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "Pretrained":
        """From a directory, or a repository of the hub."""
        if Path(model_id).is_dir():
            return cls(load(model_id))
        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        wanted = {name: options[name] for name in known if name in options}
        return cls(load(snapshot_download(model_id, allow_patterns=list(FILES), **wanted)))


def check_cache(head: Head, cache: FeatureCache) -> None:
    """Refuse to score a head on a cache of another backbone than it was trained for.

    Raises:
        MissingStream: the cache lacks a stream the head reads.
        CheckpointMismatch: a stream has another shape, or the readout tensors differ.
    """
    name = method_name(head)
    needs = head.needs(head.config)
    check_streams(cache, needs, name)
    for stream in sorted(needs.queries | needs.candidates):
        if (array := array_of(cache, stream)) not in cache.streams:
            continue  # made of another one
        expected, found = head.context.shapes.get(stream), cache.shape(array)
        if stream.startswith("crop/"):  # how many a picture has is up to the picture
            expected, found = expected and expected[1:], found[1:]
        if expected is not None and tuple(expected) != tuple(found):
            raise CheckpointMismatch(
                f"this {name} was trained on {stream} of shape {tuple(expected)}, but {cache.place} holds "
                f"{tuple(found)}; score it on a cache of the backbone it was trained for"
            )
    mine, theirs = head.context.backbone, cache.spec.backbone
    if needs.live and mine is not None and mine.weights != theirs.weights:
        raise CheckpointMismatch(
            f"this {name} runs {head.context.backbone_name} (weights {mine.weights[:12]}), but {cache.place} was made "
            f"by {theirs.family}:{theirs.checkpoint} (weights {theirs.weights[:12]}); score it on a cache of the "
            "backbone it was trained for"
        )
    readout = {key: torch.from_numpy(value.copy()) for key, value in cache.readout().items()}
    for key in sorted({*readout, *head.context.readout}):
        mine, theirs = head.context.readout.get(key), readout.get(key)
        if mine is None or theirs is None or not torch.equal(mine.cpu(), theirs):
            spec = cache.spec.backbone
            raise CheckpointMismatch(
                f"this {name} was trained with another backbone than {spec.family}:{spec.checkpoint} of {cache.place}: "
                f"readout tensor {key!r} differs; score it on a cache of the backbone it was trained for"
            )


def refuse_unused(runs_one: bool, method: str) -> None:
    """`ConfigError` unless the method runs a backbone, which somebody has pointed to."""
    if not runs_one:
        raise ConfigError(
            f"{method} reads its cache alone and runs no backbone; leave --backbone out"
        )


def _damaged(directory: Path, error: Exception) -> CheckpointMismatch:
    return CheckpointMismatch(
        f"{directory} holds no readable head ({type(error).__name__}: {error}); train it again"
    )


def _description(head: Head) -> dict[str, Any]:
    """What `config.json` says of a head."""
    context = head.context
    return {
        "format": FORMAT,
        "method": method_name(head),
        "config": head.config.model_dump(mode="json"),
        "context": {
            "shapes": {stream: list(shape) for stream, shape in sorted(context.shapes.items())},
            "attrs": list(context.attrs),
            "objs": list(context.objs),
            "tables": {
                name: [list(table.shape), str(table.dtype).removeprefix("torch.")]
                for name, table in sorted(context.tables.items())
            },
            **_backbone_of(head),
        },
    }


def _backbone_of(head: Head) -> dict[str, Any]:
    """What a head with a live side needs to find its backbone again."""
    spec = head.context.backbone
    if spec is None or not head.needs(head.config).live:
        return {}
    return {"backbone": spec.model_dump(mode="json"), "backbone_name": head.context.backbone_name}


def _build(description: Mapping[str, Any], readout: dict[str, Tensor]) -> Head:
    module = load_method(description["method"])
    context = description["context"]
    spec = context.get("backbone")
    return module.Head(
        parse(module.Config, description["config"], "head"),
        Context(
            shapes={stream: tuple(shape) for stream, shape in context["shapes"].items()},
            readout=readout,
            attrs=tuple(context["attrs"]),
            objs=tuple(context["objs"]),
            tables={
                name: torch.zeros(shape, dtype=getattr(torch, dtype))
                for name, (shape, dtype) in context.get("tables", {}).items()
            },
            backbone=None if spec is None else BackboneSpec.model_validate(spec),
            backbone_name=context.get("backbone_name", ""),
        ),
    )


def _check_state(head: Head, state: Mapping[str, Tensor], directory: Path) -> None:
    """Name the first parameter that is missing, unknown, or of another shape or dtype."""
    expected = head.state_dict()
    for name in sorted({*expected, *state}):
        wants, has = (_shape(tensors.get(name)) for tensors in (expected, state))
        if wants != has:
            raise CheckpointMismatch(
                f"parameter {name!r} of {method_name(head)}: expected {wants}, found {has} in {directory}; it was "
                "saved by another version of the method or is damaged"
            )


def _shape(tensor: Tensor | None) -> str:
    if tensor is None:
        return "nothing"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
