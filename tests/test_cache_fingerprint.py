"""A fingerprint: the same files give the same one wherever they lie; anything that could change a number changes it.

Each change is made to a copy of a model's own files, or to how it is loaded; a cache of the model as it was is then
refused with exactly the field that changed.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kinds
import pytest
from kinds import HUB, KINDS, LLAVA, OPEN_CLIP
from safetensors.torch import load_file, save_file
from timm.layers.config import set_fused_attn as fused_attention

from cache_builder import FeatureCache, build
from cache_builder.backbones import checkpoints
from cache_builder.backbones.two_towers import TwoTowers
from cache_builder.datasets.base import Dataset, ImageRecord, Tasks, TextRecord
from cache_builder.errors import CacheMismatch
from cache_builder.request import cache_spec

Change = Callable[[Path], None]

DATA = Dataset(
    name="one",
    images=(ImageRecord("i", lambda: kinds.pictures()[0]),),
    texts=(TextRecord("t", "a red mug"),),
    tasks=Tasks(),
    decode="as made",
    counts={},
    root="nowhere",
)


def edit(name: str, *path: str, value: Any) -> Change:
    """Sets one key of a JSON file."""

    def change(directory: Path) -> None:
        config = json.loads((directory / name).read_text())
        inner = config
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
        (directory / name).write_text(json.dumps(config))

    return change


def swap_two_words(directory: Path) -> None:
    """In the vocabulary: as many words as before, of the same names."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["r"], words["d"] = words["d"], words["r"]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


def move_one_weight(directory: Path) -> None:
    (file,) = directory.glob("*.safetensors")
    state = load_file(file)
    name = next(n for n in sorted(state) if n.endswith("mlp.c_fc.bias") or n.endswith("fc1.bias"))
    state[name][0] += 1e-6
    save_file(state, file, {"format": "pt"})


def open_clip_changes(kind: str) -> dict[str, tuple[str, Change]]:
    file = "open_clip_config.json"
    mode = "squash" if kind.startswith("clip") else "longest"
    clean = "whitespace" if kind == "siglip2" else "canonicalize"
    other = "bilinear" if kind in ("clip", "clip-eos", "siglip2") else "bicubic"
    causal = kind not in kinds.WHOLE
    found = {
        "mean": ("preprocessing", edit(file, "preprocess_cfg", "mean", value=[0.4, 0.5, 0.5])),
        "std": ("preprocessing", edit(file, "preprocess_cfg", "std", value=[0.4, 0.5, 0.5])),
        "resize mode": ("preprocessing", edit(file, "preprocess_cfg", "resize_mode", value=mode)),
        "filter": ("preprocessing", edit(file, "preprocess_cfg", "interpolation", value=other)),
        "normaliser": (
            "tokenizer",
            edit(file, "model_cfg", "text_cfg", "tokenizer_kwargs", "clean", value=clean),
        ),
        "heads": (
            "architecture.text_cfg.heads",
            edit(file, "model_cfg", "text_cfg", "heads", value=8),
        ),
        "mask": (
            "architecture.text_cfg.no_causal_mask",
            edit(file, "model_cfg", "text_cfg", "no_causal_mask", value=causal),
        ),
    }
    if kind == "clip":
        found["activation"] = ("activation", edit(file, "model_cfg", "quick_gelu", value=False))
    return found


def hub_changes(kind: str) -> dict[str, tuple[str, Change]]:
    pixels = ("processor_config.json", "image_processor") if kind == "llava" else ()
    file, *inside = pixels or ("preprocessor_config.json",)
    found = {
        "mean": ("preprocessing", edit(file, *inside, "image_mean", value=[0.4, 0.5, 0.5])),
        "filter": ("preprocessing", edit(file, *inside, "resample", value=0)),
        "scale": ("preprocessing", edit(file, *inside, "rescale_factor", value=1 / 256)),
        "normaliser": ("tokenizer", edit("tokenizer.json", "normalizer", value=None)),
        "heads": (
            "architecture.vision_config.num_attention_heads",
            edit("config.json", "vision_config", "num_attention_heads", value=8),
        ),
        "eps": (
            "architecture.text_config." + ("layer_norm_eps" if kind in HUB else "rms_norm_eps"),
            edit(
                "config.json",
                "text_config",
                "layer_norm_eps" if kind in HUB else "rms_norm_eps",
                value=1e-4,
            ),
        ),
        "activation": (
            "activation",
            edit("config.json", "vision_config", "hidden_act", value="relu"),
        ),
        "kernel": ("compute", edit("config.json", "attn_implementation", value="eager")),
    }
    if kind == "siglip2-naflex":  # Siglip2Tokenizer sets its own, whatever the file says
        del found["normaliser"]
    if kind in LLAVA:
        found["layer"] = ("layer", edit("config.json", "vision_feature_layer", value=1))
        found["rotary"] = (
            "architecture.text_config.rope_parameters.rope_theta",
            edit("config.json", "text_config", "rope_parameters", "rope_theta", value=500.0),
        )
    return found


def changes(kind: str) -> dict[str, tuple[str, Change]]:
    """Name → the only field that may differ, and what is done to the files."""
    both = {"weights": ("weights", move_one_weight), "vocabulary": ("tokenizer", swap_two_words)}
    return both | (open_clip_changes(kind) if kind in OPEN_CLIP else hub_changes(kind))


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    return {kind: kinds.directory(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def caches(made: dict[str, Path], fast_folder: Path) -> dict[str, FeatureCache]:
    """A cache of every kind, as small as can be."""
    return {
        kind: build(
            DATA,
            kinds.load(kind, directory),
            fast_folder / f"fingerprint-{kind}.zarr",
            streams=["image/patches"],
            progress=False,
        )
        for kind, directory in made.items()
    }


def fields_refused(cache: FeatureCache, model: TwoTowers) -> list[str]:
    """What opening the cache for this model complains of."""
    expected = cache_spec(DATA, model, streams=["image/patches"])
    assert expected.fingerprint() != cache.fingerprint
    with pytest.raises(CacheMismatch) as caught:
        FeatureCache.open(cache.path, expected=expected)
    return re.findall(r"backbone\.([\w.]+): expected", str(caught.value))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_files_from_two_places_are_the_same_backbone(
    kind: str, made: dict[str, Path], caches: dict[str, FeatureCache], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "deeper" / "tiny"
    shutil.copytree(made[kind], elsewhere)
    model = kinds.load(kind, elsewhere)
    assert model.spec == kinds.load(kind, made[kind]).spec
    expected = cache_spec(DATA, model, streams=["image/patches"])
    opened = FeatureCache.open(caches[kind].path, expected=expected)
    assert opened.fingerprint == expected.fingerprint()
    assert str(tmp_path) not in model.spec.canonical()


@pytest.mark.parametrize(
    ("kind", "what"), [(kind, what) for kind in KINDS for what in changes(kind)]
)
def test_one_change_of_the_files_is_refused_by_its_field(
    kind: str,
    what: str,
    made: dict[str, Path],
    caches: dict[str, FeatureCache],
    tmp_path: Path,
) -> None:
    field, change = changes(kind)[what]
    shutil.copytree(made[kind], tmp_path / "tiny")
    change(tmp_path / "tiny")
    expected = [field, "dims.image_blocks"] if what == "layer" else [field]  # fewer are run
    assert fields_refused(caches[kind], kinds.load(kind, tmp_path / "tiny")) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"compiled": True}])
def test_how_it_computes_is_refused_by_its_field(
    kind: str, given: dict[str, Any], made: dict[str, Path], caches: dict[str, FeatureCache]
) -> None:
    assert fields_refused(caches[kind], kinds.load(kind, made[kind], **given)) == ["compute"]


@pytest.mark.parametrize("kind", ["pe", "pe-bare", "siglip2", "clip-mobile"])
def test_timm_s_other_attention_is_refused_by_its_field(
    kind: str, made: dict[str, Path], caches: dict[str, FeatureCache]
) -> None:
    """TIMM_FUSED_ATTN=0 asks for it."""
    fused_attention(False)
    try:
        model = kinds.load(kind, made[kind])
    finally:
        fused_attention(True)
    assert model.spec.compute == "float32, eager; nn.MultiheadAttention"
    assert fields_refused(caches[kind], model) == ["compute"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_release_of_a_library_is_refused_by_its_name(
    kind: str,
    made: dict[str, Path],
    caches: dict[str, FeatureCache],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = caches[kind].spec.backbone.versions
    expected = {"torch", "torchvision", "pillow"}
    expected |= {"open_clip_torch"} if kind in OPEN_CLIP else {"transformers", "tokenizers"}
    assert known.keys() >= expected
    assert ("timm" in known) == (kind in ("pe", "pe-bare", "siglip2", "clip-mobile"))
    true = checkpoints.version
    for library in known:
        monkeypatch.setattr(checkpoints, "version", lambda n, x=library: "0" if n == x else true(n))
        model = kinds.load(kind, made[kind])
        assert fields_refused(caches[kind], model) == [f"versions.{library}"]


@pytest.mark.parametrize("kind", ["llava"])
def test_options_of_llava_show_in_its_name_and_in_what_they_change(
    kind: str, made: dict[str, Path], caches: dict[str, FeatureCache]
) -> None:
    cropped = kinds.load(kind, Path(f"{made[kind]}@crop"))
    assert cropped.spec.checkpoint.endswith("@crop")
    assert fields_refused(caches[kind], cropped) == ["preprocessing"]
    a, b = (
        kinds.load(kind, Path(f"{made[kind]}@{o}")).spec for o in ("crop,vision", "vision,crop")
    )
    assert a == b


@pytest.mark.parametrize("kind", ["siglip2-naflex"])
def test_the_most_patches_of_a_picture_are_part_of_it(
    kind: str, made: dict[str, Path], caches: dict[str, FeatureCache], tmp_path: Path
) -> None:
    shutil.copytree(made[kind], tmp_path / "tiny")
    edit("preprocessor_config.json", "max_num_patches", value=16)(tmp_path / "tiny")
    model = kinds.load(kind, tmp_path / "tiny")
    assert model.preprocess(kinds.pictures()[0])["pixels"].shape[0] == 16
    assert fields_refused(caches[kind], model) == ["preprocessing", "dims.most_patches"]
