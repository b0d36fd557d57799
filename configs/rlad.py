"""RLAD on Knights and Knaves (arXiv 2602.22495): the teacher within the ratio, TRRD.

    python -m kdrl_jax.train --config=configs/rlad.py

The student is Qwen3-0.6B and the teacher Qwen3-8B, from the hub; puzzles have 2 to 8 people, and
evaluations give the accuracy of each size. A step samples 32 puzzles 8 times and makes one update
of these 256 rollouts: the paper's 32 is the size of a *micro*-batch. `rlad.py:8k` is the longer
budget, `1.7b` the larger student, `grpo` and `kdrl` the rivals, `sft` the offline one; several are
joined by commas: `rlad.py:1.7b,8k,kdrl`. `math` is the mathematics setting (extra `data`), with
`math,1.7b_base`, `math,8b_base` and `math,r1_1.5b` for its other students.

Choices, where the paper is silent: the temperature 1.0 of its two recipes, Logic-RL and Skywork-
OR1; β of KDRL; no KL to a reference model, whose coefficient it does not give; the 32 problems of
a step. Not run yet at this scale; the paper measured 0.94 at 8K tokens against 0.92 for KDRL and
0.76 for GRPO.
"""

from configs import sources
from configs.base import get_config as base
from configs.shapes import (
    QWEN3_0_6B,
    QWEN3_1_7B,
    QWEN3_8B,
    QWEN3_32B,
    R1_DISTILL_QWEN_1_5B,
    R1_DISTILL_QWEN_7B,
)


def _role(role, path, shape):
    return {f"{role}.path": path} | {f"{role}.shape.{key}": size for key, size in shape.items()}


_NO_FORMAT = {"reward.require_format": False}  # of base models, and of the teacher's answers
_30K = {"rollout.max_new_tokens": 30_720, "eval.max_new_tokens": 30_720}

VARIANTS = {
    # Skywork-OR1's recipe: 105K unfiltered problems, groups that are all right or all wrong
    # replaced, adaptive entropy. 16 problems of 16 rollouts make the paper's global batch of 256.
    "math": {
        **_role("student", sources.QWEN3_1_7B, QWEN3_1_7B),
        "data.task": "",
        "data.task_args": "",
        "data.path": sources.SKYWORK,
        "data.eval_path": sources.AIME24,
        "data.on_bad": "drop",
        "data.prompt_style": "kdrl",
        "data.max_prompt_tokens": 2048,
        "data.prompt_buckets": (512, 1024, 2048),
        "rollout.prompts_per_step": 16,
        "rollout.group_size": 16,
        "rollout.max_new_tokens": 8192,
        "rollout.refill": 4,
        "adaptive_entropy.target": 0.2,
        "eval.by": "",
        "eval.samples": 32,
        "micro_batch": 16,
    },
    "8k": {"rollout.max_new_tokens": 8192},
    "1.7b": _role("student", sources.QWEN3_1_7B, QWEN3_1_7B),
    "1.7b_base": {**_role("student", sources.QWEN3_1_7B_BASE, QWEN3_1_7B), **_30K, **_NO_FORMAT},
    "8b_base": {
        **_role("student", sources.QWEN3_8B_BASE, QWEN3_8B),
        **_role("teacher", sources.QWEN3_32B, QWEN3_32B),
        **_30K,
        **_NO_FORMAT,
    },
    "r1_1.5b": {
        **_role("student", sources.R1_DISTILL_1_5B, R1_DISTILL_QWEN_1_5B),
        **_role("teacher", sources.R1_DISTILL_7B, R1_DISTILL_QWEN_7B),
    },
    "grpo": {"objective": "grpo"},
    "kdrl": {"objective": "kdrl", "beta.schedule": "constant", "beta.init": 2e-3},
    "sft": {
        **_NO_FORMAT,
        "objective": "sft",
        "rollout.refill": 0,
        "adaptive_entropy.target": 0.0,
        "optimizer.learning_rate": 2e-7,
    },
    "straight_through": {"trrd.clamp_gradient": "straight_through"},
}


def get_config():
    c = base()
    c.student.path = sources.QWEN3_0_6B
    c.student.shape.update(QWEN3_0_6B)
    c.teacher.path = sources.QWEN3_8B
    c.teacher.shape.update(QWEN3_8B)
    c.objective = "trrd"
    c.aggregation = "seq-mean-token-mean"
    c.clip_eps_low, c.clip_eps_high = 0.2, 0.28
    c.entropy_coef = 0.0
    c.data.task = "knights_knaves"
    c.data.task_args = '{"min_people": 2, "max_people": 8}'
    c.data.prompt_style = "chat"
    c.data.size = 20_000
    c.rollout.update(prompts_per_step=32, group_size=8, max_new_tokens=2048, temperature=1.0)
    c.eval.update(by="names", problems=700, top_p=0.95)
    c.micro_batch = 32
    return c
