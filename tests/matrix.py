"""Runs the suite on other torches and Pythons, each pair in a virtual environment of its own, and says what ran.

    .venv/bin/python tests/matrix.py 2.11.0 2.15.0 --pythons 3.11 3.12

The environments stay, as ``.venv-<torch>-<python>``; with PyTorch's CUDA builds each takes about 6 GB.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "dev,examples,inspect"
CORE = (
    "test_public_api test_op_tables test_contract_once test_contract_keys test_contract_order test_contract_aliases "
    "test_contract_ambient test_contract_random test_contract_reasons test_contract_stale test_contract_training "
    "test_contract_exceptions test_contract_models test_doors test_functions test_functions_gradients test_capture "
    "test_report test_driver_contract"
).split()
"""Import, entry point, contract, doors, marked functions, report and drivers: what another torch breaks first."""
INSTALL_LIMIT = 1500
"""Seconds for one installation: PyTorch's CUDA build is gigabytes."""


@dataclass(frozen=True)
class Row:
    """What came of one torch on one Python."""

    torch: str
    python: str
    cpu: str
    cuda: str = "not tested: no GPU"
    good: bool = True
    """Whether nothing failed. What did not run for want of an interpreter is no failure, and no success."""


def main() -> int:
    """Run what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torches", nargs="+", help="versions of torch, such as 2.15.0")
    parser.add_argument("--pythons", nargs="+", default=[this_python()], help="such as 3.11; by default this one")
    parser.add_argument("--core", action="store_true", help="the core of the suite only")
    parser.add_argument(
        "--or-newer-than", metavar="PIN", help="where a torch cannot be had, the newest beyond this one"
    )
    asked = parser.parse_args()
    rows = [row for torch in asked.torches for python in asked.pythons for row in run(torch, python, asked)]
    show(rows)
    return 0 if any(ran(row) for row in rows) and all(row.good for row in rows) else 1


def run(torch: str, python: str, asked: argparse.Namespace) -> list[Row]:
    """The rows of one torch on one Python: two, where another torch ran in its place."""
    interpreter = find_interpreter(python)
    if interpreter is None:
        return [Row(torch, python, f"not tested: no Python {python} here", "not tested")]
    venv = ROOT / f".venv-{torch}-{python}"
    if install(venv, interpreter, f"torch=={torch}"):
        return [test(venv, torch, python, asked.core)]
    missing = Row(torch, python, "NOT TESTED: it could not be installed", "not tested", good=bool(asked.or_newer_than))
    if not asked.or_newer_than:
        return [missing]
    say(f"torch {torch} cannot be had; trying the newest beyond {asked.or_newer_than}")
    venv = ROOT / f".venv-newer-{python}"
    if not install(venv, interpreter, f"torch>{asked.or_newer_than}"):
        return [missing, Row(f"> {asked.or_newer_than}", python, "NOT TESTED: none could be installed", good=False)]
    return [missing, test(venv, version_in(venv), python, asked.core)]


def files(names: Sequence[str]) -> list[str]:
    """The paths of the test files ``names``, in whatever folder each lies."""
    return [str(path.relative_to(ROOT)) for name in names for path in ROOT.glob(f"tests/**/{name}.py")]


def this_python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def find_interpreter(python: str) -> str | None:
    """A Python of that version: this one, one on the path, or one of pyenv's."""
    if python == this_python():
        return sys.executable
    candidates = [shutil.which(f"python{python}")]
    if shutil.which("pyenv"):
        home = Path(subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True).stdout.strip())
        candidates += [str(found) for found in sorted(home.glob(f"versions/{python}.*/bin/python{python}"))]
    # a shim may stand on the path for a Python that is not there
    works = (
        path for path in candidates if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0
    )
    return next(works, None)


def install(venv: Path, interpreter: str, torch: str) -> bool:
    """Set ``venv`` up with a torch and the tools of constraints.txt; False, with pip's last words, where that fails."""
    sources = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    ready = venv / ".ready"
    if ready.exists() and all(ready.stat().st_mtime > source.stat().st_mtime for source in sources):
        return True
    say(f"setting up {venv.name}: {torch}; the first time this takes minutes")
    made = subprocess.run([interpreter, "-m", "venv", "--clear", venv], capture_output=True, text=True)
    if made.returncode:
        say(made.stdout + made.stderr)
        return False
    pins = [line for line in sources[1].read_text(encoding="utf-8").splitlines() if not line.startswith("torch==")]
    (venv / "constraints.txt").write_text("\n".join(pins), encoding="utf-8")
    command = [venv / "bin/python", "-m", "pip", "install", "-qq", "-c", venv / "constraints.txt"]
    # The settings of this machine's pip may cap torch; what they say of indexes is tried first.
    for settings in ({}, {"PIP_CONFIG_FILE": os.devnull}):
        try:
            done = subprocess.run(
                [*command, torch, "-e", f".[{EXTRAS}]"],
                cwd=ROOT,
                env=environment(PIP_DISABLE_PIP_VERSION_CHECK="1", **settings),
                capture_output=True,
                text=True,
                timeout=INSTALL_LIMIT,
            )
        except subprocess.TimeoutExpired:
            say(f"no end after {INSTALL_LIMIT} s")
            continue
        if done.returncode == 0:
            ready.touch()
            return True
        say("\n".join(line for line in done.stderr.splitlines() if line.startswith("ERROR"))[-1000:])
    return False


def version_in(venv: Path) -> str:
    return output(venv, "import importlib.metadata; print(importlib.metadata.version('torch'))")


def test(venv: Path, torch: str, python: str, core: bool) -> Row:
    """Run the suite in ``venv``: two workers for the CPU, as ``make test`` has them, and one for a GPU."""
    core_files = files(CORE) if core else []
    say(f"torch {torch}, Python {python}: {'the core of the suite' if core else 'the suite'}")
    cpu, good = pytest(venv, ["-n", "2", "-m", "not gpu", *core_files])
    if output(venv, "import torch; print(torch.cuda.is_available())") != "True":
        return Row(torch, python, cpu, good=good)
    cuda, good_too = pytest(venv, ["-m", "gpu", *core_files])
    return Row(torch, python, cpu, cuda, good and good_too)


def pytest(venv: Path, options: Sequence[str]) -> tuple[str, bool]:
    """Run pytest and show what it prints; its closing line, and whether all was well."""
    command = [venv / "bin/python", "-m", "pytest", *options]
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
    return re.sub(r" in [\d.]+s.*", "", last), process.returncode == 0


def output(venv: Path, code: str) -> str:
    return subprocess.run([venv / "bin/python", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def environment(**more: str) -> Mapping[str, str]:
    return {**os.environ, **more}


def ran(row: Row) -> bool:
    return not row.cpu.lower().startswith("not tested")


def show(rows: Sequence[Row]) -> None:
    """The table of what ran and what did not."""
    lines = [("torch", "Python", "CPU", "CUDA"), *((row.torch, row.python, row.cpu, row.cuda) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    print()
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def say(text: str) -> None:
    print(f"matrix: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
