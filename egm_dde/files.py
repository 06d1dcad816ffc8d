"""Files that are replaced as a whole or not at all: a kill or a full disk leaves the old one."""

import contextlib
import os
import shutil
import tempfile
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
    try:
        yield folder / path.name
        for new in sorted(folder.iterdir(), key=lambda new: new.name == path.name):  # the one asked for comes last
            if new.is_dir() and (path.parent / new.name).exists():  # only files can be replaced in one go
                os.rename(path.parent / new.name, folder / f"{new.name}.old")
            os.replace(new, path.parent / new.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
