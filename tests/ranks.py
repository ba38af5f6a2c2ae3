"""Runs a function in several processes, the ranks of one process group, and ends them all in time."""

from __future__ import annotations

import datetime
import faulthandler
import importlib
import inspect
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

LIMIT = 100.0
"""Seconds, after which a rank writes where its threads are and ends, and a little later all are killed."""
GROUP_LIMIT = datetime.timedelta(seconds=80)
"""For one collective."""

Body = Callable[[torch.device], None]


def run(body: Body, size: int, kind: str, folder: Path) -> None:
    """Call ``body``, a function of a module, with its device in each of ``size`` processes; all must end well.

    Args:
        body: compares by itself, and raises where something is wrong.
        size: ranks.
        kind: of their devices, ``"cpu"`` over gloo or ``"cuda"`` over NCCL, one GPU for each.
        folder: where they meet, and what they print lies.
    """
    here, its = Path(__file__), inspect.getfile(body)
    path = [str(here.parent), str(Path(its).parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import ranks; ranks.main()", body.__module__, body.__name__, kind, str(size)]
    outputs = [folder / f"rank {rank}.txt" for rank in range(size)]
    with ExitStack() as stack:
        processes = []
        for rank, output in enumerate(outputs):
            file = stack.enter_context(output.open("w"))
            processes.append(
                subprocess.Popen(
                    [*command, str(rank), str(folder)], env=environment, stdout=file, stderr=subprocess.STDOUT
                )
            )
        try:
            _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    codes = [process.returncode for process in processes]
    assert codes == [0] * size, "\n".join(
        f"rank {rank} ended with {code}:\n{output.read_text()[-6000:]}"
        for rank, (code, output) in enumerate(zip(codes, outputs, strict=True))
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all have ended, or one has ended badly: the others may wait for it for ever."""
    deadline = time.monotonic() + LIMIT + 10
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return
        if any(codes):
            time.sleep(2)  # for what the others have to say
            return
        time.sleep(0.05)


def main() -> None:
    """One rank."""
    module, name, kind, size, rank, folder = sys.argv[1:]
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    # of torch: a sharded group of one rank; names that it has deprecated and uses itself
    warnings.simplefilter("ignore")
    device = torch.device(kind, int(rank)) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=int(rank),
        world_size=int(size),
        timeout=GROUP_LIMIT,
    )
    getattr(importlib.import_module(module), name)(device)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(
        0
    )  # threads of torch's wrappers may outlive the group, and would now and then abort the process at its end
