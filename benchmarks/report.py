"""What every benchmark needs to report: rows of runs, machine, versions, Markdown tables, a place in README.md."""

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def describe_run(packages):
    """Return one line with the date, the machine and the versions of Python and some packages."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    date = datetime.datetime.now(datetime.UTC).date()
    return f"{date}, {os.cpu_count()} cores of {_processor()}, Python {platform.python_version()}, {versions}."


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


def add_row(path, row, key):
    """Add a run, a dict, to a CSV file, in place of the one with equal values of the columns ``key``."""
    row = {name: str(value) for name, value in row.items()}
    rows = [old for old in read_rows(path) if any(old[name] != row[name] for name in key)] + [row]
    partial = Path(path).with_suffix(".partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
    print(row, file=sys.stderr, flush=True)


def summarise(rows, name, digits):
    """Return "mean (smallest to largest)" of a column; nothing if a run has no such number, as without modes."""
    values = np.array([float(row.get(name) or "nan") for row in rows])
    if not len(values) or np.isnan(values).any():
        return ""
    mean, low, high = (f"{value:.{digits}f}" for value in (values.mean(), values.min(), values.max()))
    return mean if low == high else f"{mean} ({low} to {high})"


def write_section(name, text, path=FOLDER / "README.md"):
    """Put a text between the lines ``<!-- name -->`` and ``<!-- end of name -->`` of a Markdown file.

    Raises:
        ValueError: if the file has no such lines.
    """
    content = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    pattern = re.compile(f"({re.escape(begin)}).*?({re.escape(end)})", flags=re.DOTALL)
    content, count = pattern.subn(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", content)
    if count != 1:
        raise ValueError(f"{path} must have one section between {begin.strip()!r} and {end!r}, found {count}")
    partial = path.with_suffix(".partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)  # at once, so that an interrupted run leaves the old file
    print(f"{text}\n\n(written to {path})", file=sys.stderr)


def _processor():
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or another architecture
        return platform.processor() or platform.machine()
