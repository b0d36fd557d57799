"""The zero-RL teacher of the paper (2506.02208, section 4.5): GRPO from Qwen2.5-7B.

    python -m kdrl_jax.train --config=configs/zero_rl_teacher.py

Not run yet at this scale; no time or result is claimed.
"""

from configs import sources
from configs.shapes import QWEN25_7B
from configs.zero_rl import get_config as zero_rl
from kdrl_jax.data.filters import ZERO_RL_TEACHER_FILTERS


def get_config():
    c = zero_rl()
    c.student.path = sources.QWEN25_7B
    c.student.shape.update(QWEN25_7B)
    c.objective = "grpo"
    c.data.filters = ZERO_RL_TEACHER_FILTERS
    c.steps = 300
    return c
