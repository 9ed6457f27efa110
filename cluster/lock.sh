#!/usr/bin/env bash
# Locks what the image installs, with hashes, for Python 3.11 on Linux x86-64:
#
#   pip install uv && cluster/lock.sh
#
# requirements-cuda.txt has PyTorch as the package index serves it, with CUDA's libraries, and takes the rest from
# requirements-cpu.txt. Run it again after a change of the dependencies in pyproject.toml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
locked=$(mktemp)
trap 'rm -f "$locked"' EXIT
uv --no-config pip compile pyproject.toml --extra lora --extra mlflow --extra otel --extra speed --extra tiff \
    --extra wandb \
    --generate-hashes --python-version 3.11 --python-platform linux --no-header --no-annotate --quiet \
    --output-file "$locked"
# a requirement begins a line, its hashes are on indented lines below
split() {
    awk -v wanted="$1" '/^[A-Za-z0-9]/ { is_torch = /^(torch|triton|nvidia-|cuda-)/ } is_torch == wanted' "$locked"
}
note="# Written by cluster/lock.sh."
{ echo "$note"; split 0; } > cluster/requirements-cpu.txt
{ echo "$note"; echo "-r requirements-cpu.txt"; split 1; } > cluster/requirements-cuda.txt
