"""SHA256SUMS beside exported weights: written with them, compared before they are read.

The format is that of `sha256sum`, so `sha256sum -c SHA256SUMS` checks a folder by hand. A folder
without the file is read as it is: who has changed weights on purpose deletes it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from kdrl_jax import processes
from kdrl_jax.types import UserError

SUMS = "SHA256SUMS"
THREADS = 8
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


class HashedFile:
    """Writes to a binary file, and knows the SHA-256 of what went through, unless not `hashed`."""

    def __init__(self, file: BinaryIO, hashed: bool = True):
        self._file, self._hash = file, hashlib.sha256() if hashed else None

    def write(self, data: bytes | memoryview) -> None:
        """All of `data`."""
        self._file.write(data)
        if self._hash:
            self._hash.update(data)

    def hexdigest(self) -> str:
        """64 digits, of everything written so far; "" where nothing was hashed."""
        return self._hash.hexdigest() if self._hash else ""


def digest_of(file: Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits.

    A run opens its folders several times: a file that has not been touched since is not read again.
    """
    state = file.stat()
    return _read_digest(file.resolve(), state.st_size, state.st_mtime_ns, state.st_ino)


@functools.cache
def _read_digest(file: Path, *_: int) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_sums(folder: Path, known: Mapping[str, str]) -> None:
    """Write SHA256SUMS for all files of `folder`, sorted by name.

    Args:
      known: digests by name that need not be taken again.
    """
    names = sorted(f.name for f in folder.iterdir() if f.is_file() and f.name != SUMS)
    lines = [f"{known.get(name) or digest_of(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def escapes(name: object) -> bool:
    """Whether a file's name out of an index or a list could mean a place outside its folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return True
    path = PurePosixPath(name)
    return ".." in path.parts or path.is_absolute() or "\\" in name or ":" in name


def read_sums(folder: Path) -> dict[str, str] | None:
    """Digests by name from `folder`'s SHA256SUMS; None where there is no such file.

    Raises:
      UserError: lines that are none of `sha256sum`, or that name something outside the folder.
    """
    file = folder / SUMS
    if not file.is_file():
        return None
    found, problems = {}, []
    text = file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.rstrip("\r"))
        if not match:
            problems.append(f"{file}:{number}: is no line of sha256sum; copy the file again")
        elif escapes(match[2]):
            problems.append(f"{file}:{number}: {match[2]!r} lies outside the folder; refused")
        else:
            found[match[2].removeprefix("./")] = match[1].lower()
    if problems:
        raise UserError(*problems[:10])
    return found


def verify_files(folder: Path, names: Iterable[str]) -> None:
    """Compare files with `folder`'s SHA256SUMS, if it has one; several files at a time.

    Of several processes each takes a share of the files: what one of them refuses is refused by
    all once they come together (`processes.together`).

    Raises:
      UserError: files that are not listed, or not what they were when they were listed; all at
        once.
    """
    sums = read_sums(folder)
    if sums is None:
        return
    listed, problems = sums, []

    def problem(name: str) -> str | None:
        file = folder / name
        if name not in listed:
            return (
                f"{file}: not listed in {SUMS}; if it belongs there, delete {SUMS} to read the "
                "folder unchecked"
            )
        if digest_of(file) != listed[name]:
            return (
                f"{file}: is not the file that {SUMS} lists, {listed[name][:12]}…; copy it again, "
                f"or delete {SUMS} if it was changed on purpose"
            )
        return None

    mine = sorted(names)[processes.index() :: processes.count()]
    with ThreadPoolExecutor(max_workers=min(THREADS, os.cpu_count() or 1)) as pool:
        problems = [line for line in pool.map(problem, mine) if line]
    if problems:
        raise UserError(*problems)
