"""Breakable CUDA graphs for ``torch.compile``: ``torch.compile(model, backend="breakable_cg")``.

Ops that must run eagerly cut a model into segments. The other segments are captured as CUDA graphs. A later call is a
straight line of graph launches and eager calls.
"""

from breakable_backend.backend import breakable_cg as breakable_cg
from breakable_backend.backend import reset as reset
from breakable_backend.calling.bound import BoundCall as BoundCall
from breakable_backend.calling.bound import bind as bind
from breakable_backend.capturing.capture import break_graph as break_graph
from breakable_backend.capturing.capture import capture as capture
from breakable_backend.capturing.capture import is_capturing as is_capturing
from breakable_backend.capturing.graph import BreakableCUDAGraph as BreakableCUDAGraph
from breakable_backend.errors import BindError as BindError
from breakable_backend.errors import BreakableError as BreakableError
from breakable_backend.errors import CaptureError as CaptureError
from breakable_backend.errors import DivergenceError as DivergenceError
from breakable_backend.errors import EagerOutputError as EagerOutputError
from breakable_backend.errors import InternalError as InternalError
from breakable_backend.errors import OptionsError as OptionsError
from breakable_backend.errors import PartitionError as PartitionError
from breakable_backend.errors import ReplayError as ReplayError
from breakable_backend.marks.functions import eager_on_graph as eager_on_graph
from breakable_backend.marks.marking import eager_region as eager_region
from breakable_backend.marks.marking import mark_eager as mark_eager
from breakable_backend.marks.marking import unmark_eager as unmark_eager
from breakable_backend.tools import registration as _registration  # noqa: F401
from breakable_backend.tools.export import export as export
from breakable_backend.tools.report import Report as Report
from breakable_backend.tools.report import explain as explain

__all__ = [
    "BindError",
    "BoundCall",
    "BreakableCUDAGraph",
    "BreakableError",
    "CaptureError",
    "DivergenceError",
    "EagerOutputError",
    "InternalError",
    "OptionsError",
    "PartitionError",
    "ReplayError",
    "Report",
    "bind",
    "break_graph",
    "breakable_cg",
    "capture",
    "eager_on_graph",
    "eager_region",
    "explain",
    "export",
    "is_capturing",
    "mark_eager",
    "reset",
    "unmark_eager",
]
