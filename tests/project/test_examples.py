"""What users copy has to run: the examples, and the Python code of the README."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

OPTIONAL = ("transformers", "diffusers", "peft", "torchao")
"""What the extra ``examples`` installs, as continuous integration does. Without it a model's recipe cannot run."""


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_example(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example has a ``main`` that returns 0, also where there is no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)  # Dynamo looks modules up by name
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as missing:
        if missing.name not in OPTIONAL:
            raise
        pytest.skip(f"needs {missing.name}, of the extra `examples`")
    assert module.main() == 0


def test_readme_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of Python in the README run, one after the other."""
    monkeypatch.setenv("BREAKABLE_CG_DRIVER", "tape")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # Dynamo looks modules up by name
    assert BLOCKS
    for block in BLOCKS:
        line = README[: README.index(block)].count("\n")
        exec(compile("\n" * line + block, ROOT / "README.md", "exec"), vars(module))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^):#]+)[)#]", README))))
def test_readme_links(target: str) -> None:
    """Each file that the README links to is there."""
    assert (ROOT / target).is_file()
