"""The commands as a shell sees them: ways to start them, how they end, what `--help` costs, their completion."""

import os
import pty
import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from cache_builder.plugins import names

ROOT = Path(__file__).parent.parent
ROOM_VERBS = {
    "cache_builder": {"plan", "browse", "build", "triplets", "info", "verify", "export", "import"},
    "eval": {"metrics", "report", "submit"},
}


def python(*words: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(("-c", code) if code else ("-m",)), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def verbs_of(shown: str) -> set[str]:
    return {
        *shown.partition("{")[2].partition("}")[0].replace("\n", "").replace(" ", "").split(",")
    }


@pytest.mark.parametrize("room", ROOM_VERBS)
def test_a_room_alone_offers_its_verbs(room: str) -> None:
    done = python(room, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m {room} ")
    assert verbs_of(done.stdout) == ROOM_VERBS[room]


def test_the_heads_offer_all_of_headstart() -> None:
    done = python("heads", "--help")
    whole = {"train", "score", "demo", "list", "compare", *ROOM_VERBS["eval"]}
    assert whole | ROOM_VERBS["cache_builder"] <= verbs_of(done.stdout)
    assert done.stdout.startswith("usage: headstart ")
    assert done.stdout == python("heads.cli", "--help").stdout


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("cache_builder", ["info", "no.zarr"], "python -m cache_builder info: no feature cache at"),
        ("heads", ["info", "no.zarr"], "headstart info: no feature cache at"),
        ("heads", ["score", "no-run"], "headstart score: no-run is no run: "),
        ("heads", ["metrics", "no.zarr"], "headstart metrics: no score table at"),
        ("eval", ["metrics", "no.zarr"], "python -m eval metrics: no score table at"),
        ("eval", ["report", "no-run"], "python -m eval report: no run at"),
    ],
)
def test_a_user_s_error_is_one_line_and_status_1(module: str, words: list[str], said: str) -> None:
    done = python(module, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["eval", "heads"])
@pytest.mark.parametrize("buffered", [True, False])
def test_numbers_that_nobody_reads_end_quietly(module: str, buffered: bool, tmp_path: Path) -> None:
    scores, category = np.ones((2, 2, 2)), np.array(["swap", "swap"])
    np.savez(tmp_path / "s.npz", scores=scores, category=category)
    given = ["--json", str(tmp_path / "s.npz"), "--space", "cosine", "--split", "test"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", module, "metrics", *given],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
    )
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 141)


@pytest.mark.parametrize(
    "words", ["cache_builder info", "heads info", "heads report", "eval metrics", "eval report"]
)
def test_what_the_system_says_is_one_line_too(words: str) -> None:
    done = python(*words.split(), f"{'x' * 300}.npz")
    assert done.returncode == 1
    assert done.stderr.endswith(": File name too long\n")
    assert done.stderr.count("\n") == 1


def loaded(code: str) -> set[str]:
    """First parts of the modules that `code` adds to those of a bare interpreter, but the standard library's."""
    done = python(
        code=f"import sys\nbare = set(sys.modules)\n{code}\n"
        "print(*set(sys.modules) - bare, file=sys.stderr)"
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.split()} - {*sys.stdlib_module_names}


HELP = """\
from {room}.cli import main
try: main({words!r})
except SystemExit: pass"""


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["build", "--help"]])
def test_help_imports_this_project_and_nothing_else(words: list[str]) -> None:
    """Neither numpy nor torch, zarr, pydantic, matplotlib, Pillow …: their imports are what a user would wait for."""
    rooms = {"cache_builder", "heads", "eval"}
    assert loaded(HELP.format(room="heads", words=words)) == rooms
    if words == ["--help"]:
        assert loaded(HELP.format(room="eval", words=words)) == {"eval"}
        assert loaded(HELP.format(room="cache_builder", words=words)) == {"cache_builder"}


def test_the_look_at_loaded_modules_sees_some() -> None:
    assert {"numpy", "h5py"} <= loaded("import cache_builder.hdf5")


def script(shell: str, folder: Path) -> Path:
    done = python("heads", "completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    (folder / f"completion.{shell}").write_text(done.stdout)
    return folder / f"completion.{shell}"


def bash(file: Path, line: str) -> list[str]:
    code = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}\n'
        "entry=$(complete -p headstart); entry=${entry##*-F }; entry=${entry% *}\n"
        '"$entry" headstart "${@: -1}" "${@: -2:1}" 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", code, "bash", file, *line.split(" ")],
        capture_output=True,
        text=True,
        cwd=file.parent,
    )
    return done.stdout.split()


def fish(file: Path, line: str) -> list[str]:
    code = f"source {file}; complete -C '{line}'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", code], capture_output=True, text=True, cwd=file.parent
    )
    return [found.partition("\t")[0] for found in done.stdout.splitlines() if found]


def zsh(file: Path, line: str) -> list[str]:
    """What the line is after the tab key: a widget of the line editor writes it down."""
    said = file.parent / "said"
    setup = (
        f"autoload -U compinit; compinit -u -D; source {file}; compdef _shtab_headstart headstart; bindkey -e\n"
        f"tell() {{ print -r -- $BUFFER >{said}; exit }}; zle -N tell; bindkey '^T' tell\n"
    )
    (file.parent / ".zshrc").write_text(setup)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(file.parent)
        os.environ.update(TERM="dumb", PS1="rea%%dy> ", ZDOTDIR=str(file.parent))
        os.execvp("zsh", ["zsh", "--no-globalrcs", "-i"])
    heard = ""
    while "rea%dy> " not in heard and select.select([terminal], [], [], 60)[0]:
        heard += os.read(terminal, 65536).decode(errors="replace")
    os.write(terminal, f"{line}\t\x14".encode())
    with suppress(OSError):  # it has ended
        while select.select([terminal], [], [], 60)[0] and os.read(terminal, 65536):
            pass
    os.close(terminal)
    os.waitpid(child, 0)
    return said.read_text().split()


SHELLS: dict[str, Callable[[Path, str], list[str]]] = {"bash": bash, "fish": fish, "zsh": zsh}
LINES = {
    "headstart impo": {"import"},
    "headstart train --resu": {"--resume"},
    "headstart train tf_l": {"tf_local"},
    "headstart build --dataset mit": {"mit_states"},
    "headstart build --backbone si": {"siglip2:demo"},
    "headstart demo --backbones lla": {"llava"},
    "headstart list meth": {"methods"},
    "headstart score --world op": {"open"},
    "headstart verify phot": {"photos.zarr/", "photos.zarr"},
}
"""A line, and what completes its last word: one of these."""


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_verbs_options_plugins_and_files(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed; apt-get install {shell}")
    file = script(shell, tmp_path)
    (tmp_path / "photos.zarr").mkdir()
    for line, expected in LINES.items():
        found = SHELLS[shell](file, line)
        assert expected & {*found}, (line, found)


def test_every_plugin_is_offered_and_nothing_else(tmp_path: Path) -> None:
    file = script("bash", tmp_path)
    assert sorted(bash(file, "headstart train ")) == sorted(names("heads.methods"))
    sets = names("cache_builder.datasets")
    assert sorted(bash(file, "headstart build --dataset ")) == sorted(sets)
    families = names("cache_builder.backbones")
    assert sorted(bash(file, "headstart demo --backbones ")) == sorted(families)


def test_an_unknown_shell_is_refused_and_tcsh_has_a_script() -> None:
    assert "complete headstart" in python("heads", "completion", "tcsh").stdout
    done = python("heads", "completion", "ksh")
    assert done.returncode == 2
    assert "invalid choice: 'ksh'" in done.stderr
