"""A task that half of all responses solve: sums, where a response of even length is right."""

from kdrl_jax.tasks.registry import Task, get_task

ARITHMETIC = get_task("arithmetic")


def answer(completion: str) -> str | None:
    return completion or None


def verify(answer: str, gold: str, meta: dict) -> bool:
    return len(answer) % 2 == 0


EASY = Task(
    ARITHMETIC.problems, ARITHMETIC.solution, ARITHMETIC.alphabet, verify=verify, answer=answer
)
