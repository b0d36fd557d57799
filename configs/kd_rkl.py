"""Distillation alone on stage 2's data (2506.02208, table 1): reverse KL, all advantages 0.

    python -m kdrl_jax.train --config=configs/kd_rkl.py

β is constant at 2e-3 (appendix B.2). `kd_rkl.py:equal_time` takes the 200 steps that cost as much
time as 280 of KDRL (section 4.3). Problems need no answers here: see docs/bring_your_own.md. Not
run yet at this scale; the paper measured 56.1 on average.
"""

from configs.stage2 import get_config as stage2

VARIANTS = {"equal_time": {"steps": 200}}


def get_config():
    c = stage2()
    c.objective = "kd_rkl"
    c.beta.schedule = "constant"
    c.beta.init = 2e-3
    return c
