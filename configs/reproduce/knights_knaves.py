"""KDRL on Knights and Knaves in symbols: the logic task of RLAD, for tiny models.

`b;A|c;A&C` asks who of three tells the truth; a solution tries the assignments one by one, so
its length varies from 10 to 56 tokens. The teacher solves 96 % of the puzzles, the students 37 %
before they start. The other keys are those of `arithmetic`.
"""

from configs.reproduce.arithmetic import get_config as arithmetic

VARIANTS = {"weak_teacher": {"teacher.sft.steps": 400}}


def get_config():
    c = arithmetic()
    c.data.task = "knights_knaves_symbolic"
    c.data.task_args = '{"operations": "&|"}'
    c.teacher.shape.update(hidden_size=96, num_layers=3, num_heads=3, mlp_size=256)
    c.teacher.sft.update(steps=1000, problems=30_000, batch_size=32, learning_rate=4e-3)
    c.student.shape.update(hidden_size=64, num_layers=2, num_heads=2, mlp_size=192)
    c.student.sft.update(steps=120, batch_size=32, learning_rate=5e-3)
    c.steps = 100
    c.rollout.max_new_tokens = 56
    c.checkpoint.every = 50
    return c
