"""Files that are replaced as a whole or not at all: a kill or a full disk leaves the old one."""

import contextlib
import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """Let a file or folder be written beside ``path``, and put it there once it is complete.

    Args:
        path: what to replace, or make; a link to it stays a link.

    Yields:
        A temporary ``pathlib.Path`` of the same name to write to. Whatever else is written beside it comes along.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    path = Path(path).resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    moved = []  # old folders, set aside
    try:
        yield folder / path.name
        for new in sorted(folder.iterdir(), key=lambda new: new.name == path.name):  # the one asked for comes last
            place = path.parent / new.name
            if new.is_dir() and place.exists():  # only files can be replaced in one go
                moved.append((folder / f"{new.name}.old", place))
                os.rename(place, moved[-1][0])
            os.replace(new, place)
    finally:
        for old, place in moved:
            if not place.exists():  # an error or Ctrl-C came between the two renames
                os.rename(old, place)
        shutil.rmtree(folder, ignore_errors=True)


class NamedMemory(io.BytesIO):
    """A file in memory, where HDF5 writes first: on a full disk it would crash the process."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def __str__(self):  # Keras looks at the end of it
        return self.name


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
