#!/usr/bin/env bash
# Lint, types and tests in a virtual environment of their own. Arguments go to pytest.
# KDRL_TORCH=2.13.0 also installs that torch and runs the live comparison with PyTorch.
# KDRL_SMOLLM2=FOLDER uses a model folder that launch/smollm2.py wrote.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
make_env test
ruff check .
ruff format --check .
mypy
python -m pytest -n "${KDRL_TEST_WORKERS:-2}" --dist=loadfile --no-loadscope-reorder "$@"
