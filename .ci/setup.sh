#!/bin/sh
# Makes the virtual environment VENV with the extras EXTRAS, as `make` does before all else. PYTHON: what to make it with.
set -euf
RUN=$VENV/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1
say() { echo "set-up: $*" >&2; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
python=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if new_enough "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
    say "no Python 3.11 or newer among: ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}"
    say "install one, or name it: make PYTHON=/path/to/python ..."
    exit 1
fi

# Without pip at first: Debian's Python has no ensurepip, and beside a torch of its own the machine has a pip too.
if ! new_enough $RUN; then
    say "making $VENV with $("$python" --version)"
    "$python" -m venv --clear --without-pip $VENV
fi

# A torch that sees this machine's GPU is never replaced: .venv then lies over the packages beside it. That Python may
# itself be a virtual environment, which --system-site-packages would look past; a line in a .pth file does not.
torch=$("$python" -c '
import importlib.metadata, torch
if torch.version.cuda and torch.cuda.is_available():
    print(importlib.metadata.version("torch"))' 2>/dev/null || true)
if [ -n "$torch" ]; then
    say "using the torch $torch of $(command -v "$python"), which sees a GPU"
    "$python" -c 'import site; [print(f"import site; site.addsitedir({path!r})") for path in site.getsitepackages()]' \
        > "$($RUN -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/machine.pth"
fi

if ! $RUN -m pip --version >/dev/null 2>&1 && ! $RUN -m ensurepip --default-pip >/dev/null 2>&1; then
    say "this Python has neither pip nor ensurepip (on Debian and Ubuntu: apt install python3-venv)"
    exit 1
fi

if [ -z "$torch" ]; then
    say "installing torch and the tools into $VENV; the first time this takes minutes"
    $RUN -m pip install -qq -c constraints.txt -e ".[$EXTRAS]"
    exit
fi

# With what is there; else with what is missing from the network; else without, and the checkout put on the path by hand,
# for which no tool need be there.
echo "torch==$torch" > $VENV/keep.txt
install="$RUN -m pip install -qq -c $VENV/keep.txt -e .[$EXTRAS]"
$install --no-index --no-build-isolation >$VENV/install.log 2>&1 && exit
say "installing what is missing, and no other torch"
$install --retries 1 --timeout 15 >>$VENV/install.log 2>&1 && exit
$RUN -c '
import importlib.metadata, os, pathlib, sysconfig, tomllib
from pip._vendor.packaging.requirements import Requirement

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
name, version = project["name"].replace("-", "_"), project["version"]
site = pathlib.Path(sysconfig.get_path("purelib"))
entry_points = "".join(
    f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
    for group, entries in project["entry-points"].items()
)
files = {
    f"{name}.pth": f"{pathlib.Path.cwd()}\n",
    f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
    f"{name}-{version}.dist-info/entry_points.txt": entry_points,
}
files[f"{name}-{version}.dist-info/RECORD"] = "".join(f"{path},,\n" for path in files)
for path, text in files.items():
    (site / path).parent.mkdir(exist_ok=True)
    (site / path).write_text(text)

extras = project["optional-dependencies"]
for line in project["dependencies"] + [line for extra in os.environ["EXTRAS"].split(",") for line in extras[extra]]:
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate():
        try:
            fits = requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            fits = False
        if not fits:
            print(f"set-up: going on without {line}; what needs it will say so")' >&2
say "$VENV/install.log says what pip had to say"
