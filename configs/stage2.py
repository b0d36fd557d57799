"""Stage 2 of the paper (2506.02208, section 4), the main experiment: KDRL-Annealing.

    python -m kdrl_jax.train --config=configs/stage2.py \
        --config.student.path=DeepScaleR-1.5B-8K --config.teacher.path=Skywork-OR1-Math-7B \
        --config.data.path=skywork_or1.jsonl --config.data.eval_path=aime24.jsonl

β falls from 5e-3 to 1e-3 by 5e-5 a step; `--config.beta.schedule=constant --config.beta.init=2e-3`
is the paper's constant variant. Hardware: a pod. Not run yet at this scale; no time or result is
claimed. The paper measured 57.2 on average over six benchmarks against 54.6 for GRPO.
"""

from configs.base import get_config as base


def get_config():
    c = base()
    c.eval.samples = 16
    return c
