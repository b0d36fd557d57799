"""The demo: arithmetic with written-out steps, from nothing to KDRL within minutes on a CPU.

The first run trains a teacher on worked solutions and warms a smaller student up; both are kept
under `cache_dir`. Then the student learns by KDRL.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.steps = 100
    c.data.task = "arithmetic"
    c.data.prompt_style = "plain"
    c.data.max_prompt_tokens = 16
    c.data.prompt_buckets = (16,)
    c.data.size = 20_000

    c.teacher.update(dtype="float32", remat="none")
    c.teacher.shape.update(
        hidden_size=96, num_layers=3, num_heads=3, num_kv_heads=1, head_dim=32, mlp_size=256
    )
    c.teacher.sft.update(steps=1400, batch_size=64, learning_rate=5e-3)
    c.student.update(dtype="float32", remat="none")
    c.student.shape.update(
        hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, mlp_size=192
    )
    c.student.sft.update(steps=600, batch_size=64, learning_rate=5e-3, seed=1)

    c.kd_mask = "none"
    c.beta.update(schedule="constant", init=0.2)
    c.entropy_coef = 0.0
    c.rollout.update(prompts_per_step=16, group_size=8, max_new_tokens=48, temperature=1.0)
    c.reward.workers = 2
    c.optimizer.update(learning_rate=1e-3, warmup_steps=5, weight_decay=0.0, b2=0.95)
    c.micro_batch = 128

    c.eval.update(every=20, problems=512, batch=512, temperature=0.0)
    c.checkpoint.every = 20
    return c
