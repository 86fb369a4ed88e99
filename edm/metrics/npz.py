"""Reads arrays from untrusted `.npz` files: nothing is unpickled, and sizes are checked before memory is taken."""

import io
import math
import os
import zipfile

import numpy as np

from torch_utils.untrusted.bounds import check_unpacked, open_zip

MAX_ARRAYS = 1000  # in a file
MAX_TEXT_BYTES = 1 << 20
DOUBLE_BYTES = 8
MAX_HEADER_CHARACTERS = 10_000  # numpy's own limit
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_arrays(path: str | os.PathLike, kinds: dict[str, str], max_bytes: int) -> dict[str, np.ndarray]:
    """The arrays named in `kinds` that the file holds, writeable.

    kinds: numpy's letter for the kind of each: 'f' real numbers, 'u' unsigned whole numbers, 'U' text.
    max_bytes: of each array; checked before memory is taken, and compressed ones are not read any further.
    Errors: ValueError, with the reason, when the file isn't an .npz, is damaged, or has arrays of other kinds or sizes.
    """
    try:
        with open_zip(path, MAX_ARRAYS) as archive:
            entries = {name: archive.NameToInfo.get(f"{name}.npy") for name in kinds}
            return {
                name: _read(archive, entry, kinds[name], max_bytes)
                for name, entry in entries.items()
                if entry is not None
            }
    except MemoryError:
        raise ValueError("its arrays don't fit into memory") from None
    except Exception as error:  # what zipfile's decompressors and numpy's parser raise has no common type
        raise ValueError(str(error) or type(error).__name__) from None


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, kind: str, max_bytes: int) -> np.ndarray:
    max_bytes = min(max_bytes, MAX_TEXT_BYTES) if kind == "U" else max_bytes
    if entry.file_size > max_bytes:
        raise ValueError(f"{entry.filename} is larger than {max_bytes >> 20} MiB")
    check_unpacked(entry)
    with archive.open(entry) as file:
        start = file.read(MAX_HEADER_CHARACTERS + 100)  # the array's own header lies in it, or is too long
        header = io.BytesIO(start)
        read_header = HEADERS[np.lib.format.read_magic(header)]
        shape, fortran, dtype = read_header(header, max_header_size=MAX_HEADER_CHARACTERS)
        if dtype.kind != kind or dtype.hasobject:
            raise ValueError(f"{entry.filename} holds {str(dtype)[:80]}")
        if kind == "U" and shape:
            raise ValueError(f"{entry.filename} holds more than one text")
        if kind == "f" and math.prod(shape) * DOUBLE_BYTES > max_bytes:  # half precision takes a quarter in the file
            raise ValueError(f"{entry.filename} is larger than {max_bytes >> 20} MiB in double precision")
        wanted = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or wanted != entry.file_size - header.tell():
            raise ValueError(f"{entry.filename} has another size than it claims")
        data = bytearray(start[header.tell() :])
        while len(data) < wanted and (chunk := file.read(min(wanted - len(data), 1 << 24))):
            data += chunk  # in steps, so that memory follows the data and not the claimed size
    if len(data) != wanted:
        raise ValueError(f"{entry.filename} ends too early")
    array = np.frombuffer(data, dtype) if wanted else np.empty(0, dtype)
    return array.reshape(shape, order="F" if fortran else "C")
