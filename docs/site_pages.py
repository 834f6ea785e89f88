"""What the site needs beside Sphinx: the order of its pages, docstrings as written, and pages for linked files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

# Contents by page: captions and their pages in order, some with a short title; REST is all in the folder that are named
# nowhere. They stand here because a toctree in a page shows on GitHub as code.
REST = "*"
CONTENTS = {
    "docs/index": {
        "Use it": [
            *("In one page </README>", "losses", "Packing <packing>", "metrics", "distributed", "integrations/*"),
            *("The demo <demo>", "Reproductions <reproduce>"),
        ],
        "Understand it": [
            *(
                "glossary",
                "Equations <equations>",
                "Every optimum <science>",
                "Log-probs <linear_logps>",
                "Known weights <weighted_logps>",
            ),
            *(
                "Kept sets <support>",
                "linear_logps_gpu",
                "DPP <dpp>",
                "dpp_gpu",
                "losses_gpu",
                "cpu",
                "On a GPU <gpu>",
                "benchmarks",
                "pitfalls",
                REST,
            ),
        ],
        "Build on it": ["architecture", "/CONTRIBUTING", "/SECURITY", "/CHANGELOG"],
        "API": ["api/logps", "api/losses", "api/dpp", "api/*"],
    },
    "docs/losses": {"": ["losses/*"]},
    "docs/benchmarks": {"": ["benchmarks/*"]},
}
FILES = "files"
_STARS = re.compile(r"(``.*?``|`[^`]*`)|([*|])")
_PAGE = re.compile(r"\bdocs/([\w/]+)\.md\b")
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Note|Example):$")


def add_contents(app: Sphinx, page: str, text: list[str]) -> None:
    every = [entry for captions in CONTENTS.values() for entries in captions.values() for entry in entries]
    named = {entry.rpartition("<")[2].rstrip(">") for entry in every}
    beside = {Path(found).name for found in app.env.found_docs if Path(found).parent == Path(page).parent}
    rest = sorted(beside - named - {Path(page).name})
    for caption, entries in CONTENTS.get(page, {}).items():
        titled = [f":caption: {caption}"] if caption else []
        pages = [*(entry for entry in entries if entry != REST), *(rest if REST in entries else ())]
        text[0] += "\n".join(["\n\n```{toctree}", ":hidden:", ":glob:", *titled, "", *pages, "```", ""])


def as_written(line: str) -> str:
    """A line of a docstring, its stars and bars as they are outside of code, its pages of docs/ as links."""
    plain = _STARS.sub(lambda found: found[1] or f"\\{found[2]}", line)
    return _PAGE.sub(r":doc:`docs/\1.md </docs/\1>`", plain)


def keep_formulae(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make literal blocks of the indented lines that stand in a docstring's text: they are formulae or code."""
    kept: list[str] = []
    in_section = in_block = False
    for line in lines:
        indented = line.startswith("    ")
        if line.strip() and not indented:
            in_section = _SECTION.match(line) is not None
            in_block = False
        if indented and not in_section and not in_block and kept and not kept[-1].strip():
            kept += [] if kept[-2].endswith("::") else ["::", ""]
            in_block = True
        kept.append(line if in_block else as_written(line))
    lines[:] = kept


class SourceLinks(SphinxTransform):
    """A link to a file that is no page becomes one to a page that shows the file."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        root = Path(self.env.srcdir)
        for link in list(self.document.findall(addnodes.download_reference)):
            _, path = self.env.relfn2path(link["reftarget"], self.env.docname)
            file = Path(path).relative_to(root).as_posix()
            up = "../" * self.env.docname.count("/")
            target = nodes.reference("", "", *link.children, refuri=f"{up}{FILES}/{file}.html", internal=True)
            target["source_file"] = file
            link.replace_self(target)


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each source file that a page links to."""
    files = {
        link["source_file"]
        for page in app.env.all_docs
        for link in app.env.get_doctree(page).findall(nodes.reference)
        if "source_file" in link
    }
    for file in sorted(files):
        text = (Path(app.srcdir) / file).read_text(encoding="utf-8")
        try:
            lexer = get_lexer_for_filename(file).aliases[0]
        except ClassNotFound:
            lexer = "text"
        body = app.builder.highlighter.highlight_block(text, lexer, linenos="inline")  # type: ignore[attr-defined]
        yield f"{FILES}/{file}", {"title": file, "body": f"<h1>{file}</h1>{body}"}, "page.html"
    # A server opens index.html first; the home page is docs/index.md.
    move = '<meta http-equiv="refresh" content="0; url=docs/index.html">'
    yield "index", {"title": app.config.html_title, "metatags": move, "body": ""}, "page.html"


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", add_contents)
    # Before napoleon, whose 500 it is.
    app.connect("autodoc-process-docstring", keep_formulae, priority=400)
    app.connect("html-collect-pages", source_pages)
    app.add_transform(SourceLinks)
    return {"parallel_read_safe": True}
