"""Files and folders are replaced whole or not at all."""

import errno
import os
import re
import signal
from unittest.mock import DEFAULT, Mock

import pytest

from egm_dde import files


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    process = os.fork()
    if process == 0:
        with files.replacing(path) as temporary:
            temporary.write_text("new, but only ha")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert path.read_text() == "old"


def test_replacing_keeps_links_and_brings_companions(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with files.replacing(link) as temporary:
        temporary.write_text("new")
        temporary.with_name("companion").write_text("too")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert (tmp_path / "companion").read_text() == "too"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_trial_leaves_everything_as_it_was(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    os.utime(path, (1, 1))
    link.symlink_to("missing")
    for each in (path, link, tmp_path / "new" / "file"):
        files.check_writable(each)
    assert (path.read_text(), path.stat().st_mode & 0o777, path.stat().st_mtime) == ("old", 0o640, 1)
    assert {each.name for each in tmp_path.iterdir()} == {"file", "link", "new"} and link.is_symlink()
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [("file/below", "there is no folder"), ("folder", "Is a directory"), ("file", "busy .*mount its folder instead")],
)
def test_a_path_that_cannot_be_written_is_named(name, reason, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(errno.EBUSY, "Device or resource busy")))
    with pytest.raises(OSError, match=f"^{re.escape(str(tmp_path))}/{name} cannot be written: .*{reason}"):
        files.check_writable(tmp_path / name)


def write_folder(path, text):
    (path / "variables").mkdir(parents=True)
    (path / "variables" / "weights").write_text(text)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["writing", "before", "between", "after"])
def test_an_error_loses_no_folder(error, moment, monkeypatch, tmp_path):
    """An error comes while the folder is written, or before, between or after the two renames that replace it."""
    path = tmp_path / "exported"
    write_folder(path, "old")
    rename, replace = os.rename, os.replace

    def rename_once(source, target):
        monkeypatch.setattr(os, "rename", rename)
        if moment != "before":
            rename(source, target)
        if moment != "after":
            raise error

    def replace_once(source, target):
        replace(source, target)
        raise error

    if moment != "writing":
        monkeypatch.setattr(os, "rename", rename_once)
        monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(error), files.replacing(path) as temporary:
        write_folder(temporary, "new")
        if moment == "writing":
            raise error
    assert (path / "variables" / "weights").read_text() == ("new" if moment == "after" else "old")
    assert list(tmp_path.iterdir()) == [path]


def test_an_old_folder_that_cannot_be_put_back_is_kept(monkeypatch, tmp_path):
    path = tmp_path / "exported"
    write_folder(path, "old")
    monkeypatch.setattr(os, "rename", Mock(wraps=os.rename, side_effect=[DEFAULT, OSError]))
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError))
    with pytest.raises(OSError), files.replacing(path) as temporary:
        write_folder(temporary, "new")
    assert [each.read_text() for each in tmp_path.glob(".exported.*/exported.old/variables/*")] == ["old"]
