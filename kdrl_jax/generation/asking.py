"""Putting prompts to one model or to two, and what each says of the other's tokens."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kdrl_jax.data import Tokenizer, token_pieces
from kdrl_jax.data.problems import FIELDS, look_up, text_of
from kdrl_jax.data.schemas import from_chat_row, is_chat_row
from kdrl_jax.data.sources import BadRow, open_sources
from kdrl_jax.generation.sampler import Answer, Sampler
from kdrl_jax.generation.text_stream import PARTIAL
from kdrl_jax.training.display import emit, log_kind
from kdrl_jax.types import Problem, UserError

PAGE = 4
"""A file is asked in parts of so many batches: rows appear, and slots are seldom empty."""
MOST_LISTED = 10
COLUMNS = ("problem", "prompt")


class Said(NamedTuple):
    """An answer of one of the models."""

    speaker: int
    """0: of --model, 1: of --beside."""
    answer: Answer
    tokens: list[dict[str, Any]] | None
    """See `token_records`; None: not asked for."""


def ask(
    samplers: Sequence[Sampler],
    prompts: Sequence[Sequence[list[int]]],
    numbers: Sequence[int],
    *,
    turn: int = 0,
    on_text: Callable[[int, int, str], None] | None = None,
    log_probs: bool = False,
    size: int = 0,
) -> list[Said]:
    """The answers of each model, one model after the other.

    Args:
      prompts: for each model its own token ids of every prompt.
      on_text: called with (speaker, request, text) as text comes; see `Sampler.answer`.
      log_probs: also say how likely each token was, to both models where there are two.
      turn, numbers, size: see `Sampler.answer`.
    """
    said: list[Said] = []
    for speaker, sampler in enumerate(samplers):
        tell = functools.partial(on_text, speaker) if on_text else None
        found, rollouts = sampler.answer(
            prompts[speaker], numbers, turn=turn, on_text=tell, size=size
        )
        others = [s for s in samplers if s is not sampler]
        scores = [other.score(rollouts) for other in others] if log_probs else []
        for answer in found:
            records = None
            if log_probs:
                heard = [x[answer.number, answer.sample].tolist() for x in scores]
                columns = [answer.log_probs, *heard]
                records = token_records(
                    sampler.tokenizer, answer.tokens, columns[::-1] if speaker else columns
                )
            said.append(Said(speaker, answer, records))
    return said


def token_records(
    tokenizer: Tokenizer, tokens: Sequence[int], columns: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """Each token with its text, its id and its log-probs, JSON-able.

    Args:
      columns: log-probs of --model and, if there is one, of --beside: then "log_ratio" is
        ℓ = log π − log π_beside, of which KDRL's k2 is ½ℓ². NaN becomes None.
    """
    names = ("log_prob", "beside_log_prob")
    texts = token_texts(tokenizer, tokens)
    records = []
    for place, (token, text) in enumerate(zip(tokens, texts, strict=True)):
        values = [column[place] for column in columns]
        record: dict[str, Any] = {"token": text, "id": int(token)}
        record |= dict(zip(names, values, strict=False))
        if len(values) == 2:
            record["log_ratio"] = values[0] - values[1]
        records.append({k: None if x != x else x for k, x in record.items()})
    return records


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text; of one that adds none, such as a special one, its name."""
    texts = token_pieces(tokenizer, tokens, tokenizer.decode(list(tokens)))
    texts = texts or [tokenizer.decode([token]) for token in tokens]
    if any(not text or PARTIAL in text for text in texts):
        names = {index: name for name, index in tokenizer.vocab().items()}
        for place, token in enumerate(tokens):
            if not texts[place] or PARTIAL in texts[place]:
                texts[place] = names[token] if token in names else str(token)
    return texts


def means(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The means over tokens of each log-prob, of the log-ratio, and of k2 = ½ℓ²."""
    found = {}
    for name in ("log_prob", "beside_log_prob", "log_ratio"):
        values = [r[name] for r in records if name in r and r[name] is not None]
        if values:
            found[name] = math.fsum(values) / len(values)
        if values and name == "log_ratio":
            found["k2"] = math.fsum(0.5 * x * x for x in values) / len(values)
    return found


def row_of(said: Said, problem: Problem, names: Sequence[str]) -> dict[str, Any]:
    """An answer as a row of JSON Lines."""
    answer = said.answer
    row: dict[str, Any] = {
        "id": problem.id,
        "sample": answer.sample,
        "model": names[said.speaker],
        "prompt": problem.problem,
        "text": answer.text,
        "tokens": len(answer.tokens),
        "finish_reason": answer.finish_reason,
    }
    return row if said.tokens is None else row | {"log_probs": said.tokens}


def write_rows(
    samplers: Sequence[Sampler],
    names: Sequence[str],
    problems: Sequence[Problem],
    encoded: Sequence[Sequence[list[int]]],
    output: Path | None,
    *,
    batch: int,
    log_probs: bool,
) -> None:
    """The answers to all prompts as JSON Lines, in the prompts' order, a part after the other.

    Args:
      encoded: for each model its token ids of every prompt.
      output: a new file; None: stdout, with --log=json as events "answer".
      batch: answers that are drawn at once.
    """
    at_once = -(-batch // samplers[0].settings.samples)
    page, total = PAGE * at_once, len(problems)
    with contextlib.ExitStack() as stack:
        file = None
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(output.open("x", encoding="utf-8"))
        for start in range(0, total, page):
            part = range(start, min(start + page, total))
            prompts = [[ids[i] for i in part] for ids in encoded]
            size = max(len(part), min(at_once, total))
            found = ask(samplers, prompts, part, log_probs=log_probs, size=size)
            found.sort(key=lambda said: (said.answer.number, said.speaker, said.answer.sample))
            for said in found:
                row = row_of(said, problems[start + said.answer.number], names)
                if file is None and log_kind() == "json":
                    emit("answer", **row)
                else:
                    print(json.dumps(row, ensure_ascii=False), file=file)
            (file or sys.stdout).flush()
            if total > page:
                print(f"{part.stop} of {total} prompts", file=sys.stderr)


def read_prompts(
    path: str, columns: Sequence[str] = COLUMNS, name: str = FIELDS["id"]
) -> list[Problem]:
    """The prompts in a file, in order: each line of a .txt, or a column of whatever data may be.

    Args:
      path: a .txt, or what `data.path` of a run may be; see `kdrl_jax.data.sources`.
      columns: where the text is: in the first of them that a row has. Dotted ones are nested. Rows
        of verl's form are understood as well if these are among them: COLUMNS.
      name: the column of ids; rows may lack it. The other columns are the `meta` of the prompt.

    Raises:
      UserError: no such file, no prompt in it, or rows without one: a line for each.
    """
    file = Path(path)
    if file.suffix == ".txt" and file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [Problem(f"{file.stem}/{i}", x, "") for i, x in enumerate(lines, 1) if x.strip()]
        wrong: list[str] = []
    else:
        found, wrong = _read_rows(path, columns, name)
    if wrong:
        more = len(wrong) - MOST_LISTED
        last = [f"{path}: {more} more bad rows"] if more > 0 else []
        raise UserError(*wrong[:MOST_LISTED], *last)
    if not found:
        raise UserError(f"--file: {path} holds no prompt; write one a line")
    return found


def _read_rows(path: str, columns: Sequence[str], name: str) -> tuple[list[Problem], list[str]]:
    found, wrong = [], []
    for source in open_sources(path):
        for number, row in source.rows:
            try:
                if isinstance(row, BadRow):
                    raise row
                found.append(_prompt(row, columns, name, f"{source.stem}/{number}"))
            except BadRow as error:
                wrong.append(f"{source.name}:{number}: {error}")
    return found, wrong


def _prompt(row: Any, columns: Sequence[str], name: str, default_id: str) -> Problem:
    if not isinstance(row, dict):
        raise BadRow("is no object; write one JSON object a line")
    if is_chat_row(row) and set(COLUMNS) <= set(columns):
        row = from_chat_row(row, Counter())
    column = next((c for c in columns if c in row or look_up(row, c) is not None), "")
    if not column:
        raise BadRow(
            f"has no text in {' or '.join(map(repr, columns))}; name its column with "
            "--config.data.fields.problem"
        )
    text = text_of(row, "problem", column)
    has_id = bool(name) and look_up(row, name) not in (None, "")
    meta = {key: value for key, value in row.items() if key not in (name, column)}
    return Problem(text_of(row, "id", name) if has_id else default_id, text, "", meta)
