#!/usr/bin/env bash
# Lint, types and tests in a virtual environment of their own. Arguments go to pytest.
# KDRL_TORCH=2.13.0 also installs that torch and runs the live comparison with PyTorch.
# KDRL_SMOLLM2=FOLDER uses a model folder that launch/smollm2.py wrote.
# KDRL_NEWEST=1 takes the newest release of every dependency, all that the tests can use, in an
# environment beside the usual one: .venv-newest, of Python 3.12 unless PYTHON says otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
if [ -n "${KDRL_NEWEST:-}" ]; then
  export PYTHON="${PYTHON:-python3.12}" KDRL_TORCH=
  [ ! -x .venv-newest/bin/python ] || PYTHON=.venv-newest/bin/python
  "$(find_python)" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || {
    echo "error: the newest releases need Python 3.12 or newer: set PYTHON to one, and remove" \
      ".venv-newest where it is there" >&2
    exit 2
  }
  make_env test,reasoning,tpu,parity .venv-newest --upgrade --upgrade-strategy eager
  python -m pip list --disable-pip-version-check # what is tested
else
  make_env test
fi
ruff check .
ruff format --check .
mypy
python -m pytest -n "${KDRL_TEST_WORKERS:-2}" --dist=loadfile --no-loadscope-reorder "$@"
