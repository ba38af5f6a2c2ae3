"""Whose a source file is: each constant is the folder of one owner, with a separator at its end.

``file.startswith(files.PACKAGE)`` tells whether a file belongs to this package.
"""

from __future__ import annotations

import os
import sysconfig

import torch

PACKAGE, TORCH, PYTHON = (
    os.path.join(path, "")
    for path in (os.path.dirname(__file__), os.path.dirname(torch.__file__), sysconfig.get_path("stdlib"))
)


def short_line(source: str) -> str:
    """A source line with the file's name in place of its path, as all texts show it. JSON has the path."""
    file, colon, rest = source.partition(":")
    return os.path.basename(file) + colon + rest


def is_library(file: str) -> bool:
    """Whether a file is PyTorch's, Python's or this package's; what else is installed beside them is the user's."""
    return file.startswith((TORCH, PACKAGE)) or (file.startswith(PYTHON) and "site-packages" not in file)
