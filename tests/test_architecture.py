"""The rooms and rules of docs/design.md, enforced: import arrows, plugin handles, docstring facts, safe loading."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("cache_builder", "heads", "eval")
SHELVES = {  # folder of interchangeable files → the handles each must have
    "cache_builder.backbones": ("load", "tiny"),
    "cache_builder.datasets": ("load", "miniature"),
    "heads.methods": ("Config", "Head"),
}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module a file names in an import, at any depth of the code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def touches(modules: set[str], *prefixes: str) -> set[str]:
    return {m for m in modules if any(m == p or m.startswith(f"{p}.") for p in prefixes)}


def modules_after(code: str) -> set[str]:
    """Names in `sys.modules` of a fresh interpreter that ran `code`."""
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return set(out.stdout.split())


def plugins(shelf: str) -> list[str]:
    package = importlib.import_module(shelf)
    return [m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base"]


@pytest.mark.parametrize("path", sources("cache_builder"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_cache_builder_names_neither_heads_nor_eval(path: Path) -> None:
    assert not touches(imported(path), "heads", "eval")


@pytest.mark.parametrize("path", sources("eval"), ids=lambda p: str(p.relative_to(ROOT)))
def test_eval_names_neither_of_the_other_rooms_nor_torch(path: Path) -> None:
    assert not touches(
        imported(path), "heads", "cache_builder", "torch", "open_clip", "transformers"
    )


@pytest.mark.parametrize("path", sources("heads"), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_live_seam_of_heads_names_a_backbone_file(path: Path) -> None:
    if path.name != "live.py":
        assert not touches(imported(path), "cache_builder.backbones", "open_clip", "transformers")


@pytest.mark.parametrize("shelf", SHELVES)
def test_plugins_never_import_each_other(shelf: str) -> None:
    for path in sorted((ROOT / shelf.replace(".", "/")).glob("*.py")):
        others = {
            f"{shelf}.{p}" for p in plugins(shelf) if p != path.stem and shares_nothing(shelf, p)
        }
        assert not touches(imported(path), *others), path


def shares_nothing(shelf: str, name: str) -> bool:
    """A file without the handles is what its neighbours share (`compositions`), not a plugin."""
    return any(hasattr(importlib.import_module(f"{shelf}.{name}"), h) for h in SHELVES[shelf])


@pytest.mark.parametrize("shelf", SHELVES)
def test_every_plugin_file_has_all_of_its_handles_or_none(shelf: str) -> None:
    complete = 0
    for name in plugins(shelf):
        module = importlib.import_module(f"{shelf}.{name}")
        has = [hasattr(module, handle) for handle in SHELVES[shelf]]
        assert all(has) or not any(has), f"{shelf}.{name} has only some of {SHELVES[shelf]}"
        complete += all(has)
    assert complete, f"no plugin at all in {shelf}"


@pytest.mark.parametrize("name", plugins("heads.methods"))
def test_a_method_states_its_five_facts(name: str) -> None:
    text = importlib.import_module(f"heads.methods.{name}").__doc__ or ""
    for fact in ("Paper:", "Reference:", "Symbols:", "Differs:", "Mode, cost:"):
        assert fact in text, f"heads/methods/{name}.py does not state {fact!r}"


@pytest.mark.parametrize("name", plugins("heads.methods"))
def test_every_field_of_a_method_config_is_described(name: str) -> None:
    for field, info in importlib.import_module(f"heads.methods.{name}").Config.model_fields.items():
        assert info.description, f"{name}.Config.{field} has no description"


@pytest.mark.parametrize("room", ROOMS)
def test_every_file_says_what_it_is(room: str) -> None:
    for path in sources(room):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no module docstring"


def test_eval_runs_without_torch() -> None:
    code = "import eval.czsl, eval.matching, eval.retrieval, eval.bootstrap, eval.score_io, eval.report, eval.cli"
    assert not touches(modules_after(code), "torch", "heads", "cache_builder")


def test_the_cache_opens_without_torch() -> None:
    assert not touches(
        modules_after("from cache_builder import FeatureCache"), "torch", "heads", "eval"
    )


def test_training_from_a_cache_imports_neither_open_clip_nor_transformers() -> None:
    code = (
        "from heads import load_method, fit, score, Head\n"
        "import heads.cli, heads.loader, heads.train, heads.score, heads.checkpoint, heads.compare\n"
        "[load_method(m) for m in ('zero_shot', 'linear_probe', 'tf_local')]"
    )
    assert not touches(modules_after(code), "open_clip", "transformers", "torchvision", "timm")


def test_help_costs_no_torch() -> None:
    code = "import heads.cli\ntry: heads.cli.main(['--help'])\nexcept SystemExit: pass"
    assert not touches(modules_after(code), "torch", "open_clip", "matplotlib", "sklearn")


def test_the_import_probe_can_see_an_import() -> None:
    """Without this, a probe that always answers 'nothing' would keep the tests above green."""
    assert touches(modules_after("import torch"), "torch")
    assert touches(modules_after("from cache_builder.backbones import clip"), "open_clip")


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_can_read_or_write_a_pickle(room: str) -> None:
    for path in sources(room):
        tree = ast.parse(path.read_text())
        assert not touches(imported(path), "pickle", "joblib", "dill", "shelve", "marshal"), path
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name = ast.unparse(call.func)
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", f"{path}:{call.lineno}"
            if name in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle", "False") == "False", f"{path}:{call.lineno}"
            assert name not in ("torch.save", "eval", "exec"), f"{path}:{call.lineno} calls {name}"
