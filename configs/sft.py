"""Rejection sampling (2506.02208, table 1 and appendix B.2): cross-entropy on right answers.

    python -m kdrl_jax.train --config=configs/sft.py

Before the first step the teacher answers every problem 8 times, and the right answers are kept;
each step trains on 128 of them, each weighing the same, in shuffled epochs. An answer is right by
accuracy alone. `'--config.sft_problems=10000'` has the teacher answer fewer problems. Not run yet
at this scale; the paper measured 51.5 on average.
"""

from configs.stage2 import get_config as stage2


def get_config():
    c = stage2()
    c.objective = "sft"
    c.aggregation = "seq-mean-token-mean"
    c.entropy_coef = 0.0
    c.reward.require_format = False
    c.optimizer.learning_rate = 2e-7
    c.rollout.update(prompts_per_step=16, group_size=8)
    return c
