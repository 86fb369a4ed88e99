"""The files of a folder or zip by relative name. Neither is trusted: sizes, names and links are checked."""

import dataclasses
import os
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from dnnlib import UserError, open_plain
from torch_utils.untrusted.bounds import open_zip

MAX_FILE_BYTES = 1 << 28  # of an image file
ENCRYPTED = 1  # among the flags of a zip's entry


class DatasetError(UserError):
    """A UserError that stays one line when it comes out of a data-loader worker.

    There torch rebuilds the exception from its printed traceback; the message is what follows the class name.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.rpartition("DatasetError: ")[2].split()))


@dataclasses.dataclass
class _Contents:
    """files: what the zip calls each file; of a folder, the name itself. empty: folders without visible contents."""

    files: dict[str, str] = dataclasses.field(default_factory=dict)
    hidden: list[str] = dataclasses.field(default_factory=list)
    empty: list[str] = dataclasses.field(default_factory=list)


class FileTree:
    """The files of a folder or zip, read by relative name with forward slashes, also in data-loader workers.

    Names in a zip lose what changes nothing: `./a.png`, `/a.png` and `a.png` are one name, and backslashes separate
    folders, as some Windows programs write them. Links to folders are followed.

    option: the command-line option that errors name.
    Errors: DatasetError, here and in the methods, when the path or a file isn't there, is broken or too large, or when
    a name is ambiguous: two entries of a zip, a folder that a link gives a second name.
    """

    def __init__(self, path: str | os.PathLike, option: str = "--data"):
        self.path, self.what = Path(path), f"{option}={path}"
        self._zip, self._zip_pid, self._found = None, None, None
        if self.path.is_dir():
            self.is_zip = False
        elif self.path.is_file() and zipfile.is_zipfile(self.path):
            self.is_zip = True
        else:
            found = "is neither a folder nor a zip file" if self.path.exists() else "doesn't exist"
            raise DatasetError(f"{self.what} {found}; give a folder or zip of images")

    def names(self) -> list[str]:
        """The names of all files except hidden ones, sorted."""
        return sorted(self._contents().files)

    def hidden(self) -> list[str]:
        """The names that `names` leaves out, sorted: they start with a dot, or lie in such a folder or in __MACOSX."""
        return sorted(self._contents().hidden)

    def empty_folders(self) -> list[str]:
        """The names of folders that hold neither files nor folders, sorted."""
        return sorted(self._contents().empty)

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        """The contents of one of `names()`, at most `max_bytes`, by default MAX_FILE_BYTES."""
        max_bytes = MAX_FILE_BYTES if max_bytes is None else max_bytes
        try:
            with self._open(name) as file:
                size = self._info(name).file_size if self.is_zip else os.fstat(file.fileno()).st_size
                if size > max_bytes:
                    raise ValueError(f"it is larger than {max_bytes / 2**20:.4g} MiB")
                return file.read(size)
        except Exception as error:  # zipfile passes on what its decompressors raise
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DatasetError(f"{self.what}: can't read {name}: {reason}") from None

    def size_and_crc(self, name: str) -> tuple[int, int]:
        """The size in bytes and CRC-32 of one of `names()`; of a zip only its directory is read."""
        if self.is_zip:
            return self._info(name).file_size, self._info(name).CRC
        content = self.read(name)
        return len(content), zlib.crc32(content)

    def _open(self, name: str) -> IO[bytes]:
        if not self.is_zip:
            return open_plain(self.path / name)
        info = self._info(name)
        if info.flag_bits & ENCRYPTED:
            raise ValueError("it is encrypted; pack the zip without a password")
        return self._open_zip().open(info)

    def _info(self, name: str) -> zipfile.ZipInfo:
        return self._open_zip().getinfo(self._contents().files[name])

    def _open_zip(self) -> zipfile.ZipFile:
        if self._zip_pid != os.getpid():  # a forked worker would share the parent's file position
            try:
                self._zip, self._zip_pid = open_zip(self.path), os.getpid()
            except Exception as error:  # zipfile passes on what parsing a broken directory raises
                raise DatasetError(f"{self.what} is not a readable zip: {str(error) or type(error).__name__}") from None
        assert self._zip is not None
        return self._zip

    def _contents(self) -> _Contents:
        if self._found is None:
            self._found = self._list_zip() if self.is_zip else self._list_folder()
        return self._found

    def _list_zip(self) -> _Contents:
        found, folders = _Contents(), set()
        for info in self._open_zip().infolist():
            parts = [part for part in info.filename.replace("\\", "/").split("/") if part not in ("", ".")]
            name = "/".join(parts)
            if ".." in parts:
                raise DatasetError(f"{self.what}: {name} leads out of the zip; pack it again without '..' in its names")
            if stat.S_ISLNK(info.external_attr >> 16):
                raise DatasetError(f"{self.what}: {name} is a link; pack what it leads to, as zip does without -y")
            if not parts:
                continue
            if info.filename.endswith(("/", "\\")):
                folders.add(name)
            elif any(map(_is_hidden, parts)):
                found.hidden.append(name)
            elif name in found.files:
                raise DatasetError(f"{self.what} holds two files with the name {name}; remove one")
            else:
                found.files[name] = info.filename
        used = {str(parent) for name in [*found.files, *folders] for parent in PurePosixPath(name).parents}
        found.empty = [name for name in folders - used if not any(map(_is_hidden, name.split("/")))]
        return found

    def _list_folder(self) -> _Contents:
        found, waiting, names_of = _Contents(), [""], {}
        root = os.path.realpath(self.path)
        while waiting:
            name = waiting.pop()
            place = os.path.realpath(self.path / name)
            if place in names_of or (name and f"{root}/".startswith(f"{place.rstrip('/')}/")):
                first = names_of.get(place) or "a folder above it"
                raise DatasetError(f"{self.what}: {name} and {first} are the same folder; remove the link to it")
            names_of[place] = name
            try:
                with os.scandir(self.path / name) as entries:
                    entries = list(entries)
            except OSError as error:
                raise DatasetError(f"{self.what}: can't list the folder {name or '.'}: {error.strerror}") from None
            if name and all(_is_hidden(entry.name) for entry in entries):
                found.empty.append(name)
            for entry in entries:
                path = f"{name}/{entry.name}" if name else entry.name
                if _is_hidden(entry.name):
                    found.hidden.append(path)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    raise DatasetError(f"{self.what}: {path} is a link to what isn't there; remove it or mend it")
                elif entry.is_dir():
                    waiting.append(path)
                else:
                    found.files[path] = path
        return found

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_zip": None, "_zip_pid": None, "_found": None}


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"
