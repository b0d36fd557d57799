"""Stage 1 of the paper (2506.02208, section 4): GRPO from R1-Distill-Qwen-1.5B at 8K tokens.

    python -m kdrl_jax.train --config=configs/stage1.py

The data are DeepScaleR's, without the few rows that lack an answer; held-out problems are AIME24's.
The model and both come from the hub (extra `data`).
A KL to the initial student, estimated by k3, has the coefficient 1e-3. That the reward includes the
format is a choice: the paper does not say it of stage 1. Hardware: a pod or a multi-GPU host. Not
run yet at this scale; no time or result is claimed.
"""

from configs.base import get_config as base
from configs.shapes import R1_DISTILL_QWEN_1_5B
from configs.sources import AIME24, DEEPSCALER, R1_DISTILL_1_5B
from kdrl_jax.data.filters import STAGE1_FILTERS


def get_config():
    c = base()
    c.student.path = R1_DISTILL_1_5B
    c.student.shape.update(R1_DISTILL_QWEN_1_5B)
    c.eval.update(samples=16, max_new_tokens=32_768)
    c.objective = "grpo"
    c.reference_coef = 1e-3
    c.steps = 500
    c.rollout.max_new_tokens = 8192
    c.data.path = DEEPSCALER
    c.data.eval_path = AIME24
    c.data.on_bad = "drop"
    c.data.filters = STAGE1_FILTERS
    return c
