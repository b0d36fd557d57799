"""Problems with answers, read from a data set."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdrl_jax.data.schemas import PASS_RATE, decode, from_chat_row, is_chat_row, pass_rates
from kdrl_jax.data.sources import BadRow, open_sources
from kdrl_jax.types import Problem, UserError

MAX_LISTED = 10
FIELDS = {"id": "id", "problem": "problem", "answer": "answer"}
ON_BAD = ("raise", "drop")


@dataclasses.dataclass(frozen=True)
class ReadReport:
    """What `read_problems` found; `str()` of it is a few lines."""

    path: str
    kept: int
    bad: int
    listed: tuple[str, ...]
    """The first bad rows, 'FILE:LINE: what is wrong; remedy'."""
    notes: Mapping[str, int]
    """What was changed in how many rows."""
    commit: str = ""
    """Of the hub's repository that was read; "" where it is not known, or there is none."""

    @property
    def unpinned(self) -> bool:
        """Whether another day may give another data set."""
        return bool(self.commit) and self.commit not in self.path

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kept} problems"]
        if self.bad:
            lines[0] += f", {self.bad} bad rows left out"
            lines += [f"  {line}" for line in self.listed]
            if self.bad > len(self.listed):
                lines.append(f"  and {self.bad - len(self.listed)} more")
        if self.unpinned:
            joint = "&" if "?" in self.path else "?"
            lines.append(
                f"  unpinned: this is {self.commit}; add {joint}revision={self.commit} to repeat it"
            )
        return "\n".join(lines + [f"  {count} {what}" for what, count in self.notes.items()])

    def to_dict(self) -> dict[str, Any]:
        """The report for a JSON file."""
        return {**dataclasses.asdict(self), "notes": dict(self.notes)}


def load_problems(path: str | Path, fields: Mapping[str, str] = FIELDS) -> list[Problem]:
    """All problems of a data set, in its order; a bad row refuses it. See `read_problems`."""
    return read_problems(path, fields)[0]


def read_problems(
    path: str | Path,
    fields: Mapping[str, str] = FIELDS,
    *,
    on_bad: str = "raise",
    answers: bool = True,
) -> tuple[list[Problem], ReadReport]:
    """All problems of a data set, in its order, and what there is to say about them.

    Args:
      path: a file, a folder, a pattern or hf://owner/name; see `kdrl_jax.data.sources`.
      fields: which columns hold 'problem', 'answer' and 'id'. A dotted name such as
        'reward_model.ground_truth.0' reaches into objects, lists and strings of JSON. Rows may
        lack an id: theirs is the file's name and the line. Columns that are not named here go to
        `meta`. With the default names, rows of verl's form are understood as well, see
        `kdrl_jax.data.schemas`; pass rates of models go to `meta['pass_rate']`.
      on_bad: 'raise' refuses the data set for a row without a problem or an answer; 'drop' leaves
        it out, counts and lists it.
      answers: whether each row needs an answer; else one without has the answer "".

    Raises:
      UserError: nothing there, no problem in it, or bad rows: one line for each, with its number.
    """
    if on_bad not in ON_BAD:
        raise UserError(f"data.on_bad: {on_bad!r} must be 'raise' or 'drop'")
    found: list[Problem] = []
    listed: list[str] = []
    bad = 0
    notes: Counter[str] = Counter()
    commits = set()
    for source in open_sources(path):
        commits.add(source.commit)
        for number, row in source.rows:
            try:
                if isinstance(row, BadRow):
                    raise row
                found.append(_problem(row, fields, f"{source.stem}/{number}", notes, answers))
            except BadRow as error:
                bad += 1
                if len(listed) < MAX_LISTED:
                    listed.append(f"{source.name}:{number}: {error}")
    if bad and on_bad == "raise":
        more = bad - len(listed)
        raise UserError(*listed, *([f"{path}: {more} more bad rows"] if more else []))
    if not found:
        said = listed or [f"{path}: holds no problems; give a file with one JSON object a line"]
        raise UserError(*said)
    commit = commits.pop() if len(commits) == 1 else ""
    return found, ReadReport(str(path), len(found), bad, tuple(listed), dict(notes), commit)


def _problem(
    row: Any, fields: Mapping[str, str], default_id: str, notes: Counter[str], answers: bool
) -> Problem:
    if not isinstance(row, dict):
        raise BadRow(f"is {_kind(row)}, not an object; write one JSON object a line")
    rates = pass_rates(row)
    if is_chat_row(row) and all(fields[key] == FIELDS[key] for key in ("problem", "answer")):
        row = from_chat_row(row, notes)
    texts = {"problem": text_of(row, "problem", fields["problem"]), "answer": ""}
    if answers or not _missing(look_up(row, fields["answer"])):
        texts["answer"] = text_of(row, "answer", fields["answer"])
    name = fields["id"]
    has_id = bool(name) and look_up(row, name) not in (None, "")
    named = {fields[key] for key in ("id", "problem", "answer")}
    meta = {column: value for column, value in row.items() if column not in named}
    return Problem(
        id=text_of(row, "id", name) if has_id else default_id,
        problem=texts["problem"],
        answer=texts["answer"].strip(),
        meta=meta | {PASS_RATE: rates} if rates else meta,
    )


def text_of(row: dict[str, Any], key: str, name: str) -> str:
    """The text of a column; numbers become text as Python writes them.

    Args:
      key: of `data.fields`, for errors; name: of the column, dotted where it is a nested one.

    Raises:
      BadRow: no such column, or nothing in it that is a text or a number.
    """
    value = look_up(row, name)
    remedy = f"fill it in, or name another column with data.fields.{key}"
    if value is None and name not in row:
        raise BadRow(f"has no {key}: no {name!r} among {', '.join(row) or 'no columns'}; {remedy}")
    if _missing(value):
        raise BadRow(f"{name!r} is empty; {remedy}")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"{name!r} is {_kind(value)}, not text or a number; {remedy}")
    return str(value)


def _missing(value: Any) -> bool:
    """Whether a column has nothing in it: null, NaN or a blank text."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def look_up(row: dict[str, Any], name: str) -> Any:
    """The value of a column, or of a nested one ('a.b', 'a.0'); None where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = decode(value)
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "no JSON value")
