"""Docstrings as Markdown, for the site: an extension of Griffe, which reads them. See ``mkdocs.yml``."""

from __future__ import annotations

import re
from typing import Any

import griffe


class AsMarkdown(griffe.Extension):
    """Examples become blocks of code, and roles of Sphinx the names that they refer to."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """``docstring`` with fences around its examples, and without roles."""
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        if line.startswith(">>>") and not inside:
            lines += ["```pycon"]
            inside = True
        elif inside and not line.strip():
            lines += ["```"]
            inside = False
        lines.append(line)
    if inside:
        lines.append("```")
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", "\n".join(lines))
