"""Files of numpy from anywhere, read without trust: nothing is unpickled, and no more is made than there are bytes.

What a header claims is held against the bytes before an array is made of them; `np.load` would allocate first.
"""

import math
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from eval.errors import ScoreTableError, ScoreTableNotFound

DEFLATE = 1100
"""Deflate makes at most 1,032 bytes of one; a member that claims more is no honest file."""

UNPICKLED = (
    "holds Python objects, which would have to be unpickled, and a pickle can run any code; save it again as plain "
    "arrays: np.savez(path, scores=np.asarray(scores, np.float32), pairs=np.asarray(pairs, str))"
)


def read_npy(path: Path) -> NDArray[Any]:
    """One array.

    Raises:
        ScoreTableError: not an array, one of objects, or one whose header claims other than what is there.

    """
    if not path.is_file():
        raise ScoreTableNotFound(f"no array at {path}, or no regular file; name the file")
    return array_of(path.read_bytes(), str(path))


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Every array by its name; errors as for `read_npy`."""
    if not path.is_file():
        raise ScoreTableNotFound(f"no arrays at {path}, or no regular file; name the file")
    try:
        with zipfile.ZipFile(path) as archive:
            found: dict[str, NDArray[Any]] = {}
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name == member.filename or name in found:
                    raise ScoreTableError(
                        f"{path} holds {member.filename!r}, which is no array of its own; write the file with np.savez"
                    )
                claim = member.file_size
                if (
                    member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                    or claim > DEFLATE * member.compress_size + DEFLATE
                ):
                    raise ScoreTableError(
                        f"{path} claims {claim:,} bytes of {name!r} in {member.compress_size:,}, or packs "
                        "them as numpy does not; save it with np.savez"
                    )
                found[name] = array_of(archive.read(member), f"{path}, array {name!r},")
            return found
    except (
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
    ) as error:
        raise ScoreTableError(f"{path} is damaged or no .npz ({error}); save it again") from error


def array_of(content: bytes, where: str) -> NDArray[Any]:
    """A read-only array over the bytes of a `.npy`, after its header was held against them."""
    file = BytesIO(content)
    try:
        version = npy.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = npy.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = npy.read_array_header_2_0(file)
        else:
            raise ScoreTableError(
                f"{where} has version {version}: a structured array; save a plain one"
            )
    except ScoreTableError:
        raise
    except (ValueError, EOFError, SyntaxError) as error:
        raise ScoreTableError(f"{where} is no array of numpy ({error}); save it again") from error
    if dtype.hasobject:
        raise ScoreTableError(f"{where} {UNPICKLED}")
    cells = math.prod(shape)
    body = len(content) - file.tell()
    if min(shape, default=0) < 0 or cells * dtype.itemsize != body or (cells and not body):
        raise ScoreTableError(
            f"{where} claims {dtype} of shape {shape}, so {cells * dtype.itemsize:,} bytes, but has {body:,}: it was "
            "cut short or altered; save it again"
        )
    values = np.frombuffer(content, dtype, offset=file.tell()) if body else np.empty(0, dtype)
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)
