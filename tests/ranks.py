"""Runs a function in several processes, the ranks of one process group, and ends them all in time."""

from __future__ import annotations

import datetime
import faulthandler
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

import fresh

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
    outputs = [folder / f"rank {rank}.txt" for rank in range(size)]
    processes = [
        fresh.process(_rank, body, size, kind, rank, folder, output=output, forked=kind == "cpu")
        for rank, output in enumerate(outputs)
    ]
    try:
        for process in processes:
            process.start()
        _wait(processes)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * size, "\n".join(
        f"rank {rank} ended with {code}:\n{output.read_text()[-6000:]}"
        for rank, (code, output) in enumerate(zip(codes, outputs, strict=True))
    )


def _wait(processes: Sequence[BaseProcess]) -> None:
    """Wait until all have ended, or one has ended badly: the others may wait for it for ever."""
    deadline = time.monotonic() + LIMIT + 10
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in processes]
        if None not in codes:
            return
        if any(codes):
            time.sleep(2)  # for what the others have to say
            return
        time.sleep(0.05)


def _rank(body: Body, size: int, kind: str, rank: int, folder: Path) -> None:
    """One rank."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    # of torch: a sharded group of one rank; names that it has deprecated and uses itself
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=GROUP_LIMIT,
    )
    body(device)
    dist.destroy_process_group()
    sys.stdout.flush()
    # threads of torch's wrappers may outlive the group, and would now and then abort the process at its end
    os._exit(0)
