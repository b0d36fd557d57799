"""Rejection sampling (2506.02208, table 1, SFT): cross-entropy on the teacher's right answers.

    python -m kdrl_jax.train --config=configs/sft.py

The teacher answers 32 problems 4 times a step; the right ones of these 128 responses are trained
on, each weighing the same. Not run yet at this scale; the paper measured 51.5 on average.
"""

from configs.stage2 import get_config as stage2


def get_config():
    c = stage2()
    c.objective = "sft"
    c.aggregation = "seq-mean-token-mean"
    c.entropy_coef = 0.0
    c.optimizer.learning_rate = 2e-7
    c.rollout.update(prompts_per_step=32, group_size=4)
    return c
