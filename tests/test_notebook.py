import contextlib
import errno
import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import nbformat
import pytest

from egm_dde import notebook

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "egm_dde.notebook"]
TRAINING = """
handle = display({"text/plain": "start"}, raw=True, display_id=True)
for epoch in 1, 2, 3:
    handle.update({"text/plain": f"epoch {epoch}/3, gen_loss 0.123, {3 - epoch} s to go"}, raw=True)
"""


@pytest.fixture
def write_notebook(tmp_path):
    """Writes a notebook of the given cells, Markdown where they begin with `#`."""

    def write(*sources):
        kinds = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
        cells = [kinds[source.startswith("#")](source) for source in sources]
        path = tmp_path / "notebook.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    return write


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def execute(path):
    assert notebook.main([str(path)]) == 0
    return code_cells(path)


def fail(path):
    """Execute a notebook in vain: it stays as it was, with nothing beside it that was not there before."""
    before, folder = path.read_bytes(), set(path.parent.iterdir())
    assert notebook.main([str(path)]) == 1
    assert path.read_bytes() == before and set(path.parent.iterdir()) == folder


def test_outputs_are_written_and_shown_as_they_come_and_again_the_same(write_notebook, capsys):
    path = write_notebook("# Story", "answer = 6 * 7", "## Training the net", TRAINING, "print(answer)\nanswer")
    path.chmod(0o640)
    cells = execute(path)
    assert [cell.execution_count for cell in cells] == [1, 2, 3]
    assert not cells[0].outputs
    assert cells[1].outputs[0].data["text/plain"] == "epoch 3/3, gen_loss 0.123, 0 s to go"
    assert [output.output_type for output in cells[2].outputs] == ["stream", "execute_result"]
    assert cells[2].outputs[0].text == "42\n"
    assert all(cell.metadata == {} for cell in cells)
    lines = [re.sub(r"[0-9.]+ s\b(?! to go)", "# s", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        f"{path}",
        "[2/5] answer = 6 * 7",
        "    (# s)",
        '[4/5] handle = display({"text/plain": "start"}, raw=True, display_id=True)',
        "    epoch 1/3, gen_loss 0.123, 2 s to go",
        "    epoch 3/3, gen_loss 0.123, 0 s to go",
        "    (# s)",
        "[5/5] print(answer)",
        "    (# s)",
        f"{path} written, # s in total",
    ]
    first = path.read_bytes()
    execute(path)
    assert path.read_bytes() == first
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(path.parent.iterdir()) == [path]
    assert nbformat.read(path, as_version=4).metadata == notebook.METADATA


def test_kernel_is_this_python_in_the_notebooks_folder_and_environment(write_notebook, tmp_path, monkeypatch):
    other_python = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    other_python.parent.mkdir(parents=True)
    other_python.write_text(json.dumps({"argv": ["false"], "display_name": "other", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("DATASET", "rings")
    monkeypatch.setenv("MPLBACKEND", "agg")  # of the shell, where figures are not inline
    names = "sys.executable, os.getcwd(), os.environ['DATASET'], os.environ['MPLBACKEND']"
    log_of_compiled_libraries = "n = os.write(2, b'noise'), os.write(1, b'noise')"
    cell = execute(write_notebook(f"import os, sys\n{log_of_compiled_libraries}\nprint({names}, sep='\\n')"))[0]
    *lines, backend = cell.outputs[0].text.splitlines()
    assert len(cell.outputs) == 1 and lines == [sys.executable, str(tmp_path.resolve()), "rings"]
    assert "inline" in backend


def test_error_leaves_the_file_as_it_was(write_notebook, capsys):
    fail(write_notebook("print('fine')", "1 / 0", "print('never')"))
    printed = capsys.readouterr()
    assert "ZeroDivisionError: division by zero" in printed.err
    assert "\x1b" not in printed.err
    assert "[2/3] 1 / 0" in printed.out and "[3/3]" not in printed.out


@pytest.mark.parametrize("at_start", [True, False])
def test_dead_kernel_leaves_the_file_as_it_was(write_notebook, capfd, monkeypatch, at_start):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    death = "import os\nn = os.write(2, b'out of luck')\nos._exit(3)"
    path = write_notebook(death)
    if at_start:
        path.with_name("ipykernel_launcher.py").write_text(death)  # found before the installed one
    fail(path)
    printed = capfd.readouterr()
    assert "out of luck" in printed.err and "Traceback" not in printed.err
    assert ("[1/1]" in printed.out) != at_start


def test_file_that_cannot_be_replaced_is_found_out_before_the_first_cell(write_notebook, capsys, monkeypatch):
    path = write_notebook("print('never')")
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
    fail(path)
    reason = f"{path} cannot be written: Read-only file system"
    assert capsys.readouterr() == ("", f"{path} is left as it was: {reason}\n")


def test_letters_that_the_terminal_does_not_have_are_replaced(write_notebook):
    path = write_notebook("error = '±0.004'\nprint(error)")
    ascii_terminal = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert b"[1/1] error = '?0.004'" in subprocess.check_output([*COMMAND, path], cwd=ROOT, env=ascii_terminal)
    assert code_cells(path)[0].outputs[0].text == "±0.004\n"


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_stops_the_kernel_and_leaves_the_file_as_it_was(write_notebook, signal_number):
    path = write_notebook(TRAINING + "import time\ntime.sleep(60)")
    before = path.read_bytes()
    listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # the background of a shell ignores it
    with subprocess.Popen(
        [*COMMAND, path], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listens
    ) as process:
        while "epoch" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal_number)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, f"\nInterrupted; {path} is left as it was.\n")
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [None, "no notebook", "[]"])
def test_path_without_a_notebook_ends_with_status_2(tmp_path, capsys, content):
    path = tmp_path / "missing.ipynb"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        notebook.main([str(path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"cannot read {path} as a notebook: " in error and ("No such file" in error) == (content is None)


def test_terminal_rewrites_one_line(write_notebook, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with contextlib.redirect_stdout(terminal):
        execute(write_notebook(TRAINING))
    progress = terminal.getvalue().split("\n")[2].split("\r\x1b[K")
    assert progress[1] == "    epoch 1/3, gen_loss 0.123, 2 s t..."
    assert len(progress) == 5
    assert re.fullmatch(r"    \([0-9.]+ s\)", progress[4])


def test_the_command_does_without_tensorflow():
    code = "import sys, egm_dde.notebook; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
