"""GRPO alone on stage 2's data (2506.02208, table 1): the baseline without a teacher.

    python -m kdrl_jax.train --config=configs/grpo.py

`grpo.py:equal_time` takes the 460 steps that cost as much time as 280 of KDRL (section 4.3). Not
run yet at this scale; the paper measured 54.6 on average.
"""

from configs.stage2 import get_config as stage2

VARIANTS = {"equal_time": {"steps": 460}}


def get_config():
    c = stage2()
    c.objective = "grpo"
    return c
