"""What every benchmark needs to report: rows of runs, machine, versions, Markdown tables, a place in README.md."""

import csv
import datetime
import importlib.metadata
import io
import os
import platform
import re
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np

from egm_dde.files import replacing

FOLDER = Path(__file__).parent
LINE_LENGTH = 120  # of Markdown; rows of tables stay whole


def describe_run(packages):
    """Return one line with the date, the machine and the versions of Python and some packages."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    date = datetime.datetime.now(datetime.UTC).date()
    return f"{date}, {os.cpu_count()} cores of {_processor()}, Python {platform.python_version()}, {versions}."


def read_run_line(section, path=FOLDER / "README.md"):
    """Return the line of ``describe_run`` that stands in a section: that of the runs whose table is made anew."""
    content = path.read_text(encoding="utf-8").partition(f"<!-- {section} -->")[2].partition("<!-- end of")[0]
    lines = re.findall(r"\d{4}-\d\d-\d\d, \d+ cores of [^|]*?\.(?=\n\n)", content)
    if len(lines) != 1:
        raise ValueError(f"{path} must have one line with date and machine in {section!r}, found {len(lines)}")
    return " ".join(lines[0].split())


def find_run_line(section, packages, is_kept, path=FOLDER / "README.md"):
    """Return the line with date and machine for a section: of this run, or, of a table of kept runs, the old one."""
    return read_run_line(section, path) if is_kept else describe_run(packages)


def make_table(header, rows):
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def read_rows(path):
    """Return the runs in a CSV file, a list of dicts of strings; none if there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def replace_run(path, key, rows):
    """Write the rows of a run, dicts, to a CSV file, in place of all rows with the values ``key``, a dict, of it."""
    key = {name: str(value) for name, value in key.items()}
    rows = [row for row in read_rows(path) if key.items() - row.items()] + rows
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), newline="")


def add_row(path, row, key):
    """Add a run of one row to a CSV file, in place of the one with equal values of the columns ``key``."""
    replace_run(path, {name: row[name] for name in key}, [row])
    print(row, file=sys.stderr, flush=True)


def describe_spread(values, write=None):
    """Return "mean (smallest to largest)", or nothing if there are none or a run has no such number.

    ``write`` makes text of a number; None gives it three significant digits.
    """
    if not len(values) or np.isnan(values).any():
        return ""
    write = write or partial(np.format_float_positional, precision=3, fractional=False, trim="-")
    mean, low, high = (write(value) for value in (np.mean(values), np.min(values), np.max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def summarise(rows, name, digits):
    """Return the spread of a column of rows, with so many digits; nothing if a run lacks it, as without modes."""
    return describe_spread([float(row.get(name) or "nan") for row in rows], lambda value: f"{value:.{digits}f}")


def wrap_text(text):
    """Break the lines of a Markdown text that are too long, but not the rows of its tables, nor words."""
    wrapper = textwrap.TextWrapper(LINE_LENGTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(line if line.startswith("|") else wrapper.fill(line) for line in text.splitlines())


def write_section(name, text, path=FOLDER / "README.md"):
    """Put a text, its lines wrapped, between ``<!-- name -->`` and ``<!-- end of name -->`` of a Markdown file.

    Raises:
        ValueError: if the file has no such lines.
    """
    text = wrap_text(text)
    content = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", flags=re.DOTALL)
    content, count = pattern.subn(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", content)
    if count != 1:
        raise ValueError(f"{path} must have one section between {begin.strip()!r} and {end!r}, found {count}")
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    print(f"{text}\n\n(written to {path})", file=sys.stderr)


def _processor():
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or another architecture
        return platform.processor() or platform.machine()
