#!/usr/bin/env python3
"""Fail when a file is denser than the aims of the project.

Usage: python .ci/density.py jupyter_interpreter_mcp.py [more.py ...]

It runs measure.py, prints what that prints, and compares: also the code in string
constants, which measure.py reports as files of their own.
"""

import re
import subprocess
import sys
from pathlib import Path

# The second line of measure.py's report on a file, for example:
# 900 statements of 6.5 nodes, 3 of more than 25; in 1,000: 4 packed, 20 conditional,
# 2 walrus; 0 % wide; 9.1 % air
FIGURES = re.compile(
    r"""
    statements\ of\ (?P<nodes>[\d.]+)\ nodes
    .*?\ (?P<packed>\d+)\ packed
    .*?\ (?P<conditional>\d+)\ conditional
    .*?\ (?P<walrus>\d+)\ walrus
    .*?\ (?P<wide>\d+)\ %\ wide
    .*?\ (?P<air>[\d.]+)\ %\ air
    """,
    re.VERBOSE,
)
AT_MOST = {"nodes": 7.0, "packed": 10, "conditional": 25, "walrus": 5, "wide": 2}
AT_LEAST = {"air": 8.0}


def misses(report: str) -> list[str]:
    """Return a sentence for each aim that a report misses."""
    found = []
    for match in FIGURES.finditer(report):
        figures = {name: float(value) for name, value in match.groupdict().items()}
        for name, most in AT_MOST.items():
            if figures[name] > most:
                found.append(f"{name}: {figures[name]:g}, at most {most:g}")
        for name, least in AT_LEAST.items():
            if figures[name] < least:
                found.append(f"{name}: {figures[name]:g}, at least {least:g}")
    return found


def main(files: list[str]) -> int:
    """Measure files; return the exit status."""
    measure = [sys.executable, str(Path(__file__).with_name("measure.py"))]
    ended = subprocess.run(
        [*measure, *files], capture_output=True, text=True, check=True
    )
    print(ended.stdout, end="")
    if not FIGURES.search(ended.stdout):
        print("measure.py gave no figures")
        return 1

    missed = misses(ended.stdout)
    for sentence in missed:
        print(f"too dense: {sentence}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
