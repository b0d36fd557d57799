"""Rows as data sets on the hub write them, brought into one form.

DeepScaleR (agentica-org/DeepScaleR-Preview-Dataset, one `deepscaler.json`) has the columns
`problem`, `answer` and `solution`: nothing to do. A few of its rows have no answer; read it with
`data.on_bad = "drop"`.

Skywork-OR1 (Skywork/Skywork-OR1-RL-Data, `split=math`) has verl's columns:

    prompt        [{"role": "user", "content": the bare problem}]
    reward_model  {"style": "rule", "ground_truth": "[\\"34\\"]"}     a JSON list in a string
    extra_info    {"index": 0, "model_difficulty": {"DeepSeek-R1-Distill-Qwen-1.5B": 3, …}}

`model_difficulty` is how many of 16 attempts FAILED: "0-16, higher values indicate harder
problems" says the data set's card; 16 attempts at temperature 1.0 and 32K tokens, with the report
(arXiv 2505.22312, section 6.2); 16 means 16 wrong (issue 40 of SkyworkAI/Skywork-OR1). The form of
the rows is that of the card's `dataset_info` and of the authors' preprocessing scripts.

Other data sets for verl, such as DAPO-Math-17k, have the same columns without the difficulty.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kdrl_jax.data.prompts import PROMPT_STYLES
from kdrl_jax.data.sources import BadRow

SKYWORK_ATTEMPTS = 16
PASS_RATE = "pass_rate"
"""The column, and the key in `Problem.meta`, of {model: share of right attempts}."""

_INSTRUCTIONS = sorted({s.suffix.strip() for s in PROMPT_STYLES.values()} - {""})


def is_chat_row(row: Mapping[str, Any]) -> bool:
    """Whether a row has verl's columns instead of `problem` and `answer`."""
    return (
        "problem" not in row
        and isinstance(row.get("prompt"), list)
        and isinstance(row.get("reward_model"), dict)
    )


def from_chat_row(row: Mapping[str, Any], notes: Counter[str]) -> dict[str, Any]:
    """verl's columns as `problem`, `answer` and, where there are several, `answers`.

    Args:
      notes: counts what was changed: instructions that end a problem although `data.prompt_style`
        adds its own, system messages, answers beyond the first.

    Raises:
      BadRow: not one question, or no text for an answer.
    """
    flat = {key: row[key] for key in row if key not in ("prompt", "reward_model")}
    turns = [m for m in row["prompt"] if isinstance(m, dict) and m.get("role") != "system"]
    if len(turns) != 1 or not isinstance(turns[0].get("content"), str):
        raise BadRow(f"'prompt' has {len(turns)} turns with text, not one question; leave it out")
    if len(turns) < len(row["prompt"]):
        notes["system messages left out"] += 1
    problem = turns[0]["content"]
    for instruction in _INSTRUCTIONS:
        if problem.rstrip().endswith(instruction):
            problem = problem.rstrip().removesuffix(instruction).rstrip()
            notes["instructions removed from the end of a problem"] += 1
    answers = gold_answers(row["reward_model"].get("ground_truth"))
    if len(answers) > 1:
        flat["answers"] = answers
        notes["rows with several answers, of which the first is the gold one"] += 1
    return flat | {"problem": problem, "answer": answers[0] if answers else None}


def gold_answers(truth: Any) -> list[Any]:
    """The answers in a `ground_truth`: a list of texts, one in a JSON string, or a plain answer.

    Only a list of texts is taken for one: `[1,2]` is an interval. An object, such as the tests of
    a program, is returned as it is.
    """
    found = decode(truth)
    if isinstance(found, list) and all(isinstance(answer, str) for answer in found):
        return found
    return [found if isinstance(found, dict) else truth]


def decode(value: Any) -> Any:
    """What a string of JSON holds if that is an object or a list; else `value` itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def pass_rates(row: Mapping[str, Any]) -> dict[str, float]:
    """{model: share of right attempts} of a row; empty if it has no such labels.

    They are what `kdrl_jax.difficulty` wrote to the column `pass_rate`, and Skywork-OR1's.

    Raises:
      BadRow: a number out of range.
    """
    extra, own = row.get("extra_info"), row.get(PASS_RATE)
    failed = extra.get("model_difficulty") if isinstance(extra, dict) else None
    rates: dict[str, float] = {}
    for model, failures in failed.items() if isinstance(failed, dict) else ():
        if failures is not None:
            rates[model] = 1 - _in_range(failures, SKYWORK_ATTEMPTS, model) / SKYWORK_ATTEMPTS
    for model, rate in own.items() if isinstance(own, dict) else ():
        if rate is not None:
            rates[model] = float(_in_range(rate, 1, model))
    return rates


def _in_range(value: Any, highest: int, model: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
        raise BadRow(f"difficulty of {model!r} is {value!r}, not from 0 to {highest}; mend the row")
    return value
