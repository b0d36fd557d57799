"""Files that survive a kill, and storage that fails: what to say, and what to sweep up."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from jax.errors import JaxRuntimeError

from kdrl_jax.types import UserError

FULL = "free space there and run the same command again"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: "free some of the quota and run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and run the same command again",
    errno.EROFS: "mount it for writing, or give another folder, and run the same command again",
    errno.EIO: "see to the disk, and run the same command again",
    errno.ENOTCONN: "mount it again and run the same command again",
    errno.ESTALE: "mount it again and run the same command again",
}
"""What the user can do about the errors that a disk or a mount has."""

_TEXTS = {os.strerror(number): number for number in REMEDIES} | {"RESOURCE_EXHAUSTED": errno.ENOSPC}


def storage_problem(error: BaseException | None, path: Path) -> str | None:
    """The line about an error that the storage has, whichever library raised it; else None.

    Args:
      path: what was being written, where the error does not name it.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, UserError | JaxRuntimeError):  # explained; the devices' memory
            return None
        number = error.errno if isinstance(error, OSError) else None
        name = error.filename if isinstance(error, OSError) else None
        if number not in REMEDIES:  # TensorStore has errors of its own, and says it in words
            found = [n for text, n in _TEXTS.items() if text in str(error)]
            number = found[0] if found else None
        if number is not None:
            return f"{name or path}: {os.strerror(number)}; {REMEDIES[number]}"
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def storage_explained(path: Path) -> Iterator[None]:
    """Turn the storage's errors into UserErrors.

    Raises:
      UserError: the disk is full, read-only or gone.
    """
    try:
        yield
    except Exception as error:
        if problem := storage_problem(error, path):
            raise UserError(problem) from error
        raise


def check_writable(folder: Path) -> None:
    """Refuse a folder that nothing can be written to, before any work is done for it.

    Raises:
      UserError: it, or where it would be made, is read-only.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: {there} cannot be written to; give another folder")


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader sees the old or the new, never half.

    Once this returns the content outlasts a loss of power.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        error.filename = error.filename or str(path)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder outlast a loss of power, where its file system can do that."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def sweep(folder: Path) -> None:
    """Remove what `write_atomic` left in `folder` when its process was killed.

    The caller holds the folder: a process of the same number is this one, which has not begun.
    """
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file() and _gone(path):
            with contextlib.suppress(OSError):
                path.unlink()


def sweep_partial(folder: Path, hours: float = 1.0) -> None:
    """Remove what was being written in the place of `folder` by processes that were killed.

    Args:
      hours: how long nothing has changed there: a process of another host may be alive.
    """
    for kind in ("partial", "old"):
        for path in folder.parent.glob(f".{folder.name}.{kind}-*"):
            with contextlib.suppress(OSError):
                inside = [path, *path.rglob("*")]
                age = time.time() - max(x.stat().st_mtime for x in inside)
                if _gone(path) and age > 3600 * hours:
                    shutil.rmtree(path)


def _gone(path: Path) -> bool:
    """Whether the process whose number a name ends with is no other living one of this host."""
    number = int(re.findall(r"\d+$", path.name)[0])
    if number == os.getpid():
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def drop_torn_programs(folder: Path) -> list[str]:
    """Remove compiled programs of JAX's cache that were half written when a process ended.

    JAX compiles again what it cannot read, and never replaces it: a torn entry would cost that
    for ever. Each entry is looked at once, at the first start after it was written.

    Returns:
      The names of those removed.
    """
    checked, removed = folder / ".checked", []
    begun = time.time()
    try:
        since = checked.stat().st_mtime if checked.exists() else 0.0
        for path in folder.glob("*-cache"):
            if path.stat().st_mtime >= since and not _whole_program(path):
                path.unlink()
                removed.append(path.name)
        if folder.is_dir():
            checked.touch()
            os.utime(checked, (begun - 5, begun - 5))  # clocks of file systems are coarse
    except OSError:  # a cache that cannot be mended is only slow
        pass
    return removed


def _whole_program(path: Path) -> bool:
    data = path.read_bytes()
    if not data:
        return False
    if data[:1] != b"\x78":  # not zlib's; Zstandard's frames are looked at where JAX can too
        return _whole_frame(data)
    unpacker = zlib.decompressobj()
    try:
        unpacker.decompress(data)
    except zlib.error:
        return False
    return unpacker.eof


def _whole_frame(data: bytes) -> bool:
    try:
        import zstandard
    except ImportError:
        return True
    try:
        zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError:
        return False
    return True
