"""A real model on real problems: SmolLM2-135M-Instruct learns competition mathematics by KDRL.

    python -m kdrl_jax.train --config=configs/smollm2_math.py

The model is `runs/smollm2` where that is (`python launch/smollm2.py runs/smollm2` writes it
without the hub), else the hub's. The problems are DeepScaleR's, from the hub, or those of
`--config.data.path`. The teacher is the same model after a few steps on worked solutions of
arithmetic, so it differs from the student. Reward is accuracy alone, as the model was not trained
to write <think>. Sized for 2 CPU cores; benchmarks/RESULTS.md has the figures. On a GPU, by
overrides alone:

        --config.student.dtype=bfloat16 --config.teacher.dtype=bfloat16 --config.steps=200 \\
        --config.rollout.prompts_per_step=64 --config.rollout.group_size=8 \\
        --config.rollout.max_new_tokens=512 --config.micro_batch=64
"""

from configs.base import get_config as base
from configs.shapes import SMOLLM2_135M
from configs.sources import DEEPSCALER, SMOLLM2

MODEL = f"runs/smollm2 or {SMOLLM2}"


def get_config():
    c = base()
    c.steps = 5
    c.student.update(path=MODEL, dtype="float32")
    c.teacher.update(path=MODEL, dtype="float32", remat="full")
    c.student.shape.update(SMOLLM2_135M)
    c.teacher.shape.update(SMOLLM2_135M)
    c.teacher.sft.update(task="arithmetic", steps=12, batch_size=16, learning_rate=3e-5)
    c.teacher.sft.problems = 2000
    c.beta.update(schedule="constant", init=0.1, min=0.0, delta=0.0)
    c.data.path = DEEPSCALER
    c.data.on_bad = "drop"
    c.data.max_prompt_tokens = 192
    c.data.prompt_buckets = (128, 192)
    c.rollout.update(prompts_per_step=4, group_size=4, max_new_tokens=128, temperature=0.8)
    c.reward.require_format = False
    c.reward.workers = 2
    c.optimizer.learning_rate = 5e-6
    c.micro_batch = 4
    c.eval.every = 0
    c.checkpoint.every = 2
    c.samples.every = 1
    return c
