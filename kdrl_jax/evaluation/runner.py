"""Asking a benchmark's problems and keeping every response, resumable between batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdrl_jax.data import Tokenizer
from kdrl_jax.evaluation.planning import Question
from kdrl_jax.rewards import Grader
from kdrl_jax.rollout import RolloutEngine, sampling_params
from kdrl_jax.training.display import Display
from kdrl_jax.training.evaluation import Responses, grade_all, group_of, respond
from kdrl_jax.types import Params, Problem, UserError, Verdict

Row = dict[str, Any]


def ask(
    questions: Sequence[Question],
    engine: RolloutEngine,
    params: Params,
    tokenizer: Tokenizer,
    grader: Grader,
    path: Path,
    display: Display,
    *,
    samples: int,
    batch: int,
    temperature: float,
    top_p: float = 1.0,
    require_format: bool | None = None,
    by: str = "",
    seed: int,
) -> list[Row]:
    """Sample and grade responses to every question; all of them, old and new, question by question.

    The longest prompts are asked first, so that batches waste little padding and a lack of memory
    shows at once. Each batch is appended to `path` when it has been graded. What is there already
    counts up to its last whole batch, and batches go on as they would have: an interrupted run ends
    with the rows of an uninterrupted one. A response depends on its own question, sample and the
    seed, and on the others of its batch by rounding alone, see `RolloutEngine`.

    Args:
      path: JSON Lines with id, sample, problem, answer, response, extracted, outcome, reward,
        length (tokens), finish_reason ("stop" or "length"), repeats and group.
      samples: of each question.
      require_format: default: the grader's.
      by: see `group_of`; its value is "group" of a row.
      batch: questions asked at once; may change between a run and its continuation, and with it
        rounding.

    Raises:
      UserError: `path` holds responses to other questions.
    """
    order = sorted(questions, key=lambda q: (-len(q.prompt), q.number))
    size = min(batch, len(order))
    rows = _continue(path, order, samples, size)
    settings = sampling_params(
        (size, samples),
        tokenizer.stop_ids,
        max_new_tokens=engine.max_new_tokens,
        temperature=temperature,
        top_p=top_p,
    )
    done = len(rows) // samples
    with (
        path.open("a", encoding="utf-8") as file,
        display.track(path.stem, len(order), done) as track,
    ):
        for start in range(done, len(order), size):
            asked = order[start : start + size]
            with display.track("responses", size * samples, part=True) as responses:
                said = respond(
                    engine,
                    params,
                    [q.prompt for q in asked],
                    [q.number for q in asked],
                    tokenizer,
                    settings,
                    seed=seed,
                    progress=responses.drawn,
                )
            problems = [q.problem for q in asked]
            verdicts = grade_all(grader, said.texts, problems, require_format=require_format)
            answers = grader.answers(said.texts, require_format=require_format)
            groups = [group_of(problem, by) for problem in problems]
            new = _rows(problems, groups, said, verdicts, samples, answers)
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new))
            file.flush()
            rows += new
            accuracy = sum(row["reward"] for row in rows) / len(rows)
            track.advance(f"accuracy {accuracy:.3f}", len(asked))
    return rows


def _rows(
    problems: Sequence[Problem],
    groups: Sequence[str],
    said: Responses,
    verdicts: Sequence[Verdict],
    samples: int,
    answers: Sequence[str | None],
) -> list[Row]:
    each = [problem for problem in problems for _ in range(samples)]
    return [
        {
            "id": problem.id,
            "sample": i % samples,
            "problem": problem.problem,
            "answer": problem.answer,
            "response": text,
            "extracted": answer,
            "outcome": verdict.outcome,
            "reward": verdict.reward,
            "length": length,
            "finish_reason": "length" if cut else "stop",
            "repeats": loops,
            "group": groups[i // samples],
        }
        for i, (problem, text, length, cut, loops, verdict, answer) in enumerate(
            zip(each, *said, verdicts, answers, strict=True)
        )
    ]


def _continue(path: Path, order: Sequence[Question], samples: int, size: int) -> list[Row]:
    """The rows of the whole batches in `path`, which is cut off after them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return []
    rows: list[Row] = []
    ends = [0]  # byte after each row
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break  # torn by a kill
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
            ends.append(ends[-1] + len(line))
    expected = [(q.problem.id, sample) for q in order for sample in range(samples)]
    if [(row.get("id"), row.get("sample")) for row in rows] != expected[: len(rows)]:
        raise UserError(f"{path}: holds responses to other problems; give another --output")
    asked = len(rows) // samples
    whole = len(order) if asked == len(order) else asked - asked % size
    with path.open("r+b") as file:
        file.truncate(ends[whole * samples])
    return rows[: whole * samples]
