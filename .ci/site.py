"""Pages of the documentation's site that are no files of ``docs/``: a hook of MkDocs, see ``mkdocs.yml``."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Markdown files beside ``docs/``, and where they are in the site."""


def on_config(config: Any) -> Any:
    """Put each example into the navigation."""
    pages = [{path.stem.replace("_", " "): page_of(path)} for path in examples()]
    for entry in config.nav:
        if entry.get("Examples") == "examples/":
            entry["Examples"] = pages
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made here."""
    made = {place: in_site((ROOT / name).read_text(encoding="utf-8")) for name, place in PAGES.items()}
    made["license.md"] = f"# Licence\n\n```text\n{(ROOT / 'LICENSE').read_text(encoding='utf-8')}\n```\n"
    made["api.md"] = reference()
    made |= {page_of(path): example(path) for path in examples()}
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Have the links of ``docs/`` to files beside it lead to their pages."""
    if page.file.src_uri in PAGES.values():
        return markdown
    depth = page.file.src_uri.count("/")
    up = r"\.\./" * (depth + 1)
    return re.sub(rf"\]\({up}([^)]+)\)", lambda link: moved(link, "../" * depth), markdown)


def examples() -> list[Path]:
    return sorted((ROOT / "examples").glob("*.py")) + sorted((ROOT / "examples" / "benchmarks").glob("*.py"))


def page_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix(".md").as_posix()


def example(path: Path) -> str:
    """A page with what an example's docstring says, and the whole of it."""
    code = path.read_text(encoding="utf-8")
    told = ast.get_docstring(ast.parse(code)) or ""
    return f"# {path.name}\n\n{told}\n\n```python\n{code}```\n"


def reference() -> str:
    """A page with the docstring of each public name."""
    tree = ast.parse((ROOT / "breakable_backend" / "__init__.py").read_text(encoding="utf-8"))
    public = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return "# API\n\n" + "\n".join(f"::: breakable_backend.{name}\n" for name in public)


def in_site(text: str) -> str:
    """A page from beside ``docs/`` with its links as the site has them."""
    return re.sub(r"\]\(((?:docs/|examples/)[^)]+|CHANGELOG\.md|LICENSE)\)", moved, text)


def moved(link: re.Match[str], up: str = "") -> str:
    """Where a link to a file of the repository leads in the site, from a page that ``up`` leads out of."""
    target = link[1]
    if target.startswith("docs/"):
        target = target.removeprefix("docs/")
    elif target == "LICENSE":
        target = "license.md"
    elif target in PAGES:
        target = PAGES[target]
    elif target.endswith(".py"):
        target = f"{target.removesuffix('.py')}.md"
    return f"]({up}{target})"
