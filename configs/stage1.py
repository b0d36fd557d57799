"""Stage 1 of the paper (2506.02208, section 4): GRPO from R1-Distill-Qwen-1.5B at 8K tokens.

    python -m kdrl_jax.train --config=configs/stage1.py \
        --config.student.path=DeepSeek-R1-Distill-Qwen-1.5B \
        --config.data.path=deepscaler.jsonl --config.data.eval_path=aime24.jsonl

Hardware: a pod or a multi-GPU host. Not run yet at this scale; no time or result is claimed. The
paper adds a reference KL (coefficient 1e-3, k3) in this stage, which is not part of the objective
here.
"""

from configs.base import get_config as base


def get_config():
    c = base()
    c.eval.samples = 16
    c.objective = "grpo"
    c.steps = 500
    c.rollout.max_new_tokens = 8192
    return c
