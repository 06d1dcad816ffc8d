"""Execute notebooks in place, showing on the terminal which cell runs and how far its training is.

    python -m egm_dde.notebook NOTEBOOK [NOTEBOOK ...]

The kernel is the Python that runs this script, started in the notebook's folder. A notebook is written
only after all of its cells have succeeded; after an error or Ctrl-C the file is what it was.

Live progress comes from any object that a cell displays with ``display(obj, display_id=True)`` and then
updates: its ``text/plain`` form is shown.
"""

import argparse
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from egm_dde.files import replacing

SECONDS_BETWEEN_LINES = 10  # of progress, where lines cannot be rewritten

# The same on every machine, so that executing a notebook changes nothing but its outputs.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    },
}


class CellReport:
    """What the terminal shows of one running cell: its label, live progress and elapsed time.

    On a terminal, progress rewrites one line; elsewhere it is a whole line every now and then.

    Args:
        label: Text that identifies the cell.
        stream: Where to write; standard output by default.
    """

    def __init__(self, label, stream=None):
        self.stream = stream or sys.stdout
        self.rewrites = self.stream.isatty()
        self.started = time.monotonic()
        self.progress = self.printed_progress = None
        self.printed_at = -float("inf")
        self.write(shorten(label, terminal_width() - len("  (59 min 59 s)")))

    def show_progress(self, text):
        """Shows one state of progress, given as text."""
        self.progress = "    " + text
        if self.rewrites:
            start = "\r\x1b[K" if self.printed_progress else "\n"
            self.write(start + shorten(self.progress, terminal_width()))  # a wrapped line cannot be rewritten
        elif time.monotonic() - self.printed_at >= SECONDS_BETWEEN_LINES:
            self.write(self.progress)
            self.printed_at = time.monotonic()
        else:
            return
        self.printed_progress = self.progress

    def finish(self):
        """Shows the last progress, if it is still to be shown, and the elapsed time."""
        if self.progress != self.printed_progress:
            self.write(self.progress)
        elapsed = format_duration(time.monotonic() - self.started)
        self.write(f"  ({elapsed})\n" if self.rewrites else f"    ({elapsed})")

    def write(self, text):
        """Writes at once: as it is on a terminal, as a whole line elsewhere."""
        print(text, end="" if self.rewrites else "\n", file=self.stream, flush=True)


class ReportingClient(NotebookClient):
    """Executes the cells of one notebook on this script's own Python and reports on the terminal."""

    def create_kernel_manager(self):
        """Makes a manager that cannot see a kernel of another Python installed under the same name."""
        own_kernel_only = KernelSpecManager(kernel_dirs=[])
        return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=own_kernel_only)

    def process_message(self, msg, cell, cell_index):
        """Shows updates of displayed objects, then records the message as usual."""
        if msg["msg_type"] == "update_display_data":
            text = " ".join(msg["content"]["data"].get("text/plain", "").split())
            if text and not text.startswith("<"):  # an object that has no text form of its own
                self.report.show_progress(text)
        return super().process_message(msg, cell, cell_index)

    def execute_reporting(self, **kernel_options):
        """Executes every code cell of the notebook in turn.

        Args:
            **kernel_options: Passed on to the kernel's process, such as `cwd`.

        Raises:
            CellExecutionError: A cell raised an error.
            DeadKernelError: The kernel's process ended by itself.
        """
        total = sum(is_executable(cell) for cell in self.nb.cells)
        with self.setup_kernel(**kernel_options):
            for index, cell in enumerate(self.nb.cells):
                heading = last_heading(cell)
                if heading:
                    print(heading)
                if not is_executable(cell):
                    continue
                count = self.code_cells_executed + 1
                first_line = cell.source.strip().splitlines()[0]
                self.report = CellReport(f"[{count:{len(str(total))}}/{total}] {first_line}")
                try:
                    self.execute_cell(cell, index, execution_count=count)
                finally:
                    self.report.finish()


def is_executable(cell):
    """Says whether a notebook cell holds code."""
    return cell.cell_type == "code" and bool(cell.source.strip())


def last_heading(cell):
    """Returns the text of the last heading in a Markdown cell, or None."""
    headings = re.findall(r"^#{1,6}\s+(.+?)\s*$", cell.source, re.MULTILINE)
    return headings[-1] if headings and cell.cell_type == "markdown" else None


def terminal_width():
    """Returns the number of characters that fit on a line without touching the edge."""
    return shutil.get_terminal_size().columns - 1


def shorten(text, width):
    """Cuts text to a width, with an ellipsis where something is missing."""
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."


def format_duration(seconds):
    """Writes a duration for people: `8.2 s` or `3 min 05 s`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s"


def execute_in_place(path, notebook):
    """Executes a notebook and writes it back to its file.

    Args:
        path: The notebook's file.
        notebook: Its content, as read by `nbformat`.

    Raises:
        CellExecutionError: A cell raised an error; the file is unchanged.
        DeadKernelError: The kernel's process ended by itself; the file is unchanged.
    """
    started = time.monotonic()
    file = path.resolve()  # a link stays a link
    print(path)
    client = ReportingClient(
        notebook,
        timeout=None,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        shutdown_kernel="immediate",
        # TensorFlow's C++ log ignores Python's streams; captured, it would be kept in the outputs.
        extra_arguments=["--IPKernelApp.capture_fd_output=False"],
    )
    with tempfile.TemporaryFile() as kernel_log:
        try:
            client.execute_reporting(cwd=str(file.parent), stdout=kernel_log, stderr=kernel_log)
        except DeadKernelError:
            kernel_log.seek(0)
            sys.stderr.write(kernel_log.read().decode(errors="replace"))
            raise
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.update(METADATA)
    with replacing(file) as temporary:
        temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")
        shutil.copymode(file, temporary)
    print(f"{path} written, {format_duration(time.monotonic() - started)} in total")


def main(arguments=None):
    """Runs the command line.

    Args:
        arguments: The command's arguments; those of the process by default.

    Returns:
        The exit status: 0, 1 after an error in a cell, 130 after Ctrl-C. A path that is no notebook ends
        the process with status 2.
    """
    parser = argparse.ArgumentParser(description="Execute notebooks in place, with progress on the terminal.")
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK", help="path of an .ipynb file")
    notebooks = []
    for path in parser.parse_args(arguments).notebooks:
        try:
            notebooks.append((path, nbformat.read(path, as_version=4)))
        except OSError as error:
            parser.error(f"cannot read {path}: {error.strerror}")
        except Exception:  # nbformat raises errors of many types
            parser.error(f"{path} is not a notebook")
    for path, notebook in notebooks:
        try:
            execute_in_place(path, notebook)
        except (CellExecutionError, DeadKernelError) as error:
            message = str(error) if sys.stderr.isatty() else re.sub(r"\x1b\[[0-9;]*m", "", str(error))
            print(f"{message}\n{path} is left as it was.", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"\nInterrupted; {path} is left as it was.", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the kernel must not live on
    sys.exit(main())
