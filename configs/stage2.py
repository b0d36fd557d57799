"""Stage 2 of the paper (2506.02208, section 4), the main experiment: KDRL-Annealing.

    python -m kdrl_jax.train --config=configs/stage2.py

The student is what `stage1.py` makes: `runs/stage1` where that is, else the published model of that
family, DeepScaleR-1.5B-Preview, which its authors trained further, to 24K tokens. The teacher is
Skywork-OR1-Math-7B. The data are Skywork-OR1's, filtered as in the paper; held-out problems are
AIME24's. All of it comes from the hub (extra `data`), unless a path says otherwise. With data of
one's own, `'--config.data.filters=()'`, or labels by `python -m kdrl_jax.difficulty`.

β falls from 5e-3 to 1e-3 by 5e-5 a step. `--config=configs/stage2.py:VARIANT` is another row or
ablation of the paper, see VARIANTS; several are joined by commas, as in `stage2.py:k3,10k`. GRPO
and KD-RKL alone are `grpo.py` and `kd_rkl.py`, rejection sampling is `sft.py`. docs/papers.md has
all tables and figures. Evaluations are by accuracy alone, with 32,768 tokens.

Hardware: a pod. By `python -m kdrl_jax.plan`, an estimate from shapes, it fits v5p-32, v6e-64 and,
with the variant `v5e_256`, v5e-256; `lora_7b`, adapters of a 7B student, would fit one GPU of 80
GB. Not run yet at this scale; no time or result is claimed. The paper measured 57.2 on average
over six benchmarks against 54.6 for GRPO.
"""

from configs import sources
from configs.base import get_config as base
from configs.shapes import QWEN25_7B, QWEN25_32B, R1_DISTILL_QWEN_1_5B, R1_DISTILL_QWEN_7B
from kdrl_jax.data.filters import STAGE2_FILTERS

_CONSTANT = {"beta.schedule": "constant", "beta.init": 2e-3}

VARIANTS = {
    "constant": _CONSTANT,  # "KDRL" of table 1
    "k1": {**_CONSTANT, "kd_estimator": "k1"},
    # verl, which the paper used, bounds k3 by 10 nats.
    "k3": {**_CONSTANT, "kd_estimator": "k3", "k3_clamp": 10.0},
    # The teacher's top K, all else at e^−18.42: unstable in the paper. K = 50 is a choice.
    "topk": {**_CONSTANT, "kd_estimator": "topk"},
    "full": {**_CONSTANT, "kd_estimator": "full"},  # not in the paper: the whole vocabulary
    "response_mask": {**_CONSTANT, "kd_mask": "response"},
    "group_mask": {**_CONSTANT, "kd_mask": "group"},
    "reward_shaping": {**_CONSTANT, "objective": "reward_shaping"},  # collapses in the paper
    "beta_1e_3": {"beta.schedule": "constant", "beta.init": 1e-3},  # figure 4
    "beta_5e_3": {"beta.schedule": "constant", "beta.init": 5e-3},
    # Section 4.4: a teacher that reinforcement learning has not improved.
    "weak_teacher": {**_CONSTANT, "teacher.path": sources.R1_DISTILL_7B},
    # Fewer problems, for comparisons: `k3,10k`, `annealing,30k`, `response_mask,30k`, …
    "annealing": {},
    "10k": {"data.filters": (*STAGE2_FILTERS, "limit:n=10000")},
    "30k": {"data.filters": (*STAGE2_FILTERS, "limit:n=30000")},
    # Beyond the paper: β from the measured KL and reward, and OPD-then-RL (arXiv 2609.04108).
    "adaptive": {"beta.schedule": "adaptive", "beta.delta": 5e-3},
    # That paper switches after 60 of 150 steps, at the end of distillation's fast rise: the same
    # share of 280 is a choice, and so is β.
    "distil_then_rl": {
        "beta.schedule": "phases",
        "beta.phases": ((0, 5e-3), (112, 0.0)),
        "policy_phases": ((0, 0.0), (112, 1.0)),
    },
    # A slice of 256 chips: four share the length of a row, as a micro-batch has 64.
    "v5e_256": {"mesh.context": 4},
    # A student of 7B on one GPU of 80 GB: adapters, and a teacher that waits in host memory.
    "lora_7b": {
        "student.path": sources.R1_DISTILL_7B,
        **{f"student.shape.{key}": size for key, size in QWEN25_7B.items()},
        "student.lora.rank": 32,
        "optimizer.learning_rate": 1e-5,
        "teacher.offload": True,
        "rollout.slots": 16,
        "micro_batch": 2,
    },
    "teacher_32b": {
        "teacher.path": sources.SKYWORK_32B,
        **{f"teacher.shape.{key}": size for key, size in QWEN25_32B.items()},
    },
}


def get_config():
    c = base()
    # The shapes are for `kdrl_jax.plan` where the hub is out of reach.
    c.student.path = f"runs/stage1 or {sources.DEEPSCALER_1_5B}"
    c.student.shape.update(R1_DISTILL_QWEN_1_5B)
    c.teacher.path = sources.SKYWORK_MATH_7B
    c.teacher.shape.update(R1_DISTILL_QWEN_7B)
    c.eval.update(samples=16, max_new_tokens=32_768)
    c.data.path = sources.SKYWORK
    c.data.eval_path = sources.AIME24
    c.data.on_bad = "drop"
    c.data.filters = STAGE2_FILTERS
    return c
