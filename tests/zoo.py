"""Architectures of four libraries through the backend, unmarked, against eager, bit for bit: ``python tests/zoo.py``.

Every model runs in a process of its own, so a crash or a hang costs that model alone; it is a fork of one that has imported
the libraries, which takes longer than most models. Results go to a file of JSON lines, one for each model; what is in the
file already is not run again, so a run can be stopped and gone on with.

    python tests/zoo.py --device cuda --processes 8 --seconds 250 --results zoo.jsonl
    python tests/zoo.py --results zoo.jsonl --table
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import logging
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sweep import go_on, rows

HERE = Path(__file__).parent
SOURCES = ("transformers", "timm", "torchvision", "diffusers")
CALLS = 5

# --- one model --------------------------------------------------------------------------------------------------------


def work(key: str, device_type: str) -> dict[str, Any]:
    """Run one model five times, compiled and not, and say what can be seen."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    warnings.filterwarnings("ignore")
    import torch

    import breakable_backend
    from zoo_models import zoo

    torch._logging.set_logs(all=logging.CRITICAL)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    entry, device = zoo[key], torch.device(device_type)
    card = torch.cuda.get_device_name() if device.type == "cuda" else ""
    row: dict[str, Any] = {"kind": entry.kind, "version": importlib.metadata.version(entry.source)}
    row.update(torch=torch.__version__, card=card)
    begun = time.monotonic()
    try:
        want = watch(made(entry, device), entry, device)
    except Exception as error:  # noqa: BLE001 - told in the row
        return {**row, "failed": f"eager: {described(error)}"}
    row["eager_seconds"], begun = round(time.monotonic() - begun, 2), time.monotonic()
    options = {"driver": "cuda" if device.type == "cuda" else "tape"}
    compiled = torch.compile(made(entry, device), backend="breakable_cg", options=options)
    profile = Profile(device)
    try:
        got = watch(compiled, entry, device, profile)
    except Exception as error:  # noqa: BLE001
        row["failed"], got = f"backend: {described(error)}", None
    row["seconds"] = round(time.monotonic() - begun, 2)
    report = breakable_backend.explain(compiled)
    row.update(told(report), **profile.counts(report))
    if got is None or got != want:
        torch._dynamo.reset()
        breakable_backend.reset()
        try:
            reference = watch(torch.compile(made(entry, device), backend="eager"), entry, device)
        except Exception as error:  # noqa: BLE001
            row["dynamo"] = f"fails: {described(error)}"
        else:
            row["dynamo"] = difference(reference, want) or "as eager"
            if got is not None and got == reference:
                row["reference"] = "dynamo"
        if got is not None and "reference" not in row:
            same = watch(made(entry, device), entry, device) == want
            row.update(reference="eager" if same else "nothing", differs=difference(got, want))
    return row


def made(entry: Any, device: Any) -> Any:
    """The model, with the same weights each time."""
    import torch

    torch.manual_seed(0)
    return entry.make().eval().to(device=device, dtype=entry.dtype)


def watch(model: Any, entry: Any, device: Any, profile: Profile | None = None) -> list[list[Any]]:
    """What the calls return, all of it, each with inputs of its own."""
    import torch
    from torch.utils import _pytree as pytree

    from checks import bits, looks

    found = []
    for call in range(CALLS):
        torch.manual_seed(100 + call)
        given = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), entry.inputs())
        torch.manual_seed(200 + call)
        with profile if profile is not None and call == CALLS - 1 else contextlib.nullcontext():
            result = model(**given)
        leaves = pytree.tree_leaves(result)
        found.append([(looks(leaf), bits(leaf)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
    return found


def difference(mine: list[list[Any]], theirs: list[list[Any]]) -> str:
    """What is not the same, in words; empty if nothing."""
    for call, (ours, others) in enumerate(zip(mine, theirs, strict=True), start=1):
        if len(ours) != len(others):
            return f"call {call}: {len(ours)} results, and eager has {len(others)}"
        for number, (one, other) in enumerate(zip(ours, others, strict=True)):
            if one != other:
                kind = "layout" if one[0] != other[0] else "bits"
                return f"call {call}: {kind} of result {number}"
    return ""


def described(error: BaseException) -> str:
    """The first line of an error, and where it came from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {short(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace is not None else ""
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}{where}"


class Profile:
    """Which kernels a call launched, and which of them graphs did."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
            activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.__enter__()

    def __exit__(self, *error: Any) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.profile.__exit__(*error)
            with tempfile.TemporaryDirectory() as folder:
                self.profile.export_chrome_trace(f"{folder}/trace.json")
                self.events = json.loads(Path(folder, "trace.json").read_text(encoding="utf-8"))["traceEvents"]

    def counts(self, report: Any) -> dict[str, Any]:
        """The kernels of the call; on the host, where there are none, the ops of the programs."""
        if self.device.type != "cuda":
            steps = [step for program in report.programs for step in program.steps]
            count = Counter({"captured": 0, "eager": 0})
            for step in steps:
                count[step.kind] += len(step.ops)
            return {"kernels": count.total(), "in_graphs": count["captured"]}
        launches = {
            event["args"]["correlation"]: event["name"]
            for event in self.events
            if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
        }
        kernels = [event for event in self.events if event.get("cat") == "kernel"]
        inside = [event for event in kernels if "GraphLaunch" in launches.get(event["args"].get("correlation"), "")]
        outside = (
            Counter(event["name"] for event in kernels if event not in inside) if len(kernels) < 3000 else Counter()
        )
        launched = sum("GraphLaunch" in name for name in launches.values())
        return {
            "kernels": len(kernels),
            "in_graphs": len(inside),
            "graph_launches": launched,
            "copies": sum(event.get("cat") in ("gpu_memcpy", "gpu_memset") for event in self.events),
            "outside": dict(outside.most_common(8)),
        }


def told(report: Any) -> dict[str, Any]:
    """What the report says of breaks and of what was not captured."""
    reasons = [
        [reason.rule, reason.op, reason.text, short(reason.source)]
        for program in report.programs
        for reason in program.reasons
    ]
    refused = [
        recording.refused for program in report.programs for recording in program.recordings if recording.refused
    ]
    return {
        "programs": len(report.programs),
        "segments": sum(program.num_graph_segments for program in report.programs),
        "eager_steps": sum(program.num_eager_segments for program in report.programs),
        "replays": sum(program.replays for program in report.programs),
        "reasons": [[*reason, count] for reason, count in counted(reasons)],
        "graph_breaks": [[short(why.splitlines()[0]), count] for why, count in report.graph_breaks.items()],
        "eager_graphs": [[graph.why, short(graph.source)] for graph in report.eager_graphs],
        "refused": sorted(set(refused)),
        "plain": dict(sum((Counter(program.plain_calls) for program in report.programs), Counter())),
        "failures": sorted(
            {r.last_failure for program in report.programs for r in program.recordings if r.last_failure}
        ),
        "limits": [short(name) for name in report.at_recompile_limit],
        "skipped": {short(name): why for name, why in report.skipped.items()},
    }


def counted(found: list[list[Any]]) -> list[tuple[tuple[Any, ...], int]]:
    return list(Counter(map(tuple, found)).items())


def short(text: str) -> str:
    """Paths from the name of the library on."""
    return re.sub(r"/\S*/(?=(?:site|dist)-packages/)(?:site|dist)-packages/", "", text)


# --- all of them ------------------------------------------------------------------------------------------------------


class Lane:
    """A process that has imported the libraries, and runs one model at a time, each in a fork of itself."""

    def __init__(self, device: str) -> None:
        self.device = device
        command = [sys.executable, str(Path(__file__)), "--lane", "--device", device]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a process that asked CUDA itself cannot be forked any more
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, key: str, budget: float) -> dict[str, Any]:
        """Run one model within ``budget`` seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([key, budget]) + "\n")
        self.process.stdin.flush()
        row: dict[str, Any] = json.loads(self.process.stdout.readline())
        return row

    @contextlib.contextmanager
    def serving(self) -> Iterator[Callable[[str, float], dict[str, Any]]]:
        """:meth:`run`, for the time of a ``with`` statement."""
        try:
            yield self.run
        finally:
            with self.process:
                self.process.kill()


def serve(device: str) -> None:
    """What a lane does: import all that models need, then run in a fork what comes from standard input."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for name in ("torch._dynamo", *SOURCES, "transformers.modeling_utils", "diffusers.models.modeling_utils"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        key, budget = json.loads(line)
        answers.write(json.dumps(forked(key, device, budget)) + "\n")
        answers.flush()


def forked(key: str, device: str, budget: float) -> dict[str, Any]:
    """Run one model in a fork of this process, within ``budget`` seconds."""
    row: dict[str, Any] = {"op": key, "device": device}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answer, errors = Path(folder, "answer"), Path(folder, "errors")
        child = os.fork()
        if child == 0:
            in_child(key, device, answer, errors)
        while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() - begun < budget:
            time.sleep(0.05)
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            row["stopped"] = f"over {budget:.0f} seconds"
        elif answer.exists() and not ended[1]:
            row.update(json.loads(answer.read_text(encoding="utf-8")))
        else:
            said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
            row["stopped"] = f"the process died ({os.waitstatus_to_exitcode(ended[1])}): {said[-1][:300]}"
    row["whole_seconds"] = round(time.monotonic() - begun, 2)
    return row


def in_child(key: str, device: str, answer: Path, errors: Path) -> NoReturn:
    """Run a model, and end the process."""
    code = 1
    try:
        with errors.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        answer.write_text(json.dumps(work(key, device)), encoding="utf-8")
        code = 0
    except BaseException:  # noqa: BLE001 - told by what is written last
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def in_turns(keys: Iterable[str]) -> list[str]:
    """Models of the sources in turns, so that what ran of a run that was stopped is of all of them."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(key.split("/")[0], []).append(key)
    places = {key: (place / len(group)) for group in groups.values() for place, key in enumerate(group)}
    return sorted(places, key=lambda key: places[key])


# --- the table --------------------------------------------------------------------------------------------------------


def share(row: dict[str, Any]) -> float:
    """The share of kernels that graphs launched."""
    return row["in_graphs"] / row["kernels"] if row.get("kernels") else 0.0


def verdict(row: dict[str, Any]) -> str:
    """How a model came out."""
    for key in ("stopped", "failed"):
        if row.get(key):
            return key
    if row.get("differs"):
        return "differs" if row.get("reference") == "eager" else "not the same each time"
    return "as Dynamo" if row.get("reference") == "dynamo" else "as eager"


def table(found: Iterable[dict[str, Any]]) -> str:
    """The results in Markdown: a summary, a row for each model, and what was in the way."""
    latest = {(row["device"], row["op"]): row for row in found}
    lines = []
    for device in sorted({device for device, _ in latest}):
        mine = {key: row for (where, key), row in latest.items() if where == device}
        lines += [f"On {device}:", "", *summary(mine), "", *models(mine), ""]
    return "\n".join(lines)


def summary(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        '| source | models | as eager, bit for bit | as `backend="eager"`, not as eager | differing | failed | median share | least |',
        "|---|---|---|---|---|---|---|---|",
    ]
    for source in (*SOURCES, ""):
        chosen = [row for key, row in found.items() if key.startswith(source)]
        if not chosen:
            continue
        kinds = Counter(map(verdict, chosen))
        ran = [share(row) for row in chosen if "in_graphs" in row] or [0.0]
        failed = kinds["failed"] + kinds["stopped"]
        lines.append(
            f"| {source or 'all'} | {len(chosen)} | {kinds['as eager']} | {kinds['as Dynamo']} "
            f"| {kinds['differs'] + kinds['not the same each time']} | {failed} "
            f"| {statistics.median(ran):.1%} | {min(ran):.1%} |"
        )
    return lines


def models(found: dict[str, dict[str, Any]]) -> list[str]:
    """Which models are captured without a break, then a table of the others, and what is in the way there."""
    order = sorted(found, key=lambda key: (SOURCES.index(key.split("/")[0]), list(found).index(key)))
    whole = [key for key in order if verdict(found[key]).startswith("as") and not breaks(found[key])]
    others = [key for key in order if key not in whole]
    lines = ["Without a break, and the share in graphs where it is not all:", ""]
    for source in SOURCES:
        names = [named(key, found[key]) for key in whole if key.startswith(source)]
        lines += [f"- **{source}**: {', '.join(names)}"] if names else []
    lines += [
        "",
        "The others:",
        "",
        "| model | kind | kernels | in graphs | programs | breaks | result |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in others:
        row = found[key]
        lines.append(
            f"| {key} | {row.get('kind', '')} | {row.get('kernels', '')} | {share(row):.1%} | {row.get('programs', '')} "
            f"| {breaks(row)} | {verdict(row)} |"
        )
    lines += ["", "What is in the way there:", ""]
    for key in others:
        row = found[key]
        wrong = [row[what] for what in ("stopped", "failed", "differs") if row.get(what)]
        lines += [f"- **{key}**: {'; '.join([*wrong, *in_the_way(row)])}"]
    return lines


def named(key: str, row: dict[str, Any]) -> str:
    """A model without a break, as the list has it."""
    name = key.partition("/")[2]
    marks = [f"{share(row):.1%}"] if share(row) < 0.9995 else []
    marks += ["as Dynamo"] if verdict(row) == "as Dynamo" else []
    return f"`{name}` ({', '.join(marks)})" if marks else f"`{name}`"


def breaks(row: dict[str, Any]) -> int:
    """Eager steps, Dynamo's graph breaks, and graphs that run eagerly."""
    return (
        row.get("eager_steps", 0)
        + sum(count for _, count in row.get("graph_breaks", []))
        + len(row.get("eager_graphs", []))
    )


def in_the_way(row: dict[str, Any]) -> list[str]:
    """The breaks of a model, each with its reason and line; those with one reason in one file are together."""
    found: dict[tuple[str, str], list[tuple[str, str, int]]] = defaultdict(list)
    for _, op, text, source, count in row.get("reasons", []):
        said = re.sub(
            r"host scalar [^ ,]+", "host scalar", re.sub(r"^reads (?!the |a |its )[^ ]+ on", "reads a tensor on", text)
        )
        file, line = place(source)
        found[said, file].append((f"`{op}`", line, count))
    for why, count in row.get("graph_breaks", []):
        what, _, where = why.partition(", at ")
        file, line = place(where)
        found[f"graph break: {what}", file].append(("", line, count))
    for why, source in row.get("eager_graphs", []):
        file, line = place(source)
        found[f"graph: {why}", file].append(("", line, 1))
    texts = []
    for (said, file), parts in found.items():
        ops = list(dict.fromkeys(op for op, _, _ in parts if op))
        ops = [*ops[:4], f"and {len(ops) - 4} more:"] if len(ops) > 4 else ops
        lines = sorted({int(line or 0) for _, line, _ in parts})
        where = f"{file}:{lines[0]} to {lines[-1]}" if len(lines) > 4 else f"{file}:{', '.join(map(str, lines))}"
        times = sum(count for *_, count in parts)
        texts.append(f"{' '.join(ops)} {said} ({where})".strip() + (f" × {times}" if times > 1 else ""))
    return texts


def place(source: str) -> tuple[str, str]:
    """File and line of a reason; the file without its folders."""
    file, _, line = re.sub(r"^.*/", "", source.split(" in ")[0]).rpartition(":")
    return file, line


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE.parent / "build" / "zoo.jsonl")
    parser.add_argument("--chunk", default="1/1", help="which part of how many: 2/4 is the second of four")
    parser.add_argument("--only", nargs="+", help="parts of names of models")
    parser.add_argument("--first", nargs="+", default=(), help="names of models to begin with")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no model later than this")
    parser.add_argument("--budget", type=float, default=150, help="seconds for one model")
    parser.add_argument("--table", action="store_true", help="print what the results say, and run nothing")
    parser.add_argument("--lane", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.lane:
        serve(arguments.device)
        return
    if not arguments.table:
        from zoo_models import zoo

        done = {row["op"] for row in rows(arguments.results) if row["device"] == arguments.device}
        names = [key for key in in_turns(zoo) if not arguments.only or any(part in key for part in arguments.only)]
        names.sort(key=lambda key: key not in arguments.first)
        go_on(names, done, [lambda: Lane(arguments.device).serving()] * arguments.processes, arguments)
    sys.stdout.write(table(rows(arguments.results)) + "\n")


if __name__ == "__main__":
    main()
