"""SmolLM2-135M on Knights and Knaves in symbols, for a GPU; see `smollm2_gpu`."""

from configs.reproduce.smollm2_arithmetic import get_config as arithmetic

VARIANTS = {"weak_teacher": {"teacher.sft.steps": 80}}


def get_config():
    c = arithmetic()
    c.data.task = "knights_knaves_symbolic"
    c.data.task_args = ""
    return c
