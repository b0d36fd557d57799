"""The demo: sums written out step by step, learnt by KDRL within minutes on two CPU cores.

    python -m kdrl_jax.train --config=configs/demo.py --workdir=runs/demo

The first run trains a teacher on worked solutions of 20,000 problems and warms a smaller student
up on 1,200; both are kept under `cache_dir`. Then the student learns by KDRL on problems without
solutions. benchmarks/RESULTS.md has times and results, GRPO and KD-RKL alone included.
"""

from configs.base import get_config as base


def get_config():
    c = base()
    c.steps = 300
    c.data.task = "arithmetic"
    c.data.prompt_style = "plain"
    c.data.max_prompt_tokens = 16
    c.data.prompt_buckets = (16,)
    c.data.size = 20_000

    shape = {"num_kv_heads": 1, "head_dim": 32}
    c.teacher.update(dtype="float32", remat="none")
    c.teacher.shape.update(shape, hidden_size=96, num_layers=3, num_heads=3, mlp_size=256)
    c.teacher.sft.update(steps=500, batch_size=64, learning_rate=5e-3)
    c.student.update(dtype="float32", remat="full")  # less memory is faster on a CPU
    c.student.shape.update(shape, hidden_size=64, num_layers=2, num_heads=2, mlp_size=192)
    c.student.sft.update(steps=500, batch_size=64, learning_rate=5e-3, problems=1_200, seed=1)

    c.beta.update(schedule="linear", init=0.6, min=0.1, delta=2e-3)
    c.entropy_coef = 0.0
    c.rollout.update(prompts_per_step=64, group_size=4, max_new_tokens=40, temperature=1.0)
    c.reward.workers = 2
    c.optimizer.update(learning_rate=6e-4, warmup_steps=5, schedule="cosine")
    c.optimizer.update(b2=0.99, weight_decay=0.0)
    c.micro_batch = 256

    c.eval.update(every=25, problems=512, batch=512, temperature=0.0)
    c.checkpoint.every = 25
    c.samples.every = 25
    return c
