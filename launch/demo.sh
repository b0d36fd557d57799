#!/usr/bin/env bash
# The demo on a fresh machine: a virtual environment, the install, the run, the picture.
# 4 to 7 minutes on 2 CPU cores. Run it again to continue where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
echo "Installing into .venv, which takes a minute or two."
make_env plot
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
echo "Training: a teacher, a student's warm start, then 300 steps of KDRL. Ctrl-C saves."
python -m kdrl_jax.train --config=configs/demo.py --workdir=runs/demo "$@"
python -m kdrl_jax.report runs/demo
cat <<'END'

Look at
  runs/demo/report.html       the page about the run: open it in a browser
  runs/demo/curves.png        the learning curves
  runs/demo/samples/          what the student wrote, and the verdicts on it
  runs/demo/metrics.jsonl     all numbers, a line for each step

Go on with
  . .venv/bin/activate
  # The same student without a teacher, and both in one picture:
  python -m kdrl_jax.train --config=configs/demo.py --config.objective=grpo --workdir=runs/demo_grpo
  python -m kdrl_jax.report runs/demo runs/demo_grpo --output=runs/both.html
  # The trained student as a Hugging Face folder:
  python -m kdrl_jax.convert --to=hf runs/demo runs/demo_exported
  # Your own model and problems: see README.md.
END
