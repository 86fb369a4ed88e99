#!/usr/bin/env bash
# Runs ruff and all tests; makes its own environment in .venv if the packages are missing.
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_env.sh test \
    "import torch, numpy, scipy, PIL, click, requests, psutil, tqdm, safetensors, pytest, xdist, ruff, basedpyright, sklearn, onnxscript, onnxruntime, setuptools, diffusers, transformers, peft"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m basedpyright --pythonpath "$(command -v "$PYTHON")"
"$PYTHON" -m pytest --numprocesses=2 --dist=worksteal "$@"
