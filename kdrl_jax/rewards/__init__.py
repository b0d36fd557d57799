r"""Outcome rewards: format and accuracy.

    with Grader(workers=4, timeout_s=3.0, require_format=True) as grader:
        verdicts = grader.grade(completions, answers)      # many, in worker processes
    verdict = grade(completion, answer)                    # one, bounded in time as well

The response's last `\boxed{}` is compared with the gold answer: first as strings, words and plain
numbers here (`math_answer`), then by math-verify in processes that can be killed (`pool`). Tasks
that are not mathematics bring a verifier: `Grader(verify=…)`.
"""

from kdrl_jax.rewards.format import has_format, last_boxed
from kdrl_jax.rewards.pool import Grader, Verifier, grade

__all__ = ["Grader", "Verifier", "grade", "has_format", "last_boxed"]
