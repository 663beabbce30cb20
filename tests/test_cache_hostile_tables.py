"""Tables and metadata from a stranger: nothing in them is run, followed out of the folder, or read beyond its limit."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import count

from cache_builder import records
from cache_builder.datasets import folder, mit_states
from cache_builder.datasets.compositions import METADATA, PAIR_FOLDER
from cache_builder.errors import CacheError
from cache_builder.images import UnsafeName
from cache_builder.records import MAX_JSON, MAX_T7, DatasetError, read_csv, read_json, read_t7

PATHS = (
    *("../secret.png", "a/../../secret.png", "/etc/passwd", "C:\\x.png", "C:x.png", "a\\..\\x.png"),
    *("a\x00.png", "a\x1b[2J.png", "\\\\host\\x.png", "x" * 1_025),
)


SYSTEM = os.system  # pyright: ignore[reportDeprecated]
"""What a hostile pickle would call, though new code should not."""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return folder.miniature(tmp_path / "own")


@pytest.fixture
def mit(tmp_path: Path) -> Path:
    return mit_states.miniature(tmp_path / "mit")


@pytest.mark.parametrize("name", PATHS)
def test_a_path_in_any_table_is_refused_before_anything_is_opened(
    name: str, own: Path, mit: Path
) -> None:
    (own / "data.csv").unlink()
    (own / "data.jsonl").write_text(json.dumps({"image": name, "captions": ["c"]}))
    with pytest.raises(DatasetError, match="image name"):
        folder.load(own)
    (own / "data.jsonl").unlink()
    (own / "data.csv").write_text(f'image,caption\n"{name}",c\n')
    with pytest.raises(DatasetError, match="image name"):
        folder.load(own)
    rows = [{"image": name, "attr": "ripe", "obj": "orange", "set": "train"}]
    (mit / f"{METADATA}.json").write_text(json.dumps(rows))
    with pytest.raises(UnsafeName, match="image name"):
        mit_states.load(mit)
    (mit / f"{METADATA}.json").unlink()
    torch.save(rows, mit / f"{METADATA}.t7")
    with pytest.raises(UnsafeName, match="image name"):
        mit_states.load(mit)
    count("path in a table", "clear error", times=4)


@pytest.mark.parametrize("pair", ["../.. /etc", "/etc/passwd x", "C:\\ \\x"])
def test_a_path_in_a_pair_file_is_only_a_name(pair: str, mit: Path) -> None:
    with (mit / PAIR_FOLDER / "val_pairs.txt").open("a") as file:
        file.write(pair + "\n")
    data = mit_states.load(mit)
    assert tuple(pair.split()) in data.tasks.czsl.pairs["val"]  # pyright: ignore[reportOptionalMemberAccess]
    assert not any(pair.split()[0] in image.id for image in data.images)


class Payload:
    """Runs something when it is unpickled."""

    def __init__(self, action: Callable[..., object], *arguments: str) -> None:
        self.action, self.arguments = action, arguments

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return self.action, self.arguments


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("action", [os.mkdir, SYSTEM, eval, __import__])
def test_a_pickle_that_runs_something_is_refused_in_every_container(
    action: Callable[..., object], protocol: int, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    said = {SYSTEM: f"mkdir {ran}", eval: f"__import__('os').mkdir({str(ran)!r})"}
    argument = said.get(action, str(ran) if action is os.mkdir else "this")  # pyright: ignore[reportArgumentType, reportCallIssue]
    rows: Any = [{"image": Payload(action, argument)}]
    plain = tmp_path / "plain.t7"
    plain.write_bytes(pickle.dumps(rows, protocol))
    zipped, legacy = tmp_path / "zip.t7", tmp_path / "legacy.t7"
    torch.save(rows, zipped, pickle_protocol=max(protocol, 2))
    torch.save(rows, legacy, pickle_protocol=max(protocol, 2), _use_new_zipfile_serialization=False)
    for file in (plain, zipped, legacy):
        with pytest.raises(DatasetError, match="without running what is in it"):
            read_t7(file)
        count("pickle that runs something", "clear error")
    assert not ran.exists()
    # The payload is real: whoever unpickles it runs it.
    if action is os.mkdir:
        pickle.loads(plain.read_bytes())
        assert ran.exists()


def test_a_t7_that_unpacks_to_more_than_the_limit_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.t7", "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("archive/data.pkl", "w") as part:
            for _ in range(MAX_T7 // 2**20 + 1):
                part.write(bytes(2**20))
        file.writestr("archive/version", "3\n")
    assert (tmp_path / "a.t7").stat().st_size < MAX_T7 / 100
    with pytest.raises(DatasetError, match=r"unpacked it has .* more than the"):
        read_t7(tmp_path / "a.t7")


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"PK\x03\x04", b"\x80\x02.", b"(" * 10_000, bytes(99)]
)
def test_a_t7_that_is_nothing_is_one_sentence(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.t7").write_bytes(data)
    with pytest.raises(DatasetError, match="cannot be read") as caught:
        read_t7(tmp_path / "a.t7")
    assert "\n" not in str(caught.value)
    count("broken .t7", "clear error")


READS: dict[str, Callable[[Path], object]] = {
    "csv": lambda p: list(read_csv(p)),
    "json": read_json,
    "jsonl": lambda p: list(records.read_jsonl(p)),
    "t7": read_t7,
    "txt": records.read_text,
}


@pytest.mark.parametrize("kind", READS)
def test_a_file_of_many_gigabytes_is_refused_by_its_size(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    path.touch()
    os.truncate(path, 20 << 30)
    with pytest.raises(DatasetError, match="more than the"):
        READS[kind](path)
    count("table of 20 GB", "clear error")


@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(kind: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    os.mkfifo(path) if what == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(DatasetError, match="not a regular file"):
        READS[kind](path)
    count("table that is no file", "clear error")


def test_a_table_that_has_no_size_is_read_to_its_limit(tmp_path: Path) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("no file without a size here")
    with pytest.raises(DatasetError, match="more than the 10 bytes allowed"):
        records.read_text(Path("/proc/self/maps"), 10)


DEEP = {
    "lists": "[" * 100_000 + "]" * 100_000,
    "objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a number": "9" * 10_000,
    "half a character": '["\\ud800"]',
    "half a character as key": '{"\\udFFF": 1}',
    "a key twice": '{"a": 1, "a": 2}',
    "not a number": "[NaN]",
    "infinity": "[-Infinity]",
}


@pytest.mark.parametrize("what", DEEP)
def test_json_that_asks_too_much_is_one_sentence(what: str, tmp_path: Path) -> None:
    for kind in ("json", "jsonl"):
        (tmp_path / f"a.{kind}").write_text(DEEP[what])
        with pytest.raises(DatasetError) as caught:
            READS[kind](tmp_path / f"a.{kind}")
        assert "\n" not in str(caught.value)
        count("hostile JSON", "clear error")


def test_a_csv_of_one_endless_line_is_one_sentence(tmp_path: Path, own: Path) -> None:
    (own / "data.csv").write_text("image,caption\n" + "a" * 300_000 + ",b\n")
    with pytest.raises(DatasetError, match="field larger than field limit"):
        folder.load(own)
    os.truncate(own / "data.csv", 1 << 30)
    assert MAX_JSON < 1 << 30
    with pytest.raises(CacheError, match="more than the"):
        folder.load(own)
    count("table of one endless line", "clear error", times=2)
