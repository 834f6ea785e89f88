"""Writes the tables and pictures of README.md and docs/ from bench/results alone.

    python -P bench/report/pages.py            (--check: only say whether the tables are up to date)

A table stands between <!-- bench:NAME --> and <!-- /bench:NAME -->; the pages of docs/benchmarks/ are written whole.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report import goals, headlines, tables
from report.cells import Rows
from suite.results import ROOT, load, pick

BLOCKS: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "readme": ("README.md", headlines.readme),
    "summary": ("docs/benchmarks.md", headlines.summary),
    "losing": ("docs/benchmarks.md", headlines.losing),
    "dpp": ("docs/dpp.md", tables.dpp_table),
    "losses": ("docs/losses.md", tables.losses_table),
    "dpp-goals": ("docs/dpp.md", goals.dpp_goals),
    "sampled-error": ("docs/linear_logps.md", tables.sampled_error),
    "logps": ("docs/linear_logps.md", tables.logps_table),
    "logps-goals": ("docs/linear_logps.md", goals.logps_goals),
    "packing": ("docs/packing.md", tables.packing),
}


def filled(text: str, name: str, block: str) -> str:
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no {begin} in the page")
    return pattern.sub(lambda _: f"{begin}\n{block}\n{end}", text)


def written(rows: Rows) -> Iterator[tuple[Path, str]]:
    """(page, its text) of every page that has a figure of rows."""
    pages: dict[Path, str] = {}
    for name, (page, make) in BLOCKS.items():
        path = ROOT / page
        pages[path] = filled(pages.get(path) or path.read_text(), name, make(rows))
    for name, page in tables.PAGES.items():
        pages[ROOT / "docs" / "benchmarks" / f"{name}.md"] = tables.full(page, rows)
    yield from pages.items()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    rows = pick(load(), run=lambda run: run["device"] == "cpu")
    stale = [(path, text) for path, text in written(rows) if not path.exists() or path.read_text() != text]
    if args.check:
        names = ", ".join(str(path.relative_to(ROOT)) for path, _ in stale)
        sys.exit(f"out of date, run python -P bench/report/pages.py: {names}" if stale else 0)
    for path, text in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    from report import plots

    plots.draw(rows, ROOT / "docs" / "images")


if __name__ == "__main__":
    main()
