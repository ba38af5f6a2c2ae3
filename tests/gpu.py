"""What the tests share that only a GPU can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from breakable_backend import breakable_cg


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """``function``, compiled to CUDA graphs by the one backend of this process."""
    return torch.compile(function, backend=breakable_cg, options={"driver": "cuda", **options})
