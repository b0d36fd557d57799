r"""Outcome rewards: format and accuracy.

    with Grader(workers=4, timeout_s=3.0, require_format=True) as grader:
        verdicts = grader.grade(completions, answers)      # many, in worker processes
    verdict = grade(completion, answer)                    # one, bounded in time as well

The response's answer, by default its last `\boxed{}` (`format` has the other forms), is compared
with the gold answer: first as strings, words and plain numbers here (`math_answer`), then by
math-verify in processes that can be killed (`pool`). Tasks that are not mathematics bring a
verifier: `Grader(verify=…)`. Functions of the user's own may add to the reward, never to the
verdict (`functions`).
"""

from kdrl_jax.rewards.format import FORMS, has_format, last_boxed
from kdrl_jax.rewards.functions import OwnReward, RewardFunctions, parse_functions
from kdrl_jax.rewards.pool import Extractor, Grader, Verifier, grade

__all__ = [
    "FORMS",
    "Extractor",
    "Grader",
    "OwnReward",
    "RewardFunctions",
    "Verifier",
    "grade",
    "has_format",
    "last_boxed",
    "parse_functions",
]
