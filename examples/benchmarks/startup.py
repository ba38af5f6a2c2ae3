"""Start-up: a fresh process, up to the end of its third call, and where that time goes.

    PYTHONPATH=. python examples/benchmarks/startup.py                    # the five models of replay.py
    PYTHONPATH=. python examples/benchmarks/startup.py llama breaks-1     # some of them
    PYTHONPATH=. python examples/benchmarks/startup.py breaks-1 --profile # what the profiler says of ours

Each row is a fresh process with empty caches of Inductor and of Triton. Python's own cache is another thing: where the
packages have no compiled files, as in some images, imports take twice as long, also those that torch makes while it
compiles. ``PYTHONPYCACHEPREFIX=/tmp/bytecode`` gives a machine such files, from the second run on.
 All processes of a run import torch, make a CUDA
context and their model first, beside each other. Then each has its turn alone, in which the clock runs: it imports what
its contender needs (``imports``), compiles and makes three calls (``calls``). Both count: a fresh process has to do both,
with this backend and with ``mode="reduce-overhead"``.

What is whose, in seconds, as torch itself counts it while it compiles: ``Dynamo`` is what is neither the backend's nor
the guards', ``AOT`` the backend's time that is not this package's, ``compiling`` this package's share of it. ``run`` is
the rest of the first call, which runs plainly; ``record`` the second call, ``third`` the third.
"""

from __future__ import annotations

import cProfile
import importlib
import itertools
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from typing import Any

import replay  # from beside this file
import torch

RIVAL, OURS = "reduce-overhead", "ours"
NEEDED = {OURS: ("breakable_backend", "torch._functorch.aot_autograd"), RIVAL: replay.IMPORTS[RIVAL]}
"""What is imported within the clock, before anything is compiled."""
PARTS = ("Dynamo", "guards", "AOT", "compiling", "run", "record", "third")


def child(model: str, contender: str, profiled: bool) -> None:
    """One row: waits for its turn when all that does not count is done."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if model == "llama":
        importlib.import_module("transformers.models.llama.modeling_llama")
    card = replay.environment(device)["GPU"]
    work = replay.workload(model, device)
    replay.synchronize()
    print("ready", flush=True)
    sys.stdin.readline()
    row: dict[str, Any] = {"model": model, "contender": contender, "card": card}
    profile = cProfile.Profile()
    marks = [time.perf_counter()]
    if profiled:
        profile.enable()
    for name in ("torch._dynamo", *NEEDED[contender]):
        importlib.import_module(name)
    marks.append(time.perf_counter())
    prepared = replay.PREPARE[contender](work, device.type == "cpu")
    for x in work.inputs[:3]:
        prepared.call(x)
        replay.synchronize()
        marks.append(time.perf_counter())
    profile.disable()
    row["imports"], first, row["record"], row["third"] = (end - start for start, end in itertools.pairwise(marks))
    row["calls"] = marks[-1] - marks[1]
    taken = {name: sum(times) for name, times in torch._dynamo.utils.compilation_time_metrics.items()}
    compiled, backend = taken["_compile.compile_inner"], taken["OutputGraph.call_user_compiler"]
    row["guards"] = taken["build_guards"]
    row["Dynamo"] = compiled - backend - row["guards"]
    row["compiling"] = ours() if contender == OURS else 0.0
    row["AOT"] = backend - row["compiling"]
    row["run"] = first - compiled
    if profiled:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats("breakable_backend", 60)
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(40)
        sys.stderr.flush()
    print(json.dumps(row), flush=True)
    os._exit(0)  # taking everything apart in order takes seconds, and nobody needs it


def ours() -> float:
    """What this package took of the backend's time: the partition, made once more."""
    from breakable_backend.calling.registry import executors_of

    start = time.perf_counter()
    for executor in executors_of():
        executor.cut_program()
    return time.perf_counter() - start


def start(model: str, contender: str, caches: str, profiled: bool) -> subprocess.Popen[str]:
    variables = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/{model}-{contender}",
        "TRITON_CACHE_DIR": f"{caches}/{model}-{contender}-triton",
    }
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        f"--child={model}/{contender}",
        *["--profile"][: int(profiled)],
    ]
    return subprocess.Popen(command, env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def take_turn(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    process.stdin.write("go\n")
    process.stdin.flush()
    row = next(json.loads(line) for line in process.stdout if line.startswith("{"))
    process.wait()
    return dict(row)


def show(row: dict[str, Any]) -> None:
    parts = ", ".join(f"{part} {row[part]:.2f}" for part in PARTS)
    whole = row["imports"] + row["calls"]
    print(
        f"{row['model']:9} {row['contender']:15} {whole:6.2f} s: imports {row['imports']:.2f}, calls {row['calls']:.2f}"
        f" ({parts})",
        flush=True,
    )


def main(words: list[str]) -> None:
    profiled = "--profile" in words
    models = [word for word in words if word in replay.MODELS] or [*replay.MODELS]
    contenders = [OURS] if profiled else [OURS, RIVAL]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        waiting = {(model, name): start(model, name, caches, profiled) for model in models for name in contenders}
        for model in models:
            rows = []
            for name in contenders:
                rows.append(take_turn(waiting[model, name]))
                show(rows[-1])
            if len(rows) == 2:
                (mine, theirs) = rows
                whole = (mine["imports"] + mine["calls"]) / (theirs["imports"] + theirs["calls"])
                print(
                    f"{model:9} ratio: {whole:.3f} with imports, {mine['calls'] / theirs['calls']:.3f} without, {mine['card']}",
                    flush=True,
                )


if __name__ == "__main__":
    given = [word.partition("=")[2] for word in sys.argv[1:] if word.startswith("--child=")]
    with torch.no_grad():
        if given:
            chosen, _, name = given[0].partition("/")
            child(chosen, name, "--profile" in sys.argv)
        else:
            main(sys.argv[1:])
