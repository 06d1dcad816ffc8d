"""Execute notebooks in place, showing which cell runs and how far it is: ``python -m egm_dde.notebook NOTEBOOK ...``.

The kernel is this Python, in the notebook's folder. An error or Ctrl-C leaves the file as it was. Progress is the
``text/plain`` form of any object that a cell displays with ``display(obj, display_id=True)`` and then updates.
"""

import argparse
import os
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
from nbclient.exceptions import CellExecutionError

from egm_dde.checks import format_duration
from egm_dde.files import check_writable, replacing

CLEAR_LINE = "\r\x1b[K"  # on a terminal, and go back to its start
SECONDS_BETWEEN_LINES = 10  # of progress, where lines cannot be rewritten
# The same on every machine, so that executing a notebook changes nothing but its outputs.
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python", "nbconvert_exporter": "python"}
LANGUAGE |= {"codemirror_mode": {"name": "ipython", "version": 3}, "pygments_lexer": "ipython3"}
METADATA = {"kernelspec": KERNEL, "language_info": LANGUAGE}


class ReportingClient(NotebookClient):
    """A client of nbclient that reports on the terminal: one line a cell, and one of progress below it."""

    def create_kernel_manager(self):  # that sees the kernel of this Python alone, none installed under the same name
        return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))

    def execute_reporting(self, **kernel_options):
        """Execute the cells in turn, with a line that names each and one that says how long it took."""
        with self.setup_kernel(**kernel_options):  # of nbclient's own loop, Ctrl-C would end the kernel alone
            cells = enumerate(self.nb.cells)
            for index, cell in ((i, cell) for i, cell in cells if cell.cell_type == "code" and cell.source.strip()):
                started, self.shown_at, self.pending = time.monotonic(), -float("inf"), ""
                print(shorten(f"[{index + 1}/{len(self.nb.cells)}] {cell.source.strip().splitlines()[0]}"), flush=True)
                try:
                    self.execute_cell(cell, index, execution_count=self.code_cells_executed + 1)
                finally:
                    duration = format_duration(time.monotonic() - started)
                    print(f"{self.pending}{CLEAR_LINE * sys.stdout.isatty()}    ({duration})", flush=True)

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "update_display_data":
            text = " ".join(msg["content"]["data"].get("text/plain", "").split())
            if text and not text.startswith("<"):  # an object without a text form of its own
                line = shorten("    " + text)
                if sys.stdout.isatty():
                    print(CLEAR_LINE + line, end="", flush=True)
                elif time.monotonic() - self.shown_at >= SECONDS_BETWEEN_LINES:
                    print(line, flush=True)
                    self.shown_at, self.pending = time.monotonic(), ""
                else:
                    self.pending = line + "\n"
        return super().process_message(msg, cell, cell_index)


def shorten(text):
    """Cut text to the width of the terminal: a line that wraps cannot be rewritten."""
    width = shutil.get_terminal_size().columns - 1
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."


def execute_in_place(path, notebook):
    """Execute a notebook, as read by nbformat from ``path``, and write it back once all cells have succeeded."""
    started = time.monotonic()
    print(path)
    options = {"record_timing": False, "coalesce_streams": True, "shutdown_kernel": "immediate"}
    # TensorFlow's C++ log ignores Python's streams; captured, it would be kept in the outputs.
    client = ReportingClient(notebook, extra_arguments=["--IPKernelApp.capture_fd_output=False"], **options)
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # figures stay inline
    with tempfile.TemporaryFile() as log:  # what compiled libraries write would tear the line of progress
        try:
            client.execute_reporting(cwd=str(path.resolve().parent), env=environment, stdout=log, stderr=log)
        except RuntimeError:  # the kernel has died, perhaps while starting
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.update(METADATA)
    with replacing(path) as temporary:
        temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")
    print(f"{path} written, {format_duration(time.monotonic() - started)} in total")


def main(arguments=None):
    """Run the command line; return its exit status: 0, 1 after an error, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Execute notebooks in place, with progress on the terminal.")
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK", help="path of an .ipynb file")
    notebooks = {}
    for path in parser.parse_args(arguments).notebooks:
        try:
            notebooks[path] = nbformat.read(path, as_version=4)
        except Exception as error:  # nbformat raises errors of many types
            parser.error(f"cannot read {path} as a notebook: {error}")
    try:
        for path in notebooks:
            check_writable(path)
        for path, notebook in notebooks.items():
            execute_in_place(path, notebook)
    except (CellExecutionError, OSError, RuntimeError) as error:
        message = str(error) if sys.stderr.isatty() else re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        print(f"{path} is left as it was: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted; {path} is left as it was.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without some letter must not end the work
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the kernel must not live on
    sys.exit(main())
