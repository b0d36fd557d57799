"""Zero-RL of the paper (2506.02208, section 4.3): KDRL from the base model Qwen2.5-3B.

    python -m kdrl_jax.train --config=configs/zero_rl.py \
        --config.student.path=Qwen2.5-3B --config.teacher.path=runs/zero_rl_teacher \
        --config.data.path=skywork_or1.jsonl --config.data.eval_path=math500.jsonl

The teacher is Qwen2.5-7B after `zero_rl_teacher.py`. Reward is accuracy alone. Not run yet at this
scale; the paper measured 32.5 on average against 31.3 for GRPO and 30.8 for KD-RKL.
"""

from configs.base import get_config as base


def get_config():
    c = base()
    c.eval.samples = 16
    c.steps = 480
    c.beta.init = 2e-1
    c.beta.min = 2e-3
    c.beta.delta = 8e-4
    c.data.prompt_style = "zero_rl"
    c.rollout.max_new_tokens = 8192
    c.rollout.temperature = 1.0
    c.reward.require_format = False
    return c
