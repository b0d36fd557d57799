"""SmolLM2-135M on chains of additions and subtractions, for a GPU; see `smollm2_gpu`."""

from configs.smollm2_math import get_config as smollm2

VARIANTS = {"weak_teacher": {"teacher.sft.steps": 80}}


def get_config():
    c = smollm2()
    c.steps = 200
    c.data.path, c.data.on_bad = "", "raise"
    c.data.task = "arithmetic"
    c.data.task_args = '{"min_terms": 6, "max_terms": 6}'
    c.data.prompt_style = "plain"
    c.data.max_prompt_tokens = 32
    c.data.prompt_buckets = (32,)
    for role, steps in ((c.student, 30), (c.teacher, 400)):
        role.update(dtype="bfloat16", remat="none")
        role.sft.update(task="", steps=steps, batch_size=64, learning_rate=5e-5, problems=20_000)
    c.beta.update(schedule="constant", init=0.1, min=0.0, delta=0.0)
    c.kd_topk.k = 50
    c.rollout.update(prompts_per_step=64, group_size=8, max_new_tokens=128, temperature=1.0)
    c.reward.require_format = True
    c.reward.workers = 4
    c.entropy_coef = 0.0
    c.optimizer.update(learning_rate=1e-5, warmup_steps=5)
    c.micro_batch = 128
    c.eval.update(every=20, problems=512, batch=256, temperature=0.6)
    c.checkpoint.update(every=100, keep=1)
    c.samples.every = 50
    return c
