"""The report as one page."""

from __future__ import annotations

import json
from typing import Any


def page(report: dict[str, Any]) -> str:
    """``report`` (of ``Report.to_dict``) as HTML."""
    return f"<pre>{json.dumps(report, indent=2)}</pre>"
