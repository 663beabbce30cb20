"""What is handed out: wheel and sdist hold everything, run outside the repository, and declare what they import.

The environments of these tests are fresh but for their libraries: torch alone takes minutes to install, so a path file
lends them those of the environment that runs the tests. It does not lend them this project, which is checked.
"""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
ROOMS = ("cache_builder", "heads", "eval")
VERBS = ("build", "train", "score", "metrics", "report", "demo")


def declared() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement: str) -> str:
    """The distribution that a requirement names, in its normal form."""
    found = re.match(r"[\w.-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def imports(path: Path) -> set[str]:
    """First parts of all modules that a file names in an import, at any depth of the code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            (named,) = [one.value for one in node.args if isinstance(one, ast.Constant)] or [""]
            found.add(str(named).partition(".")[0])
    return found - {""}


def test_everything_that_is_imported_is_declared_and_nothing_else() -> None:
    project = declared()
    extras: dict[str, list[str]] = project["optional-dependencies"]
    own = {"dev", "peers"}  # for whoever works on the project itself
    optional = {name_of(r) for extra, rs in extras.items() if extra not in own for r in rs}
    required = {name_of(r) for r in project["dependencies"]}
    shipped = {name_of(r) for r in extras["dev"]}  # strategies for tests of other people's plugins
    whose = packages_distributions()
    used: dict[str, set[str]] = {}
    for path in [p for room in ROOMS for p in (ROOT / room).rglob("*.py")]:
        for module in imports(path) - {*sys.stdlib_module_names, *ROOMS}:
            (distribution,) = {*whose.get(module, [f"nothing installed offers {module}"])}
            used.setdefault(name_of(distribution), set()).add(str(path.relative_to(ROOT)))
    lacking = {name: where for name, where in used.items() if name not in required | optional}
    assert set(lacking) <= {"hypothesis"} & shipped, lacking
    assert used["hypothesis"] == {"cache_builder/testing.py"}
    assert required | optional <= set(used), "declared, but never imported"


def test_versions_and_licence_are_said_alike() -> None:
    project = declared()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    said = citation["version"], citation["license"], citation["title"]
    assert said == (project["version"], project["license"], project["name"])
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    for reference in citation["references"]:
        assert reference["title"], reference
        assert reference["authors"], reference
        (identifier,) = reference["identifiers"]
        assert identifier["value"].partition(":")[2] in reference["url"]


def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("what belongs to the project is asked of git; run this in a checkout")
    out = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT)
    return {line for line in out.stdout.splitlines() if (ROOT / line).exists()}


@dataclass(frozen=True)
class Built:
    sdist: Path
    wheel: Path
    """Built from the sdist."""
    direct: Path
    """Built from the checkout."""


def run(*command: str | Path, **options: Any) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=env, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(*build, folder, ROOT)
    run(*build, folder / "direct", "--wheel", ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    (direct,) = (folder / "direct").glob("*.whl")
    return Built(sdist, wheel, direct)


@pytest.mark.slow
def test_a_wheel_and_an_sdist_hold_all_that_belongs_to_them(built: Built) -> None:
    files = tracked()
    with zipfile.ZipFile(built.wheel) as wheel, zipfile.ZipFile(built.direct) as direct:
        held = {info.filename: info.CRC for info in wheel.infolist()}
        assert held == {info.filename: info.CRC for info in direct.infolist()}
    rooms = {name for name in files if name.startswith(tuple(f"{room}/" for room in ROOMS))}
    assert rooms <= set(held)
    kinds = {Path(name).suffix for name in rooms}
    assert kinds >= {".toml", ".html", ".safetensors", ".json", ".typed", ".py"}
    assert {f"{room}/py.typed" for room in ROOMS} <= rooms
    assert not {name.partition("/")[0] for name in held} - {
        *ROOMS,
        f"headstart-{declared()['version']}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in held)
    with tarfile.open(built.sdist) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers()}
    assert {name for name in files if not name.startswith(".")} <= names


def environment(folder: Path) -> Path:
    """A fresh environment, to which this one lends its libraries but not what it has installed as editable.

    Python reads path files (.pth) in a folder of packages, and by them this project is found; in a folder that is
    itself named by a path file it does not.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / sysconfig.get_path("purelib", vars={"base": ""}).lstrip("/")
    lent = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "lent.pth").write_text("".join(f"{path}\n" for path in lent))
    return folder / "bin"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_what_is_built_installs_and_runs_outside_the_repository(
    kind: str, built: Built, tmp_path: Path
) -> None:
    tools = environment(tmp_path / "fresh")
    python, headstart = tools / "python", tools / "headstart"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps")
    run(*pip, "--no-build-isolation", "--force-reinstall", getattr(built, kind))
    where = f"import {', '.join(ROOMS)}\nfor room in ({', '.join(ROOMS)}): print(room.__file__)"
    for line in run(python, "-c", where, cwd=tmp_path).splitlines():
        assert Path(line).is_relative_to(tmp_path / "fresh"), line
    shown = run(headstart, "--help", cwd=tmp_path)
    assert not [verb for verb in VERBS if f"    {verb} " not in shown]
    assert "tf_local" in run(headstart, "list", "methods", cwd=tmp_path)
    if kind == "sdist":  # the same files as in the wheel, as the test above shows
        return
    small = ("--scale", "0.02", "--epochs", "1", "--seeds", "1", "--backbones", "clip")
    run(headstart, "demo", "--out", "demo", *small, cwd=tmp_path)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "late_maxsim" in page
    assert "zero_shot" in page
