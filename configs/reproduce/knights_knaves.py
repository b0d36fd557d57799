"""KDRL on Knights and Knaves in symbols: the logic task of RLAD, for tiny models.

`b;A>c;A=C?` asks who of three tells the truth; a solution tries the assignments one by one, so
its length varies from 10 to 56 tokens. The teacher solves 85 % of the puzzles, the students about
30 % before they start. The other keys are those of `arithmetic`.
"""

from configs.reproduce.arithmetic import get_config as arithmetic

VARIANTS = {"weak_teacher": {"teacher.sft.steps": 400}}


def get_config():
    c = arithmetic()
    c.data.task = "knights_knaves_symbolic"
    c.data.task_args = ""
    c.teacher.shape.update(num_layers=3)
    c.teacher.sft.update(steps=800, problems=20_000)
    c.student.sft.steps = 200
    c.steps = 100
    c.rollout.max_new_tokens = 60
    c.checkpoint.every = 50
    return c
