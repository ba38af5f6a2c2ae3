"""The user's line, and the module, that a node of a graph comes from.

Dynamo keeps them in the node: the stack of frames that it traced through, and the stack of modules that were called.
"""

from __future__ import annotations

import re

from torch import fx

from breakable_backend import files
from breakable_backend.files import short_line as short_line


def source_line(node: fx.Node) -> str:
    """The user's line that made ``node``, as ``file.py:12 in forward: code``; empty if unknown."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    for position in range(len(lines) - 1, -1, -1):
        line = lines[position].strip()
        if line.startswith("File "):
            file, _, rest = line.removeprefix("File ").partition(", line ")
            if file.strip('"').startswith(files.PACKAGE):
                continue  # code of this package that Dynamo traced on its way to a marked function
            number, _, function = rest.partition(", in ")
            code = lines[position + 1].strip() if position + 1 < len(lines) else ""
            return f"{file.strip(chr(34))}:{number} in {function}" + (f": {code}" if code else "")
    return ""


_SUBSCRIPT = re.compile(r"\['?(\w+)'?\]")


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that ``node`` was traced in, as ``layers.3.attention``; empty if unknown."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    _, _, path = str(stack[-1][0]).partition("]")  # after L['self'], the module that was compiled
    return _SUBSCRIPT.sub(r".\1", path).replace("._modules.", ".").lstrip(".")
