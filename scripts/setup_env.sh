#!/usr/bin/env bash
# Create the virtual environment named by the first argument and install this project into it.
# With an NVIDIA GPU (nvidia-smi answers) any torch >= 2.11 that pip finds, else the pinned CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="$1"

fail() {
    printf 'toprovar set-up: %s\n' "$@" >&2
    exit 1
}

# Version managers leave shims that exist and do not run, so every candidate is started.
python="" without_venv=""
for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        python="$candidate"
        break
    fi
    without_venv="$candidate"
done
if [ -z "$python" ] && [ -n "$without_venv" ]; then
    fail "$without_venv cannot create virtual environments: its venv module is missing." \
        "Install it (Debian, Ubuntu: sudo apt install python3-venv) and run make again."
fi
if [ -z "$python" ]; then
    fail "Python 3.11 or newer is needed; found $(python3 --version 2>&1 || echo none)." \
        "Install it (Ubuntu: sudo apt install python3.12 python3.12-venv), or name one: make demo PYTHON=/path/to/python3.12"
fi

compiler=""
for candidate in ${CXX:-g++ clang++}; do
    if command -v "$candidate" >/dev/null 2>&1; then
        compiler="$candidate"
        break
    fi
done
[ -n "$compiler" ] || fail "no C++ compiler found; torch.compile needs one." \
    "Install it (Debian, Ubuntu: sudo apt install g++ python3-dev) or set CXX, and run make again."

echo "Creating $venv with $("$python" --version) ($python), compiler $compiler"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)

if nvidia-smi >/dev/null 2>&1; then
    echo "NVIDIA GPU found: installing torch >= 2.11 with CUDA"
    grep -v '^torch==' constraints.txt >"$venv/constraints.txt"
    "${pip[@]}" -c "$venv/constraints.txt" 'torch>=2.11'
else
    cp constraints.txt "$venv/constraints.txt"
    torch="$(grep '^torch==' constraints.txt)"
    echo "No NVIDIA GPU: installing the CPU build of $torch"
    # A plain wheel may bring gigabytes of CUDA libraries, so the build tagged +cpu is asked for first; pip finds it
    # where PIP_EXTRA_INDEX_URL names PyTorch's index of CPU wheels.
    "${pip[@]}" -c "$venv/constraints.txt" "$torch+cpu" 2>/dev/null ||
        "${pip[@]}" -c "$venv/constraints.txt" "$torch"
fi
# The packaging test builds a wheel with the setuptools of this environment.
"${pip[@]}" -c "$venv/constraints.txt" setuptools -e '.[dev]'
"$venv/bin/python" -c 'import torch; print("torch", torch.__version__, "is ready")'
