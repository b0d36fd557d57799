#!/usr/bin/env bash
# The demo on a fresh machine: a virtual environment, the install, the run, the picture.
# About 10 minutes on 2 CPU cores. Run it again to continue where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
make_env plot
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
python -m kdrl_jax.train --config=configs/demo.py --workdir=runs/demo "$@"
python -m kdrl_jax.report runs/demo
