#!/usr/bin/env bash
# Runs ruff, basedpyright and all tests; makes its own environment in .venv if the packages are missing.
set -euo pipefail
cd "$(dirname "$0")"
packages="torch numpy scipy PIL click requests psutil tqdm safetensors pytest xdist ruff basedpyright sklearn onnxscript"
packages+=" onnxruntime setuptools diffusers transformers peft"
source ./setup_env.sh test "from importlib.util import find_spec; assert all(map(find_spec, '$packages'.split()))"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .

# The type checker is one process, which runs at the same time as the tests; what it says stands at the end.
types_log=$(mktemp)
"$PYTHON" -m basedpyright --pythonpath "$(command -v "$PYTHON")" >"$types_log" 2>&1 &
checker=$!
trap 'kill "$checker" 2>/dev/null || true; rm -f "$types_log"' EXIT
tests=0 types=0
"$PYTHON" -m pytest --numprocesses=2 --dist=worksteal "$@" || tests=$?
wait "$checker" || types=$?
cat "$types_log"
[ "$types" = 0 ] || echo "basedpyright failed with exit code $types; pytest ended with $tests" >&2
exit $((tests ? tests : types))
