"""Docstrings are Markdown with Google's sections: napoleon turns the sections into fields, and
what comes out is parsed as the pages are."""

from __future__ import annotations

import re

from docutils import nodes
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_CODE = re.compile(r"(`+[^`]*`+)")


class MarkdownDocstring(SphinxDirective):
    """Parses its content as MyST, in the middle of what autodoc writes as reStructuredText."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        document = new_document(self.get_source_info()[0], self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return document.children


def escaped(line: str) -> str:
    """`line` with what Markdown would take for HTML or mathematics, outside of code, as text."""
    if line.startswith("    "):
        return line
    parts = _CODE.split(line)
    parts[::2] = [re.sub(r"([<$])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def wrap(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """After napoleon: the docstring as the content of the directive above."""
    if any(lines):
        lines[:] = [
            ".. markdown-docstring::",
            "",
            *(f"   {escaped(line)}" for line in lines),
            "",
        ]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("markdown-docstring", MarkdownDocstring)
    app.connect("autodoc-process-docstring", wrap, priority=900)
    return {"parallel_read_safe": True}
