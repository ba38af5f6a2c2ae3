#!/usr/bin/env bash
# Builds what a release uploads, from the last commit, and checks it as a user would meet it:
#   make release REPOSITORY=https://github.com/owner/name
# REPOSITORY is where the README's links lead on a package index. Without it the links stay as they are: do not upload that.
# PYTHON: the Python of the environments. What is built lies in build/release/dist.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD OUT=$PWD/build/release PYTHON=${PYTHON:-python3}
say() { echo "release: $*" >&2; }
[ -z "$(git status --porcelain --untracked-files=no)" ] || say "what is not committed is left out"

rm -rf "$OUT" && mkdir -p "$OUT/source"
git archive HEAD | tar -x -C "$OUT/source"
"$PYTHON" - "$OUT/source" "${REPOSITORY:-}" <<'PYTHON'
import pathlib, re, sys, tomllib

source, repository = pathlib.Path(sys.argv[1]), sys.argv[2].rstrip("/")
version = tomllib.loads((source / "pyproject.toml").read_text())["project"]["version"]
if f"## {version} " not in (source / "CHANGELOG.md").read_text():
    sys.exit(f"release: CHANGELOG.md has no entry for {version}")
if repository:
    readme, pyproject = source / "README.md", source / "pyproject.toml"
    def absolute(link):
        kind = "raw" if link[1] == "!" else "blob"
        return f"{link[1]}[{link[2]}]({repository}/{kind}/v{version}/{link[3]})"
    readme.write_text(re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)", absolute, readme.read_text()))
    urls = {"Repository": repository, "Issues": f"{repository}/issues",
            "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md"}
    table = "[project.urls]\n" + "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    pyproject.write_text(pyproject.read_text().replace("[project.optional-dependencies]", f"{table}\n[project.optional-dependencies]", 1))
else:
    print("release: no REPOSITORY, so the README's links stay relative: do not upload this", file=sys.stderr)
PYTHON

say "building"
"$PYTHON" -m venv "$OUT/tools"
"$OUT/tools/bin/python" -m pip install -qq build twine
"$OUT/tools/bin/python" -m build --outdir "$OUT/dist" "$OUT/source" >"$OUT/build.log"
"$OUT/tools/bin/python" -m twine check --strict "$OUT"/dist/*

say "the wheel, in an environment with nothing else"
"$PYTHON" -m venv "$OUT/user"
"$OUT/user/bin/python" -m pip install -qq -c "$ROOT/constraints.txt" "$OUT"/dist/*.whl
cd "$OUT" # away from the checkout, which Python would import
cat >"$OUT/client.py" <<'PYTHON'
import torch

from breakable_backend import Report, eager_on_graph, explain


@eager_on_graph
def clip(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm() if bool(x.norm() > 1) else x + 0


def model(x: torch.Tensor) -> torch.Tensor:
    return clip(x.sin() + 1) * 2


compiled = torch.compile(model, backend="breakable_cg")
with torch.no_grad():
    for _ in range(4):
        assert torch.equal(compiled(torch.ones(4)), model(torch.ones(4)))
report: Report = explain(compiled)
assert report.programs[0].replays
PYTHON
"$OUT/user/bin/python" -W ignore "$OUT/client.py"
"$OUT/user/bin/python" -W ignore -m breakable_backend

say "its types, as mypy and pyright see them"
"$OUT/user/bin/python" -m pip install -qq -c "$ROOT/constraints.txt" mypy pyright
"$OUT/user/bin/python" -m mypy --strict "$OUT/client.py"
"$OUT/user/bin/python" -m pyright --pythonpath "$OUT/user/bin/python" "$OUT/client.py" || {
    say "pyright could not run, or found errors"
    exit 1
}

say "the sdist's own tests"
mkdir "$OUT/sdist" && tar -xzf "$OUT"/dist/*.tar.gz -C "$OUT/sdist" --strip-components 1
"$OUT/user/bin/python" -m pip install -qq -c "$ROOT/constraints.txt" pytest hypothesis expecttest depyf
cd "$OUT/sdist"
PYTHONPATH="$OUT/sdist" "$OUT/user/bin/python" -m pytest -q -p no:cacheprovider ${RELEASE_TESTS:--k "options or eviction or retries or layering or public_api or contract_once"}
say "done: $(cd "$OUT/dist" && ls | tr '\n' ' ')"
