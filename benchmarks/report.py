"""What every benchmark needs to report: the machine, the versions, Markdown tables, and a place in README.md."""

import datetime
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

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
