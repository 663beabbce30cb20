"""Settings from TOML and `--set`, and what a run records about its surroundings."""

from pathlib import Path

import pytest
from drawn import make_drawn
from pydantic import ValidationError

from heads import load_method
from heads.config import describe_cache, git_commit, parse, read_settings, versions
from heads.errors import ConfigError
from heads.train_config import TrainConfig


def test_overrides_come_after_the_file_and_need_no_quotes(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("[head]\nlayers = 3\n[train]\nlr = 0.5\nbetas = [0.5, 0.7]\n")
    settings = read_settings(file, ["train.lr=3e-4", "head.variant=global", "train.steps = 7"])
    assert settings == {
        "head": {"layers": 3, "variant": "global"},
        "train": {"lr": 3e-4, "betas": [0.5, 0.7], "steps": 7},
    }
    config = parse(TrainConfig, settings["train"], "train")
    assert (config.lr, config.steps, config.betas, config.eps) == (3e-4, 7, (0.5, 0.7), 1e-6)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("train.learning_rate=1", r"no key train\.learning_rate .*known: epochs, steps"),
        ("train.batchsize=1", r"no key train\.batchsize; did you mean 'batch_size'\?"),
        ("trian.lr=1", r"'trian'; did you mean 'train'\?"),
        ("lr=1", r"--set 'lr=1' is not of the form"),
        ("train.lr", "not of the form"),
        ("train.lr=fast", r"train\.lr is 'fast': input should be a valid number"),
        ("train.lr=-1", r"train\.lr is -1: input should be greater than 0"),
        ("train.precision=fp16", r"train\.precision is 'fp16': input should be 'fp32' or 'bf16'"),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_its_name(key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse(TrainConfig, read_settings(None, [key])["train"], "train")
    assert "\n" not in str(caught.value)


def test_a_table_within_a_table_is_set_by_its_dots(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('[head]\nbase = "csp"\n[head.settings]\ndropout = 0.2\nviews = 2\n')
    settings = read_settings(file, ["head.settings.dropout=0.1", "head.settings.chunk=7"])
    assert settings["head"] == {
        "base": "csp",
        "settings": {"dropout": 0.1, "views": 2, "chunk": 7},
    }
    assert read_settings(None, ["head.a.b.c=1"])["head"] == {"a": {"b": {"c": 1}}}
    with pytest.raises(ConfigError, match=r"wants a table at head\.base, which is 'csp'"):
        read_settings(file, ["head.base.dropout=0.1"])
    config = load_method("eva_head").Config
    with pytest.raises(ConfigError) as caught:
        parse(config, read_settings(file, ["head.settings.dropot=0.1"])["head"], "head")
    assert str(caught.value).startswith("no key head.settings.dropot; did you mean 'dropout'?")
    with pytest.raises(ConfigError, match=r"^head\.settings\.views is 3: input should be 1 or 2$"):
        parse(config, read_settings(file, ["head.settings.views=3"])["head"], "head")


def test_a_method_s_unknown_key_names_the_nearest() -> None:
    config = load_method("tf_local").Config
    with pytest.raises(ConfigError, match=r"head\.layer; did you mean 'layers'\?"):
        parse(config, {"layer": 2}, "head")
    with pytest.raises(ConfigError, match="heads must divide dim"):
        parse(config, {"dim": 9}, "head")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[head\n", "is not TOML"),
        ("[model]\n", "'model'; the tables are"),
        ("head = 3\n", "a table"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_settings(file)
    assert str(file) in str(caught.value)


def test_configs_are_frozen_and_described_with_their_source() -> None:
    with pytest.raises(ValidationError):
        TrainConfig().lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    for name, field in TrainConfig.model_fields.items():
        assert field.description, name
        assert "our choice" in field.description or "released code" in field.description, name


def test_a_run_can_name_its_cache_and_its_libraries(tmp_path: Path) -> None:
    cache = make_drawn(tmp_path / "c.zarr", streams=["image/pooled", "text/pooled"])
    facts = describe_cache(cache)
    assert facts["path"] == str(cache.path.resolve())
    assert (facts["fingerprint"], facts["digest"]) == (cache.fingerprint, cache.digest())
    assert facts["backbone"]["family"] == "clip"
    assert versions()["torch"].startswith("2.")
    commit = git_commit()
    assert commit is None or len(commit.rstrip("+")) == 40
