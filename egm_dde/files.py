"""Files that are replaced as a whole or not at all: a kill or a full disk leaves the old one."""

import contextlib
import errno
import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside ``path``; once it is written, put it there, with whatever is written beside it."""
    path = Path(path).resolve()  # a link stays a link
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    moved = []  # old folders, set aside
    try:
        yield folder / path.name
        for new in sorted(folder.iterdir(), key=lambda new: new.name == path.name):  # the one asked for comes last
            place, old = path.parent / new.name, folder / f"{new.name}.old"
            if new.is_dir() and place.exists():  # only files can be replaced in one go
                moved.append((old, place))
                os.rename(place, old)
            with contextlib.suppress(OSError):  # there is no old file, or its file system has no permissions
                shutil.copymode(place, new)
            os.replace(new, place)
    finally:
        for old, place in moved:
            if not place.exists():  # an error or Ctrl-C came between the two renames
                os.rename(old, place)
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(path):
    """Raise OSError unless ``replacing`` can write a file: replace it by its copy. Missing folders are made."""
    path = Path(path)
    try:
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(parents=True)
        with replacing(path) as temporary:
            if path.exists():
                shutil.copyfile(path, temporary)
                with contextlib.suppress(OSError):
                    shutil.copystat(path, temporary)
    except OSError as error:
        hint = " (if it is mounted on its own, mount its folder instead)" if error.errno == errno.EBUSY else ""
        raise OSError(f"{path} cannot be written: {error.strerror or error}{hint}") from error


class NamedMemory(io.BytesIO):
    """A file in memory, where HDF5 writes first: on a full disk it would crash the process.

    Keras looks at the end of its name. Up to version 3.9 it opens the file of that name instead.
    """

    def __init__(self, path):
        super().__init__()
        self.path = path

    def __str__(self):
        return str(self.path)


def check_archive(path):
    """Raise ValueError unless a file is a whole ``.keras`` file."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            missing = {"config.json", "metadata.json", "model.weights.h5"} - set(archive.namelist())
    except Exception as error:  # damage can raise errors of any type
        raise ValueError(f"{path} is truncated, damaged or no .keras file: {error}") from error
    if damaged or missing:
        what = f"{damaged} in it is damaged" if damaged else f"it has no {' and '.join(sorted(missing))}"
        raise ValueError(f"{path} is no whole .keras file: {what}")
