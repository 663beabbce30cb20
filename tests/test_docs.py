"""The documentation is true: its blocks run, its tree is git's, and nothing a user can name is missing from it.

A fenced `bash` or `python` block runs, in order, in one scratch directory per page; a line `<!-- not run: reason -->`
before a block opts it out.
"""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n+)?^```(?P<lang>\w*)\n(?P<body>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    lang: str
    body: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    return [Block(m["lang"], m["body"], m["reason"]) for m in FENCE.finditer(page.read_text())]


def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("the tree is compared with git's; run this in a checkout")
    out = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT)
    return {line for line in out.stdout.splitlines() if (ROOT / line).exists()}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    env = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for block in blocks(page):
        if block.reason is not None or block.lang not in ("bash", "python"):
            continue
        command = (
            ["bash", "-euo", "pipefail", "-c"] if block.lang == "bash" else [sys.executable, "-c"]
        )
        done = subprocess.run(
            [*command, block.body],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{page.name}:\n{block.body}\n{done.stdout}\n{done.stderr}"


def test_no_page_holds_a_placeholder() -> None:
    for page in PAGES:
        assert "@@" not in page.read_text(), f"{page.name} is not finished"


def test_every_block_names_its_language() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.lang, f"{page.name} has a block without a language:\n{block.body}"


def tree_paths() -> set[str]:
    """Paths of the README's tree: two spaces of indent are one level; a line may list several files, or a pattern."""
    block = next(
        b for b in blocks(ROOT / "README.md") if b.lang == "text" and "cache_builder/" in b.body
    )
    found: set[str] = set()
    stack: list[str] = []
    for line in block.body.splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        names = line.strip().split("  ")[0].split()
        del stack[depth:]
        for name in names:
            found.add("".join(stack) + name)
        if names[0].endswith("/"):
            stack.append(names[0])
    return found


def test_the_tree_in_the_readme_is_git_s() -> None:
    listed = tree_paths()
    patterns = {p for p in listed if not p.endswith("/")}
    folders = {p for p in listed if p.endswith("/")}
    real = tracked()
    files = {p for p in real if any(fnmatch(p, pattern) for pattern in patterns)}
    absent = {p for p in patterns if not any(fnmatch(f, p) for f in real)}
    absent |= {p for p in folders if not any(f.startswith(p) for f in real)}
    assert not absent, f"in the README's tree but not in git: {sorted(absent)}"
    # A folder shown without children stands for all it holds.
    closed = {f for f in folders if not any(o != f and o.startswith(f) for o in listed)}
    unlisted = {
        p
        for p in real - files
        if not p.endswith("__init__.py")
        and p not in (".gitignore", "README.md")
        and not any(p.startswith(c) for c in closed)
    }
    assert not unlisted, f"in git but not in the README's tree: {sorted(unlisted)}"


def test_the_list_of_pages_is_whole_and_its_links_lead_somewhere() -> None:
    listed = re.findall(r"\]\((\w[\w.-]*\.md)\)", (ROOT / "docs" / "README.md").read_text())
    assert set(listed) | {"README.md"} == {p.name for p in (ROOT / "docs").glob("*.md")}
    for page in PAGES:
        for link in re.findall(r"\]\(([\w./-]+\.md)\)", page.read_text()):
            assert (page.parent / link).is_file(), (
                f"{page.name} links to {link}, which is not there"
            )


def prose() -> str:
    return "\n".join(page.read_text() for page in PAGES)


def test_every_verb_is_documented_and_has_help() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "heads.cli", "--help"], capture_output=True, text=True, check=True
    )
    listing = re.search(r"\{([\w,]+)\}", shown.stdout)
    assert listing, shown.stdout
    for verb in listing[1].split(","):
        assert f"headstart {verb}" in prose(), f"no page shows `headstart {verb}`"
        assert re.search(rf"^ +{verb} +\S", shown.stdout, re.M), f"`headstart {verb}` has no help"


@pytest.mark.parametrize(
    "shelf", ["cache_builder.backbones", "cache_builder.datasets", "heads.methods"]
)
def test_every_plugin_is_documented(shelf: str) -> None:
    plugins = importlib.import_module("cache_builder.plugins")
    for name in plugins.names(shelf):
        assert f"`{name}`" in prose(), f"no page names `{name}` of {shelf}"
