"""Distillation alone on stage 2's data (2506.02208, table 1): reverse KL, all advantages 0.

    python -m kdrl_jax.train --config=configs/kd_rkl.py

β is constant at 5e-3, as the paper states it for its zero-RL KD-RKL. Not run yet at this scale;
the paper measured 56.1 on average.
"""

from configs.stage2 import get_config as stage2


def get_config():
    c = stage2()
    c.objective = "kd_rkl"
    c.beta.schedule = "constant"
    c.beta.init = 5e-3
    return c
