"""numpy's files, .npy and .npz: read from callers who are not trusted, and written for them. No pickle is loaded."""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping

import numpy as np

from tiny_model_server import codec
from tiny_model_server.codec import Array, Buffer
from tiny_model_server.errors import InvalidInput

_MAX_HEADER = 1 << 12  # bytes; of a .npy
_MAX_ENTRIES, _MAX_DIRECTORY = 1024, 1 << 18  # of a .npz: arrays, and bytes that name them
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_END = struct.Struct("<4s6xHI4xH")  # of a zip file: mark, entries, bytes of the directory, bytes of a comment


def read_npy(data: Buffer) -> Array:
    """The array of a .npy file, a view of ``data`` if it is portable. InvalidInput if it is malformed."""
    file = io.BytesIO(data[: _MAX_HEADER + 12])
    try:
        shape, fortran, dtype = _READ_HEADER[np.lib.format.read_magic(file)](file, max_header_size=_MAX_HEADER)
    except Exception as error:  # it is evaluated as a Python literal, which may be anything
        raise InvalidInput(f"malformed .npy: {type(error).__name__}: {error}") from None
    if dtype.hasobject:
        raise InvalidInput("a .npy with Python objects is a pickle, which is never loaded; save numbers or texts")
    content = memoryview(data)[file.tell() :]
    if (size := codec.elements(shape) * dtype.itemsize) != len(content):
        raise InvalidInput(f"malformed .npy: {dtype} of shape {list(shape)} needs {size} bytes, not {len(content)}")
    try:
        return codec.portable(np.ndarray(shape, dtype, content, order="F" if fortran else "C"))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"a .npy that no model takes: {error}") from None


def read_npz(data: Buffer, take: Callable[[int], None]) -> dict[str, Array]:
    """The arrays of a .npz file by name. InvalidInput if it is malformed.

    ``take(size)`` is called before so many bytes are allocated, and may refuse them.
    """
    _check_directory(bytes(data[-42:]))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            names = [entry.filename.removesuffix(".npy") for entry in entries]
            if len(set(names)) != len(names) or len(names) > _MAX_ENTRIES:
                raise InvalidInput("a .npz has two arrays of one name, or too many")
            if not all(one.filename.endswith(".npy") and one.compress_type in _METHODS for one in entries):
                raise InvalidInput("a .npz holds .npy files alone, stored or deflated")
            take(sum(entry.file_size for entry in entries))
            return {name: read_npy(_content(archive, entry)) for name, entry in zip(names, entries, strict=True)}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError, struct.error) as error:
        raise InvalidInput(f"malformed .npz: {error}") from None


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as file:
        return file.read(entry.file_size)  # without a size, it would expand whatever follows


def _check_directory(end: bytes) -> None:
    """InvalidInput if reading a zip file's directory would take much: zipfile makes an object of each entry."""
    mark, count, size, comment = _END.unpack(end[-_END.size :].rjust(_END.size))
    if mark != b"PK\5\6" or comment or end.startswith(b"PK\6\7"):  # the last stands before it in a zip64 file
        raise InvalidInput("malformed .npz: it is cut off, or not as numpy.savez writes it")
    if count > _MAX_ENTRIES or size > _MAX_DIRECTORY:
        raise InvalidInput(f"a .npz may have {_MAX_ENTRIES} arrays, with short names; this has {count}")


def npy_file(array: Array) -> bytes:
    """The .npy file of a portable array."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return b"".join([header.getvalue(), codec.raw(array)])


def npz_file(arrays: Mapping[str, Array]) -> bytes:
    """The .npz file of portable arrays, not compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", npy_file(array))
    return file.getvalue()
