"""Rows of a data set, from a file, a folder, a pattern or the Hugging Face hub.

    FILE.jsonl  FILE.json  FILE.parquet     JSON Lines, a JSON array of objects, Parquet
    FOLDER                                  of *.parquet or *.jsonl files, or saved by `datasets`
    data/math-*.parquet                     several files, in the order of their names
    hf://owner/name?split=train&config=…    a split of a data set on the hub ('train' by default)
    hf://owner/name?file=data/math-*.parquet    files of its repository, and nothing else of it

Either form takes `&revision=…`; without it the newest is read, and the report says which that was.
What was downloaded is kept and read again without a network (offline=True). Nothing of a data
set's own code is ever run.
"""

from __future__ import annotations

import difflib
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from kdrl_jax.models.checksums import escapes
from kdrl_jax.types import UserError

HUB = "hf://"
HUB_OPTIONS = ("split", "config", "revision", "file")
COMMIT = "[0-9a-f]{40}"


class BadRow(Exception):
    """What is wrong with one row, and the remedy."""


class Source(NamedTuple):
    """One file's rows.

    name: for messages. stem: the beginning of ids for rows that lack one.
    rows: (number from 1, value or BadRow); read as they are asked for.
    commit: of the hub's repository; "" where it is not known, or there is none.
    """

    name: str
    stem: str
    rows: Iterable[tuple[int, Any]]
    commit: str = ""


def open_sources(path: str | Path) -> list[Source]:
    """The files behind a path; see the module's docstring for what it may be.

    Raises:
      UserError: nothing there, or something that cannot be read.
    """
    text = str(path)
    if text.startswith(HUB):
        return _hub(text)
    path = Path(path)
    if path.is_file():
        return [_file(path)]
    if path.is_dir():
        return _folder(path)
    if not glob.has_magic(text):
        raise UserError(f"{text}: no such file; give a data set file, a folder or hf://owner/name")
    return _matching(text)


def _file(path: Path) -> Source:
    readers = {".parquet": _parquet_rows, ".json": _json_array_rows}
    read = readers.get(path.suffix, _json_rows)
    return Source(str(path), path.stem, read(path))


def _matching(pattern: str) -> list[Source]:
    files = [Path(file) for file in sorted(glob.glob(pattern, recursive=True))]
    if not files:
        raise UserError(f"{pattern}: matches no file; give a pattern of data set files")
    return [_file(file) for file in files]


def _folder(path: Path) -> list[Source]:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(json.loads((path / "dataset_dict.json").read_text())["splits"])
        raise UserError(f"{path}: holds several splits ({splits}); give the folder of one of them")
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        datasets = _import_datasets(str(path))
        try:
            table = datasets.load_from_disk(str(path))
        except Exception as error:  # whatever the library raises, the folder is of no use
            raise UserError(f"{path}: unreadable data set ({_reason(error)})") from error
        return [Source(str(path), path.name, enumerate(table, 1))]
    found = [sorted(path.glob(f"*{suffix}")) for suffix in (".parquet", ".jsonl")]
    if all(found):
        raise UserError(f"{path}: holds Parquet and JSONL files; name one kind: {path}/*.parquet")
    if not any(found):
        raise UserError(f"{path}: a folder without .parquet or .jsonl files; give a data set file")
    return [_file(file) for file in found[0] + found[1]]


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value or BadRow) of each line that is not blank."""
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
                yield number, BadRow("is not UTF-8; save the file as UTF-8")
            except json.JSONDecodeError as error:
                where = f"{error.msg} at column {error.colno}"
                yield number, BadRow(f"is not JSON ({where}); write one JSON object a line")
            except (ValueError, RecursionError) as error:
                yield number, BadRow(f"is not JSON ({error}); write one JSON object a line")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _json_array_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(place from 1, value) of a JSON array; a `.json` file of JSON Lines is read as such."""
    with path.open("rb") as file:
        if not file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _json_rows(path)
            return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not a JSON array ({_reason(error)}); mend the file") from error
    yield from enumerate(rows, 1)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row as a dict)."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"{path}: reading Parquet needs pyarrow; pip install 'kdrl_jax[data]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: unreadable Parquet ({_reason(error)}); copy the file again"
        ) from error


def _hub(url: str) -> list[Source]:
    parts = urlsplit(url)
    name = parts.netloc + parts.path.rstrip("/")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    problems = []
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or {".", ".."} & set(name.split("/")):
        problems.append(f"{url}: {name!r} is no data set; write hf://owner/name?split=train")
    for key in options.keys() - set(HUB_OPTIONS):
        near = difflib.get_close_matches(key, HUB_OPTIONS, n=1, cutoff=0.0)[0]
        problems.append(f"{url}: no option {key!r}; the nearest is {near!r}")
    pattern = options.get("file", "x")
    if escapes(pattern):
        problems.append(f"{url}: file={pattern!r} lies outside the data set; refused")
    if "file" in options and options.keys() & {"split", "config"}:
        problems.append(f"{url}: file says what is read; leave out split and config")
    if problems:
        raise UserError(*sorted(problems))
    revision = options.get("revision")
    if "file" in options:
        # Its own readers, not those of `datasets`: they need no network for what is kept, and a
        # row of another type does not stop them.
        folder = _ask_hub(url, _download, name, revision, options["file"])
        commit = Path(folder).name if re.fullmatch(COMMIT, Path(folder).name) else ""
        found = _matching(str(Path(glob.escape(folder)) / options["file"]))
        return [source._replace(commit=commit) for source in found]
    datasets, split = _import_datasets(url), options.get("split", "train")
    table = _ask_hub(
        url,
        datasets.load_dataset,
        name,
        options.get("config"),
        split=split,
        revision=revision,
    )
    stem = name.rpartition("/")[2]
    return [Source(url.partition("?")[0], stem, enumerate(table, 1), _commit_of(table))]


def _commit_of(table: Any) -> str:
    """The commit that a `datasets` table was made of: its files' addresses have it."""
    checksums = getattr(getattr(table, "info", None), "download_checksums", None) or {}
    found = {commit for at in checksums for commit in re.findall(f"@({COMMIT})(?=/)", str(at))}
    return found.pop() if len(found) == 1 else ""


def _download(name: str, revision: str | None, pattern: str) -> str:
    """The folder in the hub's cache with the files that match."""
    from huggingface_hub import snapshot_download

    return snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=[pattern])


def _ask_hub(url: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except Exception as error:  # no network, no such name, split or file, a broken file, …
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(
            f"{url}: the hub gave nothing{offline}: {type(error).__name__}: {_reason(error)}; "
            "check the name, the split and the network"
        ) from error


def _import_datasets(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path}: reading it needs datasets; pip install 'kdrl_jax[data]'"
        ) from error
    return datasets


def _reason(error: Exception) -> str:
    """An exception's message as one short line."""
    return " ".join(str(error).split())[:200]
