"""The commands as functions, for notebooks and programs; `docs/python.md` is their page.

    import kdrl_jax

    result = kdrl_jax.train("mine", student="HuggingFaceTB/SmolLM2-135M-Instruct", data=rows,
                            reward=shorter, workdir="runs/first", changes={"steps": 20})
    kdrl_jax.chat(result.workdir).ask("What is 2 + 3?")

Each takes what its command takes, and also what only Python has: rows in memory, functions, values
instead of texts. Errors are `UserError`, one line for each problem, before anything is loaded.
"""

from kdrl_jax.api.answers import Chat, Completion, chat, generate
from kdrl_jax.api.evaluation import EvaluationResult, evaluate
from kdrl_jax.api.running import TrainResult, export, plan, train
from kdrl_jax.config import load_config
from kdrl_jax.types import UserError

__all__ = [
    "Chat",
    "Completion",
    "EvaluationResult",
    "TrainResult",
    "UserError",
    "chat",
    "evaluate",
    "export",
    "generate",
    "load_config",
    "plan",
    "train",
]
