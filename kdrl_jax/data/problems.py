"""Problems with answers, read from JSONL or Parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdrl_jax.types import Problem, UserError

MAX_LISTED = 10
FIELDS = {"id": "id", "problem": "problem", "answer": "answer"}


class _BadRow(Exception):
    """What is wrong with one row, and the remedy."""


def load_problems(path: str | Path, fields: Mapping[str, str] = FIELDS) -> list[Problem]:
    """All problems of a file, in its order.

    Args:
      path: JSON Lines in UTF-8, one object a line; or a `.parquet` file, which needs pyarrow.
      fields: which columns hold 'problem', 'answer' and 'id'. A dotted name such as
        'reward_model.ground_truth' reaches into nested objects. Rows may lack an id: theirs is
        the file's name and the line. Columns that are not named here go to `meta`.

    Raises:
      UserError: no such file, an empty one, or bad rows: one line for each, with its number.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give a data set file"
        )
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    found: list[Problem] = []
    bad: list[str] = []
    for number, row in rows:
        try:
            if isinstance(row, _BadRow):
                raise row
            found.append(_problem(row, fields, f"{path.stem}/{number}"))
        except _BadRow as error:
            bad.append(f"{path}:{number}: {error}")
    if bad:
        more = len(bad) - MAX_LISTED
        raise UserError(*bad[:MAX_LISTED], *([f"{path}: {more} more bad rows"] if more > 0 else []))
    if not found:
        raise UserError(f"{path}: holds no problems; give a file with one JSON object a line")
    return found


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value or _BadRow) of each line that is not blank."""
    # Bytes, because text files also break lines at characters that JSON allows within strings.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.strip().decode("utf-8"), parse_constant=_no_constant)
            except UnicodeDecodeError:
                yield number, _BadRow("is not UTF-8; save the file as UTF-8")
            except json.JSONDecodeError as error:
                where = f"{error.msg} at column {error.colno}"
                yield number, _BadRow(f"is not JSON ({where}); write one JSON object a line")
            except (ValueError, RecursionError) as error:
                yield number, _BadRow(f"is not JSON ({error}); write one JSON object a line")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row as a dict)."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{path}: reading Parquet needs pyarrow; pip install 'kdrl_jax[data]'"
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: unreadable Parquet ({reason}); copy the file again") from error
    return enumerate(rows, 1)


def _problem(row: Any, fields: Mapping[str, str], default_id: str) -> Problem:
    if not isinstance(row, dict):
        raise _BadRow(f"is {_kind(row)}, not an object; write one JSON object a line")
    texts = {key: _text(row, key, fields[key]) for key in ("problem", "answer")}
    name = fields["id"]
    has_id = bool(name) and _lookup(row, name) not in (None, "")
    named = {fields[key] for key in ("id", "problem", "answer")}
    return Problem(
        id=_text(row, "id", name) if has_id else default_id,
        problem=texts["problem"],
        answer=texts["answer"].strip(),
        meta={column: value for column, value in row.items() if column not in named},
    )


def _text(row: dict[str, Any], key: str, name: str) -> str:
    """The text of a column; numbers become text as Python writes them."""
    value = _lookup(row, name)
    remedy = f"fill it in, or name another column with data.fields.{key}"
    if value is None and name not in row:
        raise _BadRow(f"has no {key}: no {name!r} among {', '.join(row) or 'no columns'}; {remedy}")
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        raise _BadRow(f"{name!r} is empty; {remedy}")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _BadRow(f"{name!r} is {_kind(value)}, not text or a number; {remedy}")
    return str(value)


def _lookup(row: dict[str, Any], name: str) -> Any:
    """The value of a column, or of a nested one ('a.b'); None where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "no JSON value")
