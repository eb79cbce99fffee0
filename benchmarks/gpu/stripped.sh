#!/bin/bash
# Try every part of the GPU checks in its tiny form, in an environment that has what they need and nothing else.
#
#   bash benchmarks/gpu/stripped.sh [VENV]        default: .venv-stripped; made once, with PYTHON (default: python3)
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
venv=${1:-$root/.venv-stripped}
if [ ! -e "$venv/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    # Three wheels beyond the five libraries and their dependencies: tyro, docstring_parser, typeguard.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" \
        torch transformers accelerate tokenizers safetensors tyro docstring_parser typeguard
    touch "$venv/.ready"
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
env -u PYTHONPATH OMP_NUM_THREADS=1 "$venv/bin/python" "$root/benchmarks/gpu" run all \
    --device cpu --tiny --out "$out"
