"""Parquet tables from strangers: rows and cells as written, a row group at a time, within limits; no types woken."""

import contextlib
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_builder import parquet
from cache_builder.images import MAX_BYTES, BadImage
from cache_builder.parquet import ParquetTable
from cache_builder.parquet_footer import RowGroup, row_groups
from cache_builder.records import DatasetError

REASON = "needs pyarrow, which reads parquet: pip install 'headstart[parquet]'"
pa = pytest.importorskip("pyarrow", reason=REASON)
pq = pytest.importorskip("pyarrow.parquet", reason=REASON)


def write(path: Path, columns: dict[str, Any], group: int = 2, **options: Any) -> Path:
    """A table of columns, so many rows a group."""
    pq.write_table(pa.table(columns), path, row_group_size=group, **options)
    return path


def chunks(path: Path, column: int) -> list[tuple[int, int]]:
    """Where the pages of one column lie in the file, by row group."""
    footer = pq.ParquetFile(path).metadata
    found = [footer.row_group(g).column(column) for g in range(footer.num_row_groups)]
    return [
        (c.dictionary_page_offset or c.data_page_offset, c.total_compressed_size) for c in found
    ]


def footer_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[len(data) - 8 - int.from_bytes(data[-8:-4], "little") : -8]


def stated(path: Path) -> list[RowGroup]:
    """What pyarrow finds in a whole footer."""
    footer, found = pq.ParquetFile(path).metadata, []
    for group in map(footer.row_group, range(footer.num_row_groups)):
        sizes: dict[str, int] = {}
        for part in map(group.column, range(group.num_columns)):
            name = part.path_in_schema.removesuffix(".bytes").removesuffix(".path")
            sizes[name] = sizes.get(name, 0) + part.total_uncompressed_size
        found.append(RowGroup(group.num_rows, sizes))
    return found


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """Six rows in three groups: a text, a number, bytes, a struct."""
    data = [f"picture {i}".encode() for i in range(6)]
    structs = [{"path": None, "bytes": d} for d in data]
    columns = {"t": list("abcdef"), "n": range(6), "image": data, "struct": structs}
    return write(tmp_path / "t.parquet", columns)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """(row group, column) of everything that pyarrow is asked to decode."""
    found: list[tuple[int, str]] = []
    decode = pq.ParquetFile.iter_batches

    def noted(self: Any, *args: Any, row_groups: list[int], columns: list[str], **rest: Any) -> Any:
        found.extend((g, c) for g in row_groups for c in columns)
        return decode(self, *args, row_groups=row_groups, columns=columns, **rest)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    return found


texts = st.none() | st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
rows = st.lists(
    st.tuples(
        texts, st.none() | st.integers(-(2**63), 2**63 - 1), st.none() | st.binary(max_size=9)
    ),
    max_size=9,
)


@given(rows=rows, group=st.integers(1, 4), struct=st.booleans(), dotted=st.booleans())
@settings(max_examples=60, deadline=None)
def test_rows_and_cells_are_what_was_written(
    rows: list[tuple[Any, Any, Any]],
    group: int,
    struct: bool,
    dotted: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("p") / "t.parquet"
    name = "a.b" if dotted else "a"
    image = pa.struct([("path", pa.string()), ("bytes", pa.binary())]) if struct else pa.binary()
    cells = [None if d is None else {"path": "p", "bytes": d} if struct else d for *_, d in rows]
    columns = {
        name: pa.array([t for t, *_ in rows], pa.string()),
        "n": pa.array([n for _, n, _ in rows], pa.int64()),
        "i": pa.array(cells, image),
    }
    table = ParquetTable(write(path, columns, group))
    assert table.n_rows == len(rows)
    assert table.kinds == {name: "text", "n": "number", "i": "image"}
    assert list(table.rows(["n", name])) == [{"n": n, name: t} for t, n, _ in rows]
    assert list(table.rows([])) == [{} for _ in rows]
    assert row_groups(footer_of(path)) == stated(path)
    for i in random.Random(0).sample(range(len(rows)), len(rows)):
        if rows[i][2] is None:
            with pytest.raises(BadImage, match=rf"row {i} of t\.parquet holds no bytes under 'i'"):
                table.cell("i", i)
        else:
            assert table.cell("i", i) == rows[i][2]


def test_columns_are_known_for_what_they_are(tmp_path: Path) -> None:
    made = {
        "large": (pa.large_string(), "text"),
        "category": (pa.dictionary(pa.int8(), pa.string()), "text"),
        "small": (pa.uint8(), "number"),
        "float": (pa.float64(), "other"),
        "flag": (pa.bool_(), "other"),
        "day": (pa.date32(), "other"),
        "list": (pa.list_(pa.string()), "other"),
        "large bytes": (pa.large_binary(), "image"),
        "other struct": (pa.struct([("bytes", pa.string())]), "other"),
        "no struct": (pa.struct([("data", pa.binary())]), "other"),
    }
    columns = {name: pa.array([None], kind) for name, (kind, _) in made.items()}
    table = ParquetTable(write(tmp_path / "t.parquet", columns))
    assert table.kinds == {name: kind for name, (_, kind) in made.items()}
    for name in ("float", "large bytes"):
        with pytest.raises(DatasetError, match=f"'{name}' holds neither texts nor whole numbers"):
            next(table.rows([name]))


def test_cells_are_read_a_row_group_at_a_time_when_asked(
    six: Path, reads: list[tuple[int, str]]
) -> None:
    table = ParquetTable(six)
    assert reads == []
    assert [table.cell("image", i) for i in (3, 2, 3)] == [b"picture 3", b"picture 2", b"picture 3"]
    assert reads == [(1, "image")]
    assert table.cell("struct", 5) == b"picture 5"
    assert reads == [(1, "image"), (2, "struct.bytes")]


def test_texts_are_read_as_they_are_consumed_and_without_the_pictures(
    six: Path, reads: list[tuple[int, str]]
) -> None:
    found = ParquetTable(six).rows(["t"])
    assert reads == []
    assert [next(found)["t"] for _ in range(3)] == ["a", "b", "c"]
    assert reads == [(0, "t"), (1, "t")]


def test_row_groups_are_forgotten_beyond_a_budget_but_never_the_last_two(
    six: Path, reads: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "KEPT", 1)
    table = ParquetTable(six)
    for _ in range(3):  # an image and its negative, row by row
        table.cell("image", 0)
        table.cell("struct", 0)
    assert reads == [(0, "image"), (0, "struct.bytes")]
    table.cell("image", 2)
    table.cell("struct", 1)
    assert len(reads) == 3
    table.cell("image", 1)
    assert reads[3:] == [(0, "image")]


def test_damage_in_one_row_group_leaves_the_others(six: Path) -> None:
    offset, size = chunks(six, 2)[1]
    data = bytearray(six.read_bytes())
    data[offset : offset + size] = b"\xff" * size
    six.write_bytes(data)
    table = ParquetTable(six)
    for i in (0, 1, 4, 5):
        assert table.cell("image", i) == f"picture {i}".encode()
    for i in (2, 3):
        with pytest.raises(BadImage, match=r"t\.parquet cannot be read as parquet: "):
            table.cell("image", i)


def test_threads_share_a_table(tmp_path: Path) -> None:
    data = [random.Random(i).randbytes(900) for i in range(120)]
    table = ParquetTable(write(tmp_path / "t.parquet", {"i": data}, 5))
    order = random.Random(1).sample(range(120), 120)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: table.cell("i", i), order)) == [data[i] for i in order]


# --- limits ---


def test_a_cell_above_64_mib_is_refused_and_its_neighbours_are_not(tmp_path: Path) -> None:
    data = [bytes(MAX_BYTES + 1), bytes(MAX_BYTES), b"x"]
    table = ParquetTable(write(tmp_path / "t.parquet", {"i": data}, 3))
    with pytest.raises(BadImage) as caught:
        table.cell("i", 0)
    assert str(caught.value) == (
        "row 0 of t.parquet has 67,108,865 bytes under 'i', more than the 67,108,864 allowed"
    )
    assert len(table.cell("i", 1)) == MAX_BYTES
    assert table.cell("i", 2) == b"x"


@pytest.mark.parametrize("name", ["i", "i.j"])
@pytest.mark.parametrize("struct", [False, True])
def test_a_row_group_is_refused_by_the_size_its_footer_states(
    name: str, struct: bool, tmp_path: Path, reads: list[tuple[int, str]]
) -> None:
    data = [random.Random(i).randbytes(600) for i in range(4)]
    cells = [{"bytes": d, "path": ""} for d in data] if struct else data
    path = write(tmp_path / "t.parquet", {name: cells}, 2)
    with pytest.raises(BadImage, match=r"row group 1 has 2,\d+ bytes under 'i.*smaller row groups"):
        ParquetTable(path, max_chunk=2000).cell(name, 2)
    assert reads == []
    assert ParquetTable(path, max_chunk=3000).cell(name, 2) == data[2]


@pytest.mark.parametrize("name", ["t", "t.u"])
def test_texts_are_refused_by_the_size_their_footer_states(
    name: str, tmp_path: Path, reads: list[tuple[int, str]]
) -> None:
    path = write(tmp_path / "t.parquet", {name: [f"{i:0600}" for i in range(4)]}, 2)
    with pytest.raises(DatasetError, match=r"row group 0 has 2,\d+ bytes under 't"):
        next(ParquetTable(path, max_chunk=2000).rows([name]))
    assert reads == []


def test_one_large_value_of_many_rows_does_not_slip_through(tmp_path: Path) -> None:
    """Its dictionary makes the file, and what the footer states, small."""
    path = write(tmp_path / "t.parquet", {"i": [bytes(2**20)] * 64}, 64, use_dictionary=True)
    assert path.stat().st_size < 2**20
    with pytest.raises(BadImage, match="has more than 4,194,304 bytes under 'i'"):
        ParquetTable(path, max_chunk=4 * 2**20).cell("i", 0)


def test_one_long_text_of_many_rows_stays_one_value(tmp_path: Path) -> None:
    table = ParquetTable(write(tmp_path / "t.parquet", {"t": ["x" * 2**20] * 500}, 500))
    assert len({id(row["t"]) for row in table.rows(["t"])}) == 1
    longer = write(tmp_path / "l.parquet", {"t": ["x" * (2**20 + 1)]})
    with pytest.raises(
        DatasetError, match="a text of 1,048,577 bytes, more than the 1,048,576 all"
    ):
        list(ParquetTable(longer).rows(["t"]))


def test_files_footers_and_rows_have_limits(six: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, at, message in [
        ("MAX_FILE", 99, r"bytes, more than the 99 allowed"),
        ("MAX_FOOTER", 98, r"has a footer of [\d,]+ bytes, more than 98"),
        ("MAX_ROWS", 5, "has 6 rows, more than 5"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(parquet, limit, at)
            with pytest.raises(DatasetError, match=message):
                ParquetTable(six)


# --- strangers ---


def test_extension_types_are_refused_and_never_woken(tmp_path: Path) -> None:
    woken: list[bytes] = []

    class Trap(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.string(), "headstart.trap")

        def __arrow_ext_serialize__(self) -> bytes:
            return b"payload"

        @classmethod
        def __arrow_ext_deserialize__(cls, _: Any, serialized: bytes) -> "Trap":
            woken.append(serialized)
            return cls()

    pa.register_extension_type(Trap())
    try:
        trap = pa.ExtensionArray.from_storage(Trap(), pa.array(["a"]))
        path = write(tmp_path / "t.parquet", {"t": trap, "u": ["b"]})
        pq.ParquetFile(path).schema_arrow  # noqa: B018  what reading it plainly does
        assert woken
        woken.clear()
        with pytest.raises(
            DatasetError, match=r"t\.parquet declares Arrow extension types; only plai"
        ):
            ParquetTable(path)
        assert woken == []
    finally:
        pa.unregister_extension_type("headstart.trap")


def test_extension_types_are_refused_also_where_nobody_knows_them(tmp_path: Path) -> None:
    kind = pa.field("t", pa.string(), metadata={"ARROW:extension:name": "nobody.knows"})
    schema = pa.schema([kind])
    pq.write_table(pa.table({"t": ["a"]}, schema), tmp_path / "t.parquet")
    with pytest.raises(DatasetError, match="declares Arrow extension types"):
        ParquetTable(tmp_path / "t.parquet")


def test_metadata_of_others_is_not_looked_at(tmp_path: Path) -> None:
    schema = pa.schema([("t", pa.string())], {"pandas": "{not json", "huggingface": "\x80\x04."})
    pq.write_table(pa.table({"t": ["a"]}, schema), tmp_path / "t.parquet")
    assert list(ParquetTable(tmp_path / "t.parquet").rows(["t"])) == [{"t": "a"}]


@pytest.mark.parametrize("how", ["empty", "text", "cut", "front", "footer", "length"])
def test_a_file_that_is_no_whole_parquet_says_so(how: str, six: Path) -> None:
    data = six.read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    six.write_bytes(
        {
            "empty": b"",
            "text": b"image,caption\n" * 9,
            "cut": data[:-20],
            "front": data[:50],
            "footer": data[:start] + bytes(90) + data[start + 90 :],
            "length": data[:-8] + b"\xff\xff\xff\x7fPAR1",
        }[how]
    )
    with pytest.raises(
        DatasetError, match=r"t\.parquet (is no whole parquet file|cannot be read as)"
    ):
        ParquetTable(six)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    both = pa.table([pa.array(["a"]), pa.array(["b"])], names=["t", "t"])
    pq.write_table(both, tmp_path / "t.parquet")
    with pytest.raises(DatasetError, match="two columns of one name"):
        ParquetTable(tmp_path / "t.parquet")


def test_a_folder_or_a_pipe_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a regular file"):
        ParquetTable(tmp_path)


BENT = """
import random, sys
from pathlib import Path
from cache_builder.images import BadImage
from cache_builder.parquet import ParquetTable
from cache_builder.records import DatasetError

path = Path(sys.argv[1])
whole, told = path.read_bytes(), 0
for seed in range(700):
    rng, data = random.Random(seed), bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    print(seed, flush=True)
    try:
        table = ParquetTable(path)
        plain = [c for c, kind in table.kinds.items() if kind in ("text", "number")]
        assert len(list(table.rows(plain))) == table.n_rows
        for column in (c for c, kind in table.kinds.items() if kind == "image"):
            for i in range(table.n_rows):
                assert isinstance(table.cell(column, i), bytes)
    except (DatasetError, BadImage):
        told += 1
print(told)
"""


def test_any_damage_gives_an_error_of_ours_or_values_and_never_ends_the_process(six: Path) -> None:
    """In a process of its own, which pyarrow's own reading of the footer ends at seeds 256 and 360."""
    done = subprocess.run(
        [sys.executable, "-c", BENT, str(six)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, (done.stdout[-20:], done.stderr[-900:])
    assert 200 < int(done.stdout.split()[-1]) < 690


@pytest.fixture(scope="module")
def footer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    columns = {"t": list("abc"), "s": [{"bytes": b"x"}] * 3}
    return footer_of(write(tmp_path_factory.mktemp("f") / "t.parquet", columns))


@given(cut=st.integers(0, 10**6), at=st.integers(0, 10**6), bit=st.integers(0, 7))
@settings(max_examples=300, deadline=None)
def test_a_bent_footer_is_a_value_error_or_row_groups(
    cut: int, at: int, bit: int, footer: bytes
) -> None:
    with pytest.raises(ValueError, match="footer"):
        row_groups(footer[: cut % len(footer)])
    bent = bytearray(footer)
    bent[at % len(bent)] ^= 1 << bit
    with contextlib.suppress(ValueError):
        assert isinstance(row_groups(bytes(bent)), list)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x1c" * 99, "nested too deeply"),
        (b"\x16" + b"\xff" * 11, "a number of more than 64 bits"),
        (b"\x1b\x00\x00", "a value of kind 11"),
        (b"\x18\xff\xff\xff\xff\x07ab", "is damaged"),
        (b"\x49\xfc\xff\xff\xff\xff\x0f", "is damaged"),
        (b"\x49\x15\x02\x00", "is damaged"),
        (b"\x49\x1c\x19\x0c\x26\x01\x00\x00", "states a negative size"),
    ],
)
def test_a_hostile_footer_ends_soon(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row_groups(data)
