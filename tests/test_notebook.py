import contextlib
import functools
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from egm_dde import notebook

ROOT = Path(__file__).parent.parent
TRAINING = """
from IPython.display import display

class Progress:
    epoch = 0
    def __repr__(self):
        return f"epoch {self.epoch}/3, gen_loss 0.123, {3 - self.epoch} s to go"

progress = Progress()
handle = display(progress, display_id=True)
for progress.epoch in 1, 2, 3:
    handle.update(progress)
"""


@pytest.fixture
def write_notebook(tmp_path):
    """Writes a notebook of the given cells, Markdown where they begin with `#`."""

    def write(*sources):
        cells = [
            (nbformat.v4.new_markdown_cell if source.startswith("#") else nbformat.v4.new_code_cell)(source)
            for source in sources
        ]
        path = tmp_path / "notebook.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return path

    return write


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_outputs_are_written_and_shown_as_they_come(write_notebook, capsys):
    path = write_notebook("# Story", "answer = 6 * 7", "## Training the net", TRAINING, "print(answer)\nanswer")

    assert notebook.main([str(path)]) == 0

    cells = code_cells(path)
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
        "[4/5] from IPython.display import display",
        "    epoch 1/3, gen_loss 0.123, 2 s to go",
        "    epoch 3/3, gen_loss 0.123, 0 s to go",
        "    (# s)",
        "[5/5] print(answer)",
        "    (# s)",
        f"{path} written, # s in total",
    ]


def test_executing_again_changes_nothing(write_notebook):
    path = write_notebook("# Story", "import numpy", "print(numpy.arange(3))")
    path.chmod(0o640)
    assert notebook.main([str(path)]) == 0
    first = path.read_bytes()

    assert notebook.main([str(path)]) == 0

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
    path = write_notebook("import os, sys\nprint(sys.executable, os.getcwd(), os.environ['DATASET'], sep='\\n')")

    assert notebook.main([str(path)]) == 0

    text = code_cells(path)[0].outputs[0].text
    assert text.splitlines() == [sys.executable, str(tmp_path.resolve()), "rings"]


def test_log_of_compiled_libraries_is_not_kept(write_notebook):
    path = write_notebook("import os\nn = os.write(2, b'noise'), os.write(1, b'noise')")
    assert notebook.main([str(path)]) == 0
    assert not code_cells(path)[0].outputs


def test_error_leaves_the_file_as_it_was(write_notebook, capsys):
    path = write_notebook("print('fine')", "1 / 0", "print('never')")
    before = path.read_bytes()

    assert notebook.main([str(path)]) == 1

    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    printed = capsys.readouterr()
    assert "ZeroDivisionError: division by zero" in printed.err
    assert "\x1b" not in printed.err
    assert "[2/3] 1 / 0" in printed.out and "[3/3]" not in printed.out


def test_dead_kernel_leaves_the_file_as_it_was(write_notebook, capfd):
    path = write_notebook("import os\nn = os.write(2, b'out of luck')\nos._exit(3)")
    before = path.read_bytes()

    assert notebook.main([str(path)]) == 1

    assert path.read_bytes() == before
    assert "out of luck" in capfd.readouterr().err


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_stops_the_kernel_and_leaves_the_file_as_it_was(write_notebook, signal_number):
    path = write_notebook(TRAINING + "import time\ntime.sleep(60)")
    before = path.read_bytes()
    command = [sys.executable, "-m", "egm_dde.notebook", path]
    listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # the background of a shell ignores it
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listens
    ) as process:
        while "epoch" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal_number)
        _, error = process.communicate(timeout=30)

    assert process.returncode == 130
    assert error == f"\nInterrupted; {path} is left as it was.\n"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("no notebook", "as a notebook"), ("[]", "as a notebook")],
)
def test_path_without_a_notebook_ends_with_status_2(tmp_path, capsys, content, message):
    path = tmp_path / "missing.ipynb"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        notebook.main([str(path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_rewrites_one_line(write_notebook, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal):
        assert notebook.main([str(write_notebook(TRAINING))]) == 0
    progress = terminal.getvalue().split("\n")[2].split("\r\x1b[K")
    assert progress[1] == "    epoch 1/3, gen_loss 0.123, 2 s t..."
    assert len(progress) == 5
    assert re.fullmatch(r"    \([0-9.]+ s\)", progress[4])


def test_the_command_does_without_tensorflow():
    code = "import sys, egm_dde.notebook; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
