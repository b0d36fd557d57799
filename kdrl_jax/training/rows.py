"""Rows that are given in Python, kept in a run's folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdrl_jax import processes
from kdrl_jax.training.storage import write_atomic
from kdrl_jax.types import UserError

FILES = {"data.path": "training.jsonl", "data.eval_path": "held_out.jsonl", "data": "own.jsonl"}


def write_rows(folder: Path, key: str, rows: str | Path | Iterable[Mapping[str, Any]]) -> str:
    """Returns the value of `key` for rows: a path as it is, or FOLDER/data/NAME.jsonl.

    The file is written unless it is there already.

    Args:
      folder: the run's.
      key: of FILES.
      rows: a path, or objects of columns by name. Values that JSON has not become texts.

    Raises:
      UserError: rows that are none, or others than the folder has.
    """
    if isinstance(rows, str | Path):
        return str(rows)
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise UserError(f"{key}: {type(rows).__name__} is no list of rows; {_REMEDY}")
    lines = []
    for number, row in enumerate(_each(rows)):
        if not isinstance(row, Mapping):
            raise UserError(f"{key}: row {number} is {type(row).__name__}; {_REMEDY}")
        lines.append(json.dumps(dict(row), ensure_ascii=False, default=_plain) + "\n")
    if not lines:
        raise UserError(f"{key}: holds no rows; {_REMEDY}")
    file, text = folder / "data" / FILES[key], "".join(lines)

    def write() -> None:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, text)
        elif file.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{key}: other rows than {file} has, with which what is in {folder} was made; give "
                "those, or another folder"
            )

    processes.first_does(write)
    return str(file)


_REMEDY = "give a list of dicts, a datasets.Dataset, a pandas.DataFrame, or a path"


def _each(rows: Iterable[Any]) -> Iterable[Any]:
    """The rows of a table of pandas are not what it iterates over."""
    records = getattr(rows, "to_dict", None)
    return records("records") if callable(records) and hasattr(rows, "columns") else rows


def _plain(value: Any) -> Any:
    """A value for JSON: numbers of NumPy as numbers, anything else as its text."""
    item = getattr(value, "tolist", None)
    return item() if callable(item) else str(value)
