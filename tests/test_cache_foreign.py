"""Somebody else's features become a cache: joined by id, every number as given, refusals name file, array, row."""

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in import dataset

from cache_builder import FeatureCache, load_dataset
from cache_builder.cli import main
from cache_builder.datasets import folder
from cache_builder.errors import BadInput, CacheMismatch
from cache_builder.feature_files import ForeignError
from cache_builder.foreign import import_features
from cache_builder.hdf5 import export_hdf5, import_hdf5

RNG = np.random.default_rng(0)
IDS = [f"i{i}" for i in range(13)]
TEXTS = [t.text for t in dataset().texts]
ARRAYS: dict[str, np.ndarray] = {
    "ids": np.array(IDS),
    "feats": RNG.normal(size=(13, 7)).astype("f4"),
    "grid": RNG.normal(size=(13, 2, 3, 4)).astype("f4"),
    "cls": RNG.normal(size=(13, 1, 4)).astype("f4"),
    "strings": np.array(TEXTS),
    "text_feats": RNG.normal(size=(9, 7)).astype("f4"),
    "tokens": RNG.normal(size=(9, 5, 3)).astype("f4"),
    "mask": np.arange(5) < RNG.integers(1, 6, (9, 1)),
}
IMAGE = '[image]\nfile = "{file}"\nids = "ids"\npooled = "feats"\n'
TEXT = '[text]\nfile = "{file}"\nstrings = "strings"\npooled = "text_feats"\n'
BACKBONE = '[backbone]\nname = "theirs"\n'


def save(file: Path, arrays: dict[str, Any]) -> None:
    if file.suffix == ".npz":
        np.savez_compressed(file, allow_pickle=False, **arrays)
        return
    with h5py.File(file, "w") as h5:
        for name, values in arrays.items():
            text = np.asarray(values).dtype.kind == "U"
            h5.create_dataset(name, data=[str(v) for v in values] if text else values)


def wanted(
    folder: Path, text: str = BACKBONE + IMAGE + TEXT, file: str = "f.npz", **change: Any
) -> Path:
    """A mapping in `folder` beside a file of all arrays."""
    arrays = {**ARRAYS, **change}
    save(folder / file, {k: v for k, v in arrays.items() if v is not None})
    (folder / "map.toml").write_text(text.replace("{file}", file))
    return folder / "map.toml"


@pytest.mark.parametrize("file", ["f.npz", "f.h5"])
def test_every_number_lies_under_its_id(fast_path: Path, file: str) -> None:
    more = 'patches = "grid"\nlayout = "n h w c"\nprefix = "cls"\n'
    text = BACKBONE + IMAGE + more + TEXT + 'tokens = "tokens"\nmask = "mask"\n'
    cache = import_features(wanted(fast_path, text, file), fast_path / "c.zarr", dataset=dataset())
    assert cache.verify().ok
    rows = cache.rows("image", IDS)
    np.testing.assert_array_equal(cache.read("image/pooled", rows), ARRAYS["feats"])
    np.testing.assert_array_equal(
        cache.read("image/patches", rows), ARRAYS["grid"].reshape(13, 6, 4)
    )
    np.testing.assert_array_equal(cache.read("image/prefix", rows), ARRAYS["cls"])
    np.testing.assert_array_equal(cache.read("text/pooled"), ARRAYS["text_feats"])
    values, offsets = cache.read_ragged("text/tokens")
    np.testing.assert_array_equal(np.diff(offsets), ARRAYS["mask"].sum(1))
    np.testing.assert_array_equal(values, ARRAYS["tokens"][ARRAYS["mask"]])
    assert (cache.texts, cache.tasks) == (TEXTS, dataset().tasks)
    assert cache.spec.backbone.family == "foreign"
    assert cache.spec.backbone.dims == {
        "joint": 7,
        "patches": 6,
        "image_width": 4,
        "prefix": 1,
        "text_width": 3,
        "context": int(ARRAYS["mask"].sum(1).max()),
    }
    assert sorted(p.name for p in fast_path.iterdir()) == ["c.zarr", file, "map.toml"]


def test_all_kinds_of_files_give_the_same_numbers(fast_path: Path) -> None:
    for name in ("feats", "text_feats"):
        np.save(fast_path / f"{name}.npy", ARRAYS[name])
    np.save(fast_path / "fortran.npy", np.asfortranarray(ARRAYS["feats"]))
    (fast_path / "ids.txt").write_text("\n".join(IDS) + "\n")
    loose = (
        f'{BACKBONE}[image]\nids = "ids.txt"\npooled = "feats.npy"\n'
        f'[text]\nstrings = {json.dumps(TEXTS)}\npooled = "text_feats.npy"\n'
    )
    texts = {
        "npz": (BACKBONE + IMAGE + TEXT, "f.npz"),
        "h5": (BACKBONE + IMAGE + TEXT, "f.h5"),
        "npy": (loose, "f.h5"),
        "fortran": (loose.replace('"feats.npy"', '"fortran.npy"'), "f.h5"),
    }
    made = {
        name: import_features(wanted(fast_path, *args), fast_path / name, dataset=dataset())
        for name, args in texts.items()
    }
    assert len({cache.digest() for cache in made.values()}) == 1


def test_features_of_a_real_backbone_train_the_same_heads(
    fast_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features of a cache, written as a stranger would, score exactly as the cache itself."""
    from heads.cli import main as headstart

    root = folder.miniature(fast_path / "photos")
    given = ["--dataset", "folder", "--root", str(root)]
    built = fast_path / "built.zarr"
    command = ["build", "--backbone", "clip:demo", *given, "--out", str(built)]
    assert main([*command, "--streams", "image/pooled", "text/pooled"]) == 0
    cache = FeatureCache.open(built)
    data = load_dataset("folder", root)
    strings = list(dict.fromkeys(t.text for t in data.texts))
    by_string = {t.text: t.id for t in data.texts}
    scale = float(np.exp(cache.readout()["logit_scale"]))
    arrays = {
        "ids": np.array(cache.image_ids),
        "feats": cache.read("image/pooled"),
        "strings": np.array(strings),
        "text_feats": cache.read(
            "text/pooled", cache.rows("text", [by_string[s] for s in strings])
        ),
    }
    text = f"{BACKBONE}logit_scale = {scale!r}\n{IMAGE}{TEXT}"
    save(fast_path / "f.h5", arrays)
    mapping = fast_path / "map.toml"
    mapping.write_text(text.replace("{file}", "f.h5"))
    out = fast_path / "theirs.zarr"
    assert headstart(["import", str(mapping), *given, "--out", str(out)]) == 0
    assert "images without features  0" in capsys.readouterr().out
    tables = []
    for source in (built, out):
        for method in ("zero_shot", "linear_probe"):
            run = fast_path / f"{source.stem}-{method}"
            task = [] if len(cache.tasks.kinds) == 1 else ["--task", "czsl"]
            assert (
                headstart(["train", method, "--cache", str(source), *task, "--out", str(run)]) == 0
            )
            assert headstart(["score", str(run), "--split", "test"]) == 0
            capsys.readouterr()
            assert headstart(["metrics", str(run / "scores-test.zarr")]) == 0
            tables.append(capsys.readouterr().out.replace(str(run), ""))
    assert tables[:2] == tables[2:]


def test_pictures_without_features_are_in_quarantine_and_the_rest_is_reported(
    fast_path: Path,
) -> None:
    ids = ["i0", "i1", "zebra", *IDS[3:]]
    cache = import_features(
        wanted(fast_path, ids=np.array(ids)), fast_path / "c.zarr", dataset=dataset()
    )
    assert cache.quarantined == {"i2": "has no features in the file"}
    assert np.isnan(cache.read("image/pooled")[cache.image_ids.index("i2")]).all()
    assert cache.header.counts["images without features"] == "1 ('i2')"
    assert cache.header.counts["image features unused"] == "1 ('zebra')"
    assert cache.verify().ok
    others = wanted(fast_path, ids=np.array([f"{i}.jpg" for i in IDS]))
    with pytest.raises(BadInput, match=r"ids like 'i0', the file like 'i0\.jpg'"):
        import_features(others, fast_path / "d.zarr", dataset=dataset())
    assert not (fast_path / "d.zarr").exists()


def test_equal_strings_of_a_file_keep_their_own_rows(fast_path: Path) -> None:
    strings = np.array(["same", "same", *TEXTS[2:]])
    cache = import_features(wanted(fast_path, strings=strings), fast_path / "c.zarr")
    np.testing.assert_array_equal(cache.read("text/pooled"), ARRAYS["text_feats"])


def test_without_a_data_set_the_rows_are_kept_under_their_ids(fast_path: Path) -> None:
    cache = import_features(wanted(fast_path, ids=np.arange(100, 113)), fast_path / "c.zarr")
    assert sorted(cache.image_ids) == [str(i) for i in range(100, 113)]
    assert cache.text_ids == [str(i) for i in range(9)]
    assert cache.texts == TEXTS
    assert cache.tasks.kinds == ()
    assert cache.spec.dataset.name == "none"
    rows = cache.rows("image", ["100", "112"])
    np.testing.assert_array_equal(cache.read("image/pooled", rows), ARRAYS["feats"][[0, 12]])


@pytest.mark.parametrize(
    "change",
    [
        {"feats": ARRAYS["feats"] + np.float32(1e-3)},
        {"feats": ARRAYS["feats"].astype("f8")},
        {"ids": np.array(IDS[::-1])},
        {"text_feats": ARRAYS["text_feats"][::-1]},
    ],
    ids=["value", "type", "ids", "texts"],
)
def test_other_features_are_another_fingerprint(fast_path: Path, change: dict[str, Any]) -> None:
    first = import_features(wanted(fast_path), fast_path / "c.zarr", dataset=dataset())
    again = import_features(wanted(fast_path), fast_path / "c.zarr", dataset=dataset())
    assert again.digest() == first.digest()
    mapping = wanted(fast_path, **change)
    with pytest.raises(CacheMismatch, match=r"backbone\.weights: expected"):
        import_features(mapping, fast_path / "c.zarr", dataset=dataset())
    other = import_features(mapping, fast_path / "d.zarr", dataset=dataset())
    assert other.fingerprint != first.fingerprint


def put(key: str, row: int, value: float) -> dict[str, np.ndarray]:
    changed = ARRAYS[key].copy()
    changed[row].flat[1] = value
    return {key: changed}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "nan": (
        "",
        put("feats", 4, np.nan),
        r"f\.npz: feats: row 4 \('i4'\) holds a value that is not finite",
    ),
    "inf": ("", put("text_feats", 2, np.inf), r"f\.npz: text_feats: row 2 .* not finite"),
    "too large for fp16": ('store = "fp16"\n', put("feats", 5, 1e5), r"row 5 .* beyond float16"),
    "not of length 1": (
        BACKBONE + "normalised = true\n" + IMAGE,
        {},
        r"feats: row 0 \('i0'\) has length [\d.]+, but the mapping says normalised",
    ),
    "twice": ("", {"ids": np.array(["i0", *IDS[:12]])}, r"'i0' in the rows 0 and 1"),
    "empty id": ("", {"ids": np.array(["", *IDS[1:]])}, "row 0 is empty"),
    "too few": ("", {"feats": ARRAYS["feats"][:9]}, r"feats has 9 rows, but there are 13 ids"),
    "axes": ("", {"feats": ARRAYS["grid"]}, r"shape \(13, 2, 3, 4\), but 2 axes are expected"),
    "whole numbers": ("", {"feats": np.ones((13, 7), int)}, "feats is int64; features are float16"),
    "text ids": ("", {"ids": ARRAYS["feats"]}, "not one string or whole number a row"),
    "other space": ("", {"text_feats": np.ones((9, 6), "f4")}, "joint 6, but .* has 7"),
    "no array": ("", {"feats": None}, r"holds no array 'feats' \(it holds: ids"),
    "texts missing": (
        "",
        {"strings": np.array(["other", *TEXTS[1:]])},
        "1 of the 9 texts of stand_in",
    ),
    "no key": (
        BACKBONE + IMAGE.replace("pooled", "poled"),
        {},
        "image.poled; did you mean image.pooled",
    ),
    "no table": (BACKBONE + IMAGE.replace("[image]", "[imagge]"), {}, "imagge; did you mean image"),
    "no name": ("[backbone]\n" + IMAGE, {}, "backbone.name: field required"),
    "type of key": (
        BACKBONE + "normalised = 1\n" + IMAGE,
        {},
        "backbone.normalised: input should be a",
    ),
    "not toml": ("[backbone", {}, "is not TOML"),
    "nothing": (BACKBONE + '[image]\nids = ["a"]\n', {}, "names no features"),
    "no file": (BACKBONE + IMAGE.replace("{file}", "g.npz"), {}, r"g\.npz does not exist"),
    "file unnamed": (BACKBONE + '[image]\nids = ["a"]\npooled = "x"\n', {}, "is in no file"),
    "layout": (
        BACKBONE + IMAGE + 'patches = "grid"\nlayout = "n w h w"\n',
        {},
        "image.layout: input",
    ),
    "tokens alone": (
        BACKBONE + TEXT + 'tokens = "tokens"\n',
        {},
        "text.tokens comes with text.offsets",
    ),
    "mask": (
        BACKBONE + TEXT + 'tokens = "tokens"\nmask = "feats"\n',
        {},
        "a mask of .* holds 0 and 1",
    ),
    "offsets": (
        BACKBONE + TEXT + 'tokens = "cls2"\noffsets = "off"\n',
        {"cls2": np.ones((9, 3), "f4"), "off": np.arange(10)[::-1]},
        "must rise from 0 to the 9 rows",
    ),
    "no token": (
        BACKBONE + TEXT + 'tokens = "tokens"\nmask = "none"\n',
        {"none": np.zeros((9, 5), bool)},
        "row 0 .* has no token",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_named(fast_path: Path, case: str) -> None:
    text, change, message = REFUSED[case]
    text = text if "[backbone" in text else text + BACKBONE + IMAGE + TEXT
    mapping = wanted(fast_path, text, **change)
    with pytest.raises(ForeignError, match=message) as info:
        import_features(mapping, fast_path / "c.zarr", dataset=dataset())
    assert len(str(info.value).splitlines()) == 1
    assert not (fast_path / "c.zarr").exists()


def test_a_text_of_another_string_is_refused(fast_path: Path) -> None:
    text = BACKBONE + TEXT + 'ids = "tids"\n'
    change: dict[str, Any] = {"tids": np.array([f"t{i}" for i in range(9)])}
    made = import_features(
        wanted(fast_path, text, **change), fast_path / "c.zarr", dataset=dataset()
    )
    assert made.streams == ("text/pooled",)
    assert not made.quarantined
    mapping = wanted(fast_path, text, **change, strings=np.array([*TEXTS[:8], "x"]))
    with pytest.raises(
        ForeignError, match=r"text 't8' of stand_in is .* but the features are of 'x'"
    ):
        import_features(mapping, fast_path / "d.zarr", dataset=dataset())


def npz(folder: Path, name: str, data: bytes) -> None:
    with zipfile.ZipFile(folder / "f.npz", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("ids.npy", as_npy(ARRAYS["ids"]))
        out.writestr(f"{name}.npy", data)


def as_npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def h5(folder: Path, make: Callable[[Any], object]) -> None:
    with h5py.File(folder / "f.h5", "w") as out:
        out["ids"] = IDS
        make(out)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (lambda p: npz(p, "feats", as_npy(np.array([{}] * 13))), "objects|not plain values"),
    "zip bomb": (lambda p: npz(p, "feats", as_npy(np.zeros((13, 1 << 20)))), "not unpacked"),
    "cut": (lambda p: (p / "f.npz").write_bytes(b"PK\x03\x04 cut short"), "cannot be read"),
    "short member": (lambda p: npz(p, "feats", as_npy(ARRAYS["feats"])[:-9]), "cannot be read"),
    "npy 3": (lambda p: npz(p, "feats", b"\x93NUMPY\x03\x00" + bytes(99)), "version"),
    "empty": (lambda p: (p / "f.npz").write_bytes(b""), "neither .npy, .npz nor .h5"),
    "text": (lambda p: (p / "f.npz").write_text("hello, world"), "neither .npy, .npz nor .h5"),
    "soft link": (
        lambda p: h5(p, lambda h: h.__setitem__("feats", h5py.SoftLink("/ids"))),
        "a link",
    ),
    "external": (
        lambda p: h5(p, lambda h: h.__setitem__("feats", h5py.ExternalLink("/etc/passwd", "/x"))),
        "a link that leads elsewhere",
    ),
    "external data": (
        lambda p: h5(p, lambda h: h.create_dataset("feats", (13, 7), "f4", external="/etc/passwd")),
        "no array that lies in this file",
    ),
    "references": (
        lambda p: h5(p, lambda h: h.create_dataset("feats", (13, 7), h5py.ref_dtype)),
        "not numbers|not unpacked",
    ),
    "h5 bomb": (
        lambda p: h5(
            p,
            lambda h: h.create_dataset(
                "feats", (13, 1 << 40), "f4", chunks=(1, 1024), compression="gzip"
            ),
        ),
        "not unpacked",
    ),
    "no chunk limit": (
        lambda p: h5(
            p, lambda h: h.create_dataset("feats", (13, 1 << 27), "f4", chunks=(13, 1 << 26))
        ),
        "rewrite it in smaller ones",
    ),
    "plug-in": (
        lambda p: h5(
            p, lambda h: h.create_dataset("feats", (13, 7), "f4", scaleoffset=3, chunks=True)
        ),
        "is packed with",
    ),
    "cut h5": (
        lambda p: (
            h5(p, lambda h: h.create_dataset("feats", data=ARRAYS["feats"])),
            os.truncate(p / "f.h5", (p / "f.h5").stat().st_size - 100),
        ),
        "cannot be read",
    ),
    "group": (lambda p: h5(p, lambda h: h.create_group("feats")), "no array that lies"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_damaged_file_is_one_sentence(fast_path: Path, case: str) -> None:
    make, message = HOSTILE[case]
    make(fast_path)
    file = "f.h5" if (fast_path / "f.h5").exists() else "f.npz"
    (fast_path / "map.toml").write_text((BACKBONE + IMAGE).replace("{file}", file))
    with pytest.raises(ForeignError, match=message) as info:
        import_features(fast_path / "map.toml", fast_path / "c.zarr")
    assert len(str(info.value).splitlines()) == 1
    assert not (fast_path / "c.zarr").exists()


LAYOUTS = {"n p w": (0, 1, 2), "n w p": (0, 2, 1), "n h w c": (0, 1, 2, 3), "n c h w": (0, 3, 1, 2)}


@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
    dtype=st.sampled_from(["f2", "f4", ">f4", "f8"]),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["f.npz", "f.h5"]),
)
@settings(max_examples=40, deadline=None)
def test_any_layout_and_type_gives_patches_in_row_major_order(
    fast_folder: Path, layout: str, sizes: tuple[int, ...], dtype: str, seed: int, kind: str
) -> None:
    n, h, w, c = sizes
    rng = np.random.default_rng(seed)
    usual = rng.normal(size=(n, h, w, c) if "h" in layout else (n, h * w, c)).astype(dtype)
    given = np.ascontiguousarray(usual.transpose(LAYOUTS[layout]))
    text = f'{BACKBONE}[image]\nfile = "{kind}"\nids = "ids"\npatches = "p"\nlayout = "{layout}"\n'
    with tempfile.TemporaryDirectory(dir=fast_folder) as made:
        path = Path(made)
        save(path / kind, {"ids": np.array(IDS[:n]), "p": given})
        (path / "map.toml").write_text(text)
        cache = import_features(path / "map.toml", path / "c.zarr")
        found = cache.read("image/patches", cache.rows("image", IDS[:n]))
        stored = np.dtype("f2" if dtype == "f2" else "f4")
        assert found.dtype == stored
        np.testing.assert_array_equal(found, usual.reshape(n, h * w, c).astype(stored))


def test_ragged_tokens_come_as_offsets_too(fast_path: Path) -> None:
    mask = ARRAYS["mask"]
    flat = ARRAYS["tokens"][mask]
    offsets = np.concatenate([[0], np.cumsum(mask.sum(1))])
    order = RNG.permutation(9)
    text = BACKBONE + TEXT + 'tokens = "flat"\noffsets = "offsets"\n'
    change: dict[str, Any] = {"flat": flat, "offsets": offsets}
    cache = import_features(
        wanted(fast_path, text, **change), fast_path / "c.zarr", dataset=dataset()
    )
    values, bounds = cache.read_ragged("text/tokens")
    np.testing.assert_array_equal(values, flat)
    np.testing.assert_array_equal(bounds, offsets)
    padded = BACKBONE + TEXT + 'tokens = "tokens"\nmask = "mask"\n'
    shuffled: dict[str, Any] = {
        key: ARRAYS[key][order] for key in ("strings", "text_feats", "tokens", "mask")
    }  # another order in the file, and rubbish where it is padded
    shuffled["tokens"] = np.where(
        shuffled["mask"][..., None], shuffled["tokens"], np.float32(np.nan)
    )
    other = import_features(
        wanted(fast_path, padded, **shuffled), fast_path / "d.zarr", dataset=dataset()
    )
    np.testing.assert_array_equal(other.read_ragged("text/tokens")[0], flat)
    assert not other.quarantined


def test_the_verb_says_what_was_joined_and_messages_name_the_way_back(
    fast_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping, out = wanted(fast_path), fast_path / "c.zarr"
    assert main(["import", str(mapping), "--out", str(out)]) == 0
    assert "13 images and 9 texts in" in capsys.readouterr().out
    cache = FeatureCache.open(out)
    assert cache.chunks.command == f"headstart import {mapping} --out {out}"
    cache.chunks.file("image/pooled", 0).unlink()
    assert main(["import", str(mapping), "--out", str(out)]) == 0
    assert cache.verify().ok
    assert main(["import", str(fast_path / "none.toml"), "--out", str(out)]) == 1
    assert "no mapping at" in capsys.readouterr().err
    assert main(["info", str(out)]) == 0
    assert "foreign" in capsys.readouterr().out


def test_a_cache_of_foreign_features_travels_like_any_other(fast_path: Path) -> None:
    cache = import_features(wanted(fast_path), fast_path / "c.zarr", dataset=dataset(15))
    assert len(cache.quarantined) == 2
    back = import_hdf5(export_hdf5(cache, fast_path / "c.h5"), fast_path / "back.zarr")
    assert (back.digest(), back.header) == (cache.digest(), cache.header)


def test_importing_features_needs_no_torch() -> None:
    code = "import sys, cache_builder.foreign\nassert not {'torch', 'open_clip'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
