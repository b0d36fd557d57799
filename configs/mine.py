"""Your own model and data: GRPO from the first minute, KDRL as soon as there is a teacher.

    python -m kdrl_jax.train --config=mine --config.data.path=rows.jsonl \\
        --config.data.fields.problem=question --config.reward.functions=my_rewards:short
    python -m kdrl_jax.train --config=mine:kdrl --config.teacher.path=TEACHER …

The student is SmolLM2-135M-Instruct, from the hub, unless `student.path` names another one. A tenth
of the rows is held out and measured before, during and after. Prompts are the rows' texts in the
model's chat template, with nothing added; an answer is its last number (`reward.answer`). The
micro-batch and the padded lengths follow from the data and the devices. Small steps, for a small
model on any machine: on more, raise `rollout.*` and `steps`. In float32, which CPUs are fast at;
`mine:bfloat16` and `mine:lora` suit accelerators and larger models, as in `mine:kdrl,bfloat16`.
docs/first_run.md leads through it.
"""

from configs import sources
from configs.base import get_config as base

VARIANTS = {
    # The teacher's weight in the loss is `beta.init`.
    "kdrl": {"objective": "kdrl"},
    "bfloat16": {"student.dtype": "bfloat16", "teacher.dtype": "bfloat16"},
    "lora": {"student.lora.rank": 16, "optimizer.learning_rate": 5e-5},
}


def get_config():
    c = base()
    c.steps = 20
    c.objective = "grpo"
    c.beta.update(schedule="constant", init=0.1, min=0.0, delta=0.0)
    c.entropy_coef = 0.0
    c.student.update(path=sources.SMOLLM2, dtype="float32")
    c.teacher.update(dtype="float32")
    c.data.eval_fraction = 0.1
    c.data.prompt_style = "chat"
    c.data.max_prompt_tokens = 512
    c.data.prompt_buckets = ()
    c.rollout.update(prompts_per_step=4, group_size=8, max_new_tokens=256, temperature=1.0)
    c.reward.answer = "last_number"
    c.reward.require_format = False
    c.reward.workers = 2
    c.optimizer.update(learning_rate=5e-6, warmup_steps=2)
    c.micro_batch = 0
    c.eval.update(every=5, problems=64, temperature=0.0)
    c.checkpoint.every = 5
    c.samples.every = 5
    return c
