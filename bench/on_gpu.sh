#!/usr/bin/env bash
# Everything that one wants to know of a GPU: bench/on_gpu.sh [MINUTES] [--wheels FOLDER] ...; bench/on_gpu.sh --help says more.
#
# Runs with $PYTHON, else with .venv/bin/python where there is one, else with python3. Nothing is installed but the wheels given.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3
[ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
exec "${PYTHON:-$python}" "$root/bench/on_gpu.py" "$@"
