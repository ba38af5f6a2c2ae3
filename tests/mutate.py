"""Random mutants of a module, each against the tests that are about it: ``make mutate``, or ``python tests/mutate.py``.

    python tests/mutate.py partition rules --sample 40 --minutes 20 --seed 7

Cosmic Ray makes the mutants: one operator, comparison, number or boolean is another, a loop has no iteration, a decorator
is gone. A mutant that the tests do not notice is printed as a difference: a test is missing, or the mutant does the same
as the code.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sabotage import PACKAGE, ROOT, copy_to, planted, run

TARGETS = {
    "partition": (
        "compiling/partition.py",
        "test_partition.py test_contract_order.py test_contract_ambient.py test_contract_hostile.py",
    ),
    "recorder": ("recordings/recorder.py", "test_replay.py test_lifetimes.py test_executor.py"),
    "locations": ("recordings/locations.py", "test_lifetimes.py test_executor.py test_contract_stale.py"),
    "epilogue": ("recordings/epilogue.py", "test_lifetimes.py test_executor.py test_contract_aliases.py"),
    "emit": ("recordings/replay.py", "test_replay.py test_bridges.py test_host_time.py test_contract_aliases.py"),
    "bridges": ("recordings/copies.py", "test_bridges.py test_replay.py test_contract_stale.py"),
    "keys": ("calling/keys.py", "test_executor.py test_eviction.py test_profiling.py test_contract_keys.py"),
    "rules": ("marks/rules.py", "test_marking.py test_contract_reasons.py"),
}
"""What can be mutated: a module, and the tests that ought to notice."""
LIMIT = 10
"""How many times as long as without a mutant tests may take; then a mutant counts as noticed."""


@dataclass(frozen=True)
class Mutant:
    """A module's source with one change."""

    file: Path
    """Relative to the folder that holds the package."""
    source: str

    def difference(self) -> str:
        before = (ROOT / self.file).read_text(encoding="utf-8")
        lines = difflib.unified_diff(before.splitlines(), self.source.splitlines(), str(self.file), "mutant", n=2)
        return "\n".join(line.rstrip("\n") for line in lines)


def main() -> int:
    """Mutate what the command line asks for; 1 where a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", help=f"by default all: {' '.join(TARGETS)}")
    parser.add_argument("--sample", type=int, default=30, help="how many mutants of each module")
    parser.add_argument("--minutes", type=float, default=30, help="no mutant is begun after that time")
    parser.add_argument("--seed", type=int, default=None, help="by default another one each time")
    asked = parser.parse_args()
    if unknown := set(asked.targets) - TARGETS.keys():
        parser.error(f"no target: {' '.join(sorted(unknown))}; there are {' '.join(TARGETS)}")
    seed = random.randrange(10**6) if asked.seed is None else asked.seed
    print(f"seed {seed}", flush=True)
    end, survived = time.monotonic() + 60 * asked.minutes, 0
    for name in asked.targets or TARGETS:
        survived += mutate(name, asked.sample, end, random.Random(seed))
    return int(survived > 0)


def mutate(target: str, sample: int, end: float, chance: random.Random) -> int:
    """Run the tests of a target on a sample of its mutants, and print those that survive; how many do."""
    module, tests = TARGETS[target]
    chosen = itertools.islice(mutants(Path(PACKAGE, module), chance), sample)
    came: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_to(root)
        begun = time.monotonic()
        code, output = run(root, tests.split(), "-m", "not gpu")
        if code != 0:
            print(f"{target}: the tests fail without a mutant\n{output}")
            return 1
        limit = LIMIT * (time.monotonic() - begun)
        for mutant in chosen:
            if time.monotonic() > end:
                break
            with planted(root, mutant.file, mutant.source):
                code, _ = run(root, tests.split(), "-m", "not gpu", limit=limit)
            outcome = {None: "hung", 0: "survived"}.get(code, "noticed")
            came[outcome] += 1
            if outcome == "survived":
                print(f"\n{target}: nothing notices\n{mutant.difference()}", flush=True)
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(came.items()))
    print(f"\n{target}: {told or 'no time'}", flush=True)
    return came["survived"]


def mutants(file: Path, chance: random.Random) -> Iterator[Mutant]:
    """The mutants of a module in random order, those which are other code: annotations, which nobody evaluates, are none."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    source = (ROOT / file).read_text(encoding="utf-8")
    kinds = [kind for kind in map(plugins.get_operator, plugins.operator_names()) if not kind.arguments()]
    nodes = list(ast_nodes(get_ast(source)))
    places = [
        (kind, place) for kind in kinds for place in range(sum(len(list(kind().mutation_positions(n))) for n in nodes))
    ]
    chance.shuffle(places)
    seen = {_code(source)}
    for kind, place in places:
        mutated = mutate_code(source, kind(), place)
        if mutated is not None and (code := _code(mutated)) is not None and code not in seen:
            seen.add(code)
            yield Mutant(file, mutated)


def _code(source: str) -> str | None:
    """What Python runs of a module's source; None: it is no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


if __name__ == "__main__":
    sys.exit(main())
