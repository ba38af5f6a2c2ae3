"""PyTorch's databases of ops and modules through the backend, against eager, bit for bit: ``python tests/sweep.py``.

Every op runs in one of a few worker processes, so a crash or a hang costs that op alone. Results go to a file of JSON
lines, one for each op; what is in the file already is not run again, so a sweep can be stopped and gone on with.

    python tests/sweep.py --device cuda --processes 16 --seconds 250 --results sweep.jsonl
    python tests/sweep.py --results sweep.jsonl --table
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).parent
BACKWARD = "backward of "
"""What the names of entries begin with that are run forward and backward: those of ``opinfos``."""
WORKER = Path(__file__)
"""What the worker processes run."""

# --- a worker ---------------------------------------------------------------------------------------------------------------


def work(device_type: str, door: str) -> None:
    """Read names of ops, one a line; write a line of JSON for each outcome, and an empty one after each op."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    answers, sys.stdout = sys.stdout, sys.stderr
    warnings.filterwarnings("ignore")  # eager's own are not looked at
    import torch

    import opinfos

    torch._logging.set_logs(all=logging.CRITICAL)
    torch.set_num_threads(1)
    stack = contextlib.ExitStack()
    stack.enter_context(opinfos.traceable())
    databases, device = opinfos.ops(), torch.device(device_type)
    say(answers, {"torch": torch.__version__, "ops": list(databases)})
    for line in sys.stdin:
        name = line.strip()
        try:
            for what, form, samples, outcome in opinfos.outcomes(name, databases[name], device, door):
                say(answers, {"what": what, "form": form, "samples": samples, **dataclasses.asdict(outcome)})
        except Exception as error:  # noqa: BLE001 - told in the row of the op
            say(answers, {"what": "", "form": "", "samples": 0, "failed": f"sweep: {opinfos.first_line(error)}"})
        if device.type == "cuda":
            torch.cuda.synchronize()  # after an asynchronous error this process is of no more use
        say(answers, None)


def say(answers: TextIO, value: Any) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


class Worker:
    """A process that tries ops, and is replaced when it dies or hangs."""

    def __init__(self, device: str, door: str) -> None:
        self.device, self.door = device, door
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(WORKER), "--worker", "--device", self.device, "--door", self.door]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.answers: queue.Queue[str | None] = queue.Queue()
        self.listener = threading.Thread(target=self._listen, args=(self.process, self.answers), daemon=True)
        self.listener.start()
        self.hello = json.loads(self.answers.get() or "{}")

    @staticmethod
    def _listen(process: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # closed while it was read
            for line in process.stdout:
                answers.put(line)
        answers.put(None)

    @contextlib.contextmanager
    def serving(self) -> Iterator[Runner]:
        """:meth:`run`, for the time of a ``with`` statement."""
        try:
            yield self.run
        finally:
            self.stop()

    def stop(self) -> None:
        with self.process:  # closes the pipes
            self.process.kill()
        self.listener.join()

    def run(self, name: str, budget: float) -> dict[str, Any]:
        """Everything that is tried of one op, within ``budget`` seconds."""
        begun = time.monotonic()
        row: dict[str, Any] = {"op": name, "device": self.device, "torch": self.hello.get("torch")}
        row |= {"door": self.door, "outcomes": []}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
            while True:
                answer = self.answers.get(timeout=max(0.1, budget - (time.monotonic() - begun)))
                if answer is None:
                    row["stopped"] = f"the process died ({self.process.wait()})"
                    break
                outcome = json.loads(answer)
                if outcome is None:
                    break
                row["outcomes"].append(outcome)
        except (queue.Empty, BrokenPipeError):
            row["stopped"] = f"over {budget:.0f} seconds" if self.process.poll() is None else "the process died"
        row["seconds"] = round(time.monotonic() - begun, 2)
        if "stopped" in row:
            self.stop()
            self.start()
        return row


# --- the sweep --------------------------------------------------------------------------------------------------------------


def sweep(arguments: argparse.Namespace) -> None:
    """Run what is not in the file of results yet."""
    first = Worker(arguments.device, arguments.door)
    version, names = first.hello["torch"], first.hello["ops"]
    ours = arguments.device, version, arguments.door
    done = {row["op"] for row in rows(arguments.results) if (row["device"], row["torch"], row["door"]) == ours}
    if arguments.only:
        names = [name for name in names if name in arguments.only]
    if arguments.half != "both":
        names = [name for name in names if name.startswith(BACKWARD) == (arguments.half == "backward")]
    others = [lambda: Worker(arguments.device, arguments.door).serving()] * (arguments.processes - 1)
    go_on(names, done, [first.serving, *others], arguments)


Runner = Callable[[str, float], dict[str, Any]]
"""Runs what has this name, within so many seconds."""


def go_on(
    names: Sequence[str],
    done: Collection[str],
    workers: Sequence[Callable[[], contextlib.AbstractContextManager[Runner]]],
    arguments: argparse.Namespace,
) -> None:
    """Run the named, but for what is done already, and add a line to the results for each.

    Args:
        names: what there is; ``arguments.chunk`` says which part of it is ours.
        done: the names that the results have.
        workers: what makes a runner, once for each of the threads that run side by side.
        arguments: ``chunk``, ``seconds``, ``budget`` and ``results``.
    """
    part, parts = (int(number) for number in arguments.chunk.split("/"))
    names = [name for name in names[part - 1 :: parts] if name not in done]
    pending: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        pending.put(name)
    end = time.monotonic() + arguments.seconds
    lock = threading.Lock()

    def serve(worker: Callable[[], contextlib.AbstractContextManager[Runner]]) -> None:
        with worker() as run:
            while (left := end - time.monotonic()) > 0:
                try:
                    name = pending.get_nowait()
                except queue.Empty:
                    return
                row = run(name, min(arguments.budget, left + 5))
                if row.get("stopped", "").startswith("over") and arguments.budget > left + 5:
                    return  # not run: the time of the whole was over
                with lock, arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")

    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    threads = [threading.Thread(target=serve, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.stdout.write(f"{pending.qsize()} of {len(names)} did not begin; go on with the same command\n\n")


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """What the file has."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield {"door": "compile", **json.loads(line)}


# --- the table --------------------------------------------------------------------------------------------------------------


def verdict(row: dict[str, Any]) -> tuple[str, str]:
    """What became of an op as a whole, and why."""
    tried = [outcome for outcome in row["outcomes"] if outcome["samples"]]
    differing = [outcome for outcome in tried if outcome.get("differs")]
    backend = [outcome for outcome in tried if outcome.get("failed", "").startswith(("backend", "sweep"))]
    if differing:
        return "differs", "; ".join(sorted({f"{o['what']} {o['form']}: {o['differs']}" for o in differing}))
    if row.get("stopped"):
        return "stopped", row["stopped"]
    if backend:
        return "failed", "; ".join(sorted({o["failed"] for o in backend}))
    ran = [outcome for outcome in tried if not outcome.get("failed")]
    refused = sorted({o["failed"] for o in tried if o.get("failed", "").startswith("refused")})
    if refused and not ran:
        return "refused", "; ".join(refused)
    if not ran:
        return "not run", "; ".join(sorted({o.get("failed", "") for o in row["outcomes"]})) or "no sample"
    reasons = "; ".join(sorted({*refused, *(reason for outcome in ran for reason in outcome["reasons"])}))
    if not any(outcome["captured"] for outcome in ran):
        return "eager", reasons
    return ("in part", reasons) if reasons else ("captured", "")


KINDS = "captured", "in part", "eager", "refused", "not run", "stopped", "failed", "differs"
"""What can become of an op; refused: a typed error says why it cannot be in a capture."""
AOT = "as eager, where AOTAutograd (`aot_eager`) is not"
REFERENCES = {"dynamo": 'as `backend="eager"`, not as eager', "nothing": "eager is not the same each time"}


def table(found: Iterable[dict[str, Any]]) -> str:
    """The results in Markdown: counts, then all that was not captured, and why."""
    lines = []
    groups: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in found:
        groups[row["device"], row["torch"], row["door"]][row["op"]] = row
    lines += [
        "| device | torch | door | tried | captured | in part | eager | refused | not run | stopped | failed | differing | as Dynamo, not as eager | eager not the same twice |"
    ]
    lines += ["|---" * 14 + "|"]
    for (device, version, door), by_name in groups.items():
        for kind, chosen in split(by_name.values()).items():
            counts = Counter(verdict(row)[0] for row in chosen)
            dynamo, itself = (
                sum(any(o.get("reference") == reference for o in row["outcomes"]) for row in chosen)
                for reference in ("dynamo", "nothing")
            )
            cells = [counts[key] for key in KINDS]
            lines.append(
                f"| {device}, {kind} | {version} | {door} | {len(chosen)} | "
                + " | ".join(map(str, cells))
                + f" | {dynamo} | {itself} |"
            )
    for (device, version, door), by_name in groups.items():
        here = f"on {device}, torch {version}, door {door}"
        for what in KINDS[:0:-1]:
            whys: dict[str, list[str]] = defaultdict(list)
            for row in by_name.values():
                became, why = verdict(row)
                if became == what:
                    whys["; ".join(part[:120] for part in why.split("; "))].append(row["op"])
            if whys:
                lines += ["", f"{what} {here}:", ""]
                lines += [f"- {why}: {', '.join(sorted(whys[why]))}" for why in sorted(whys)]
        alone = [
            f"`{name}`: {'; '.join(sorted({o['aot'][:120] for o in row['outcomes'] if o.get('aot')}))}"
            for name, row in sorted(by_name.items())
            if verdict(row)[0] != "differs" and any(o.get("aot") for o in row["outcomes"])
        ]
        if alone:
            lines += ["", f"{AOT}, {here}:", "", *(f"- {text}" for text in alone)]
        for reference, title in REFERENCES.items():
            named = [
                (row["op"], sorted({o["what"] for o in row["outcomes"] if o.get("reference") == reference}))
                for row in by_name.values()
            ]
            if any(cases for _, cases in named):
                lines += ["", f"{title}, {here}:", ""]
                lines += [f"- `{name}`: {', '.join(cases)}" for name, cases in sorted(named) if cases]
    return "\n".join(lines)


def split(found: Iterable[dict[str, Any]]) -> dict[str, Sequence[dict[str, Any]]]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        half, name = (BACKWARD, row["op"][len(BACKWARD) :]) if row["op"].startswith(BACKWARD) else ("", row["op"])
        kinds.setdefault(half + ("modules" if name.startswith("module ") else "ops"), []).append(row)
    return {kind: chosen for kind, chosen in kinds.items() if chosen}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--door", default="compile", choices=["compile", "capture"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE.parent / "build" / "sweep.jsonl")
    parser.add_argument("--chunk", default="1/1", help="which part of how many: 2/4 is the second of four")
    parser.add_argument("--only", nargs="+", help="names of ops")
    parser.add_argument(
        "--half", choices=["forward", "backward", "both"], default="both", help="what runs without gradients, or with"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no op later than this")
    parser.add_argument("--budget", type=float, default=120, help="seconds for one op")
    parser.add_argument("--table", action="store_true", help="print what the results say, and run nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.worker:
        work(arguments.device, arguments.door)
    elif not arguments.table:
        sweep(arguments)
    if not arguments.worker:
        sys.stdout.write(table(rows(arguments.results)) + "\n")


if __name__ == "__main__":
    main()
