"""Plugins are found by file name; an unknown name says what is known and what is near."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cache_builder import load_backbone
from cache_builder.errors import CacheError, UnknownName
from cache_builder.plugins import find, names


def test_a_plugin_is_found_by_its_file_name() -> None:
    module = find("cache_builder.datasets", "folder")
    assert module is importlib.import_module("cache_builder.datasets.folder")


def test_files_without_the_handle_are_not_offered() -> None:
    assert {"folder", "mit_states"} <= set(names("cache_builder.datasets"))
    assert not {"base", "compositions"} & set(names("cache_builder.datasets"))
    assert "clip" in names("cache_builder.backbones")
    assert not {"base", "checkpoints", "tiny_files"} & set(names("cache_builder.backbones"))


def test_an_unknown_name_lists_the_nearest_and_the_known() -> None:
    with pytest.raises(UnknownName) as caught:
        find("cache_builder.datasets", "mit_state")
    message = str(caught.value)
    assert "no data set 'mit_state' in cache_builder/datasets" in message
    assert "did you mean 'mit_states'?" in message
    assert "folder" in message
    assert isinstance(caught.value, CacheError)
    assert isinstance(caught.value, ValueError)


def test_a_name_like_nothing_known_gets_no_hint() -> None:
    with pytest.raises(UnknownName) as caught:
        find("cache_builder.backbones", "qqqq")
    assert "did you mean" not in str(caught.value)


def test_a_shared_file_cannot_be_asked_for_as_a_data_set() -> None:
    with pytest.raises(UnknownName, match="no data set 'compositions'"):
        find("cache_builder.datasets", "compositions")


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_sets").mkdir()
    return tmp_path / "my_sets"


def test_a_dotted_name_is_imported_as_it_stands(own_folder: Path) -> None:
    (own_folder / "birds.py").write_text("def load(root): return 'birds'")
    module = find("cache_builder.datasets", "my_sets.birds")
    assert isinstance(module, ModuleType)
    assert module.load(None) == "birds"
    del sys.modules["my_sets.birds"], sys.modules["my_sets"]


def test_a_dotted_name_that_is_nowhere_is_a_user_error() -> None:
    with pytest.raises(UnknownName, match=r"'my_absent\.birds'.*'my_absent' is not importable"):
        find("cache_builder.datasets", "my_absent.birds")


def test_a_broken_import_inside_the_user_s_module_shows_itself(own_folder: Path) -> None:
    (own_folder / "broken.py").write_text("import a_library_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        find("cache_builder.datasets", "my_sets.broken")
    del sys.modules["my_sets"]


def test_a_family_without_a_checkpoint_is_refused() -> None:
    with pytest.raises(UnknownName, match="names no checkpoint"):
        load_backbone("clip")


def test_a_module_without_the_handle_is_no_plugin() -> None:
    with pytest.raises(UnknownName, match=r"module os\.path is no method: it defines no `Head`"):
        find("heads.methods", "os.path")


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UnknownName, match="device 'nonsense' cannot be used here"):
        load_backbone("clip:demo", device="nonsense")
