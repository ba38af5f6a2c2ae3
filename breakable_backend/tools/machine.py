"""Whether this machine works: what is installed, what torch sees, and a model that is compiled and compared.

``python -m breakable_backend`` prints it. See :func:`examine`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from breakable_backend import _torch
from breakable_backend.backend import reset
from breakable_backend.errors import BreakableError, first_line
from breakable_backend.tools.report import explain

OLDEST, NEWEST = (2, 11), (2, 15)
"""The releases of torch that the tests run on, from the first to the last."""
EXTRAS = {"depyf": "files to step through", "transformers": "the examples", "cuda-python": "CUDA graphs"}
"""Packages besides torch and Python, and what they are for."""

_FREED_GUARDS = "set torch._dynamo.config.use_recursive_dict_tags_for_guards = False, or use torch 2.13"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    subject: str
    state: Literal["good", "note", "bad"]
    """``"note"``: it works, with a limit that the text names. ``"bad"``: CUDA graphs, or the backend, do not work."""
    text: str


def examine() -> tuple[Finding, ...]:
    """Check versions, GPUs, drivers and extras, and run a small model through the backend.

    >>> from breakable_backend.tools.machine import examine
    >>> [finding.text for finding in examine() if finding.subject == "self-test on the CPU"]
    ['3 replays of a program with 2 captured segments and 1 eager step: equal to eager, bit for bit']

    Nothing is raised: a failure is a finding that says so. The self-test compiles one function for the CPU, with the
    tape driver, and one for each GPU, with the CUDA driver. Their graphs are freed again.
    """
    return (*_versions(), *_gpus(), *_extras(), *_self_tests())


def print_findings(findings: tuple[Finding, ...]) -> int:
    """Print ``findings`` to standard output. Returns the exit status of a program: 1 if one of them is bad, else 0."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    styles = {"good": "green", "note": "yellow", "bad": "bold red"}
    for finding in findings:
        table.add_row(f"[{styles[finding.state]}]{finding.state}[/]", finding.subject, finding.text)
    console = Console(highlight=False)
    console.print(table)
    bad = [finding.subject for finding in findings if finding.state == "bad"]
    graphs = any(finding.subject.startswith("self-test on cuda") for finding in findings)
    if bad:
        console.print(f"\nThis does not work here: {', '.join(bad)}.")
    elif graphs:
        console.print("\nThe backend works here, with CUDA graphs.")
    else:
        console.print("\nThe backend works here, on the tape driver: it shows what is captured, and is not fast.")
    return 1 if bad else 0


def _versions() -> Iterator[Finding]:
    yield Finding("breakable_backend", "good", importlib.metadata.version("breakable-backend"))
    yield Finding("Python", "good", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    supported = f"tested with {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    if release < OLDEST:
        yield Finding("torch", "bad", f"{torch.__version__}, which is too old: {supported}")
    elif release > NEWEST:
        yield Finding("torch", "note", f"{torch.__version__}, which is newer than what was tested: {supported}")
    else:
        yield Finding("torch", "good", torch.__version__)
    if _torch.may_use_freed_guards():
        yield Finding(
            "Dynamo", "note", f"{torch.__version__} may crash as the process ends, with any backend: {_FREED_GUARDS}"
        )
    entry = importlib.metadata.entry_points(group="torch_dynamo_backends", name="breakable_cg")
    if entry:
        yield Finding("torch.compile", "good", 'backend="breakable_cg" is found without an import')
    else:
        yield Finding("torch.compile", "bad", "the entry point breakable_cg is not there: install the package with pip")


def _gpus() -> Iterator[Finding]:
    if torch.version.hip is not None:
        yield Finding("GPU", "bad", "a ROCm build of torch: its graphs are not supported; use driver='tape'")
        return
    if torch.version.cuda is None:
        yield Finding("GPU", "note", "torch is a CPU build, so there are no CUDA graphs")
        return
    if not torch.cuda.is_available():
        yield Finding("GPU", "note", f"torch is built for CUDA {torch.version.cuda}, and sees no GPU")
        return
    yield Finding("CUDA", "good", f"{torch.version.cuda}, as torch was built; driver {_driver_version()}")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        size = f"{found.total_memory / 2**30:.0f} GiB"
        yield Finding(f"cuda:{index}", "good", f"{found.name}, {size}, compute capability {found.major}.{found.minor}")
    backend = torch.cuda.get_allocator_backend()
    settings = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    if backend != "native":
        yield Finding("allocator", "bad", f"{backend}: take it out of PYTORCH_CUDA_ALLOC_CONF ({settings})")
    else:
        yield Finding("allocator", "good", f"torch's own{f', with {settings}' if settings else ''}")


def _driver_version() -> str:
    try:
        from cuda.bindings import driver
    except ImportError:
        return "unknown, since cuda-python is missing"
    status, version = driver.cuDriverGetVersion()
    return f"for CUDA {version // 1000}.{version % 1000 // 10}" if not int(status) else "unknown"


def _extras() -> Iterator[Finding]:
    for name, purpose in EXTRAS.items():
        try:
            yield Finding(name, "good", f"{importlib.metadata.version(name)}, for {purpose}")
        except importlib.metadata.PackageNotFoundError:
            needed = name == "cuda-python" and torch.cuda.is_available()
            yield Finding(name, "bad" if needed else "note", f"not installed: it is for {purpose}")


def _self_tests() -> Iterator[Finding]:
    places = [("the CPU", torch.device("cpu"))]
    if torch.version.cuda is not None and torch.cuda.is_available():
        places += [(f"cuda:{index}", torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    for name, device in places:
        subject = f"self-test on {name}"
        try:
            yield Finding(subject, "good", _self_test(device))
        except (BreakableError, RuntimeError, AssertionError) as error:
            yield Finding(subject, "bad", first_line(error))


def _self_test(device: torch.device) -> str:
    """Five calls of a compiled function with an eager step, compared with eager. Returns what was seen.

    Raises:
        AssertionError: a result differs, or nothing was captured.
    """
    options: dict[str, Any] = {"driver": "cuda" if device.type == "cuda" else "tape", "eager_ops": ["aten::sort"]}
    weight = torch.randn(16, 16, device=device)

    def function(x: torch.Tensor) -> torch.Tensor:
        ordered = torch.relu(x @ weight + 1).sort(dim=-1).values
        return (ordered * 2).sin() @ weight

    compiled: Callable[[torch.Tensor], torch.Tensor] = torch.compile(
        function, backend="breakable_cg", options=options, dynamic=False
    )
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(4, 16, device=device)
            assert torch.equal(compiled(x), function(x)), "a result differs from eager's"
    # The self-test of another device has the same code, so the report contains its program too.
    (program,) = [found for found in explain(compiled).programs if found.driver.endswith(f" on {device}")]
    assert program.replays, "nothing was replayed: " + "; ".join(program.notes)
    reset(compiled)
    return (
        f"{program.replays} replays of a program with {program.num_graph_segments} captured segments and "
        f"{program.num_eager_segments} eager step: equal to eager, bit for bit"
    )
