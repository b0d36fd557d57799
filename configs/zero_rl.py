"""Zero-RL of the paper (2506.02208, section 4.5): KDRL from the base model Qwen2.5-3B.

    python -m kdrl_jax.train --config=configs/zero_rl.py

The teacher is Qwen2.5-7B after `zero_rl_teacher.py`: `runs/zero_rl_teacher` where that is, else
a published model that others made of Qwen2.5-7B by GRPO on other data (SimpleRL-Zoo). Models, data
and held-out problems, MATH500, come from the hub (extra `data`). Reward is accuracy alone.
`zero_rl.py:grpo` and `zero_rl.py:kd_rkl` are the other rows of table 2. Not run yet at this scale;
the paper measured 32.5 on average against 31.3 for GRPO and 30.8 for KD-RKL.
"""

from configs import sources
from configs.base import get_config as base
from configs.shapes import QWEN25_3B, QWEN25_7B
from kdrl_jax.data.filters import ZERO_RL_STUDENT_FILTERS

VARIANTS = {
    "grpo": {"objective": "grpo"},
    "kd_rkl": {"objective": "kd_rkl", "beta.schedule": "constant", "beta.init": 5e-3},
}


def get_config():
    c = base()
    c.student.path = sources.QWEN25_3B
    c.student.shape.update(QWEN25_3B)
    c.teacher.path = f"runs/zero_rl_teacher or {sources.SIMPLERL_7B}"
    c.teacher.shape.update(QWEN25_7B)
    c.eval.samples = 16
    c.steps = 480
    c.beta.init = 2e-1
    c.beta.min = 2e-3
    c.beta.delta = 8e-4
    c.data.path = sources.SKYWORK
    c.data.eval_path = sources.MATH500
    c.data.on_bad = "drop"
    c.data.filters = ZERO_RL_STUDENT_FILTERS
    c.data.prompt_style = "zero_rl"
    c.rollout.max_new_tokens = 8192
    c.rollout.temperature = 1.0
    c.reward.require_format = False
    return c
